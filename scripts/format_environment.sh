#!/bin/sh
# Make .venv-NAME with exactly requirements-NAME.txt: an export format whose packages do not go together with the lock.
# sh scripts/format_environment.sh mnn .venv/bin/python
set -eu
cd "$(dirname "$0")/.."
folder=".venv-$1" lock="requirements-$1.txt"
"$folder/bin/python" -c 'import sys' 2>/dev/null || "$2" -m venv "$folder"
if "$folder/bin/python" scripts/satisfied.py --quiet "$lock"; then
    echo "$folder has exactly $lock."
    exit 0
fi
printf 'Installing %s into %s (%s) …\n' "$lock" "$folder" "$(sed -n '1s/^# //p' "$lock")" >&2
"$folder/bin/python" -m pip --disable-pip-version-check install --quiet --requirement "$lock"
"$folder/bin/python" scripts/satisfied.py "$lock"
