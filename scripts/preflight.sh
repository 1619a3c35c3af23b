#!/bin/sh
# Is everything there that the set-up needs? Each lack gives one sentence with its cure (apt, dnf or conda).
# Prints the Python to use on stdout and everything else on stderr. Needs no package. Exit code 2 when something lacks.
set -u

problems=0
lack() {
    problems=$((problems + 1))
    printf 'Missing: %s\n' "$1" >&2
}

version_of() { # "3.11" of a Python that starts, else nothing
    "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null
}

python=""
seen=""
for name in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
    version=$(version_of "$name") || continue
    case "$version" in
        3.11 | 3.12 | 3.13)
            python=$(command -v "$name")
            break
            ;;
        *) seen="$seen $name is $version;" ;;
    esac
done
if [ -z "$python" ]; then
    lack "Python 3.11, 3.12 or 3.13 (found:${seen:- none}) – apt install python3 python3-venv, dnf install python3.12, or conda create -n workbook python=3.12; a Python elsewhere is given as make PYTHON=/path/to/python3.12"
elif ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    minor=$(version_of "$python")
    lack "the venv module of $python – apt install python3-venv (or python$minor-venv), dnf install python3-pip, or conda install pip"
fi

if [ -z "${WORKBOOK_WITHOUT_LLAMA_CPP:-}" ]; then
    without="or, for notebooks 01 to 04 only, set WORKBOOK_WITHOUT_LLAMA_CPP=1; ready wheels: docs/setup.md"
    here=$(dirname "$0" 2>/dev/null || printf scripts)
    if /bin/sh "$here/compiler.sh" c && /bin/sh "$here/compiler.sh" cpp; then
        :
    elif [ -n "${PIP_EXTRA_INDEX_URL:-}" ]; then
        printf 'No compiler: a ready wheel of llama-cpp-python is looked for where PIP_EXTRA_INDEX_URL says.\n' >&2
    else
        /bin/sh "$here/compiler.sh" c ||
            lack "a C compiler (llama-cpp-python is compiled here) – apt install build-essential, dnf install gcc gcc-c++ make, conda install -c conda-forge compilers, $without"
        /bin/sh "$here/compiler.sh" cpp ||
            lack "a C++ compiler (llama-cpp-python is compiled here) – apt install build-essential, dnf install gcc-c++, conda install -c conda-forge compilers, $without"
    fi
    command -v make >/dev/null 2>&1 || command -v ninja >/dev/null 2>&1 ||
        lack "make – apt install make, dnf install make, or conda install make"
fi
command -v git >/dev/null 2>&1 ||
    lack "git (the pages name the commit they were made with) – apt install git, dnf install git, or conda install git"

need_gb=${WORKBOOK_NEED_GB:-6}
free_kb=$(df -Pk . 2>/dev/null | awk 'NR == 2 { print $4 }' 2>/dev/null)
if [ -n "$free_kb" ] && [ "$free_kb" -lt $((need_gb * 1000000)) ]; then
    lack "free disk space: $((free_kb / 1000000)) GB here, $need_gb GB needed – free some, or clone to another disk"
fi

if [ "$problems" -gt 0 ]; then
    exit 2
fi
printf '%s\n' "$python"
