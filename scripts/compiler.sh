#!/bin/sh
# Is there a compiler that translates a program? `c` or `cpp`; exit code 0 yes, 1 no. Needs no package.
set -u
case "$1" in
    c) set -- c "${CC:-}" cc gcc clang ;;
    *) set -- cpp "${CXX:-}" c++ g++ clang++ ;;
esac
source=$(mktemp -d 2>/dev/null) || exit 1
printf 'int main(void) { return 0; }\n' >"$source/a.$1"
extension=$1
shift
status=1
for compiler in "$@"; do
    if [ -n "$compiler" ] && $compiler "$source/a.$extension" -o "$source/a.out" >/dev/null 2>&1; then
        status=0
        break
    fi
done
rm -rf "$source"
exit $status
