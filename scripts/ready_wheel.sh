#!/bin/sh
# Without a compiler: install a ready wheel of llama-cpp-python from where the user's PIP_EXTRA_INDEX_URL says.
#
#   sh scripts/ready_wheel.sh PYTHON llama_cpp_python==VERSION [--dry-run]
#
# Exit code 2 where there is none for this system. Nothing is compiled, and no index is asked that pip would not ask.
set -eu
python=$1 wanted=$2
shift 2
if "$python" -m pip --disable-pip-version-check install --quiet --no-deps --only-binary :all: "$@" "$wanted" >&2; then
    exit 0
fi
printf '%s\n' "Found: no compiler here, and no ready wheel of $wanted for this Python and system in the indexes that pip asks (PIP_EXTRA_INDEX_URL). Expected: a C and a C++ compiler, or an index with such a wheel. Do this: install a compiler (apt install build-essential, dnf install gcc gcc-c++ make, conda install -c conda-forge compilers), name another index (docs/setup.md), or set WORKBOOK_WITHOUT_LLAMA_CPP=1 for notebooks 01 to 04 only." >&2
exit 2
