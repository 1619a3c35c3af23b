#!/bin/sh
# Make .venv with exactly the lock, then install this project into it (editable).
# The compiled llama-cpp-python is kept as a wheel under ${XDG_CACHE_HOME:-~/.cache}/quantization-workbook/wheels, in a
# folder named after Python, processor and CMAKE_ARGS, so that a second clone does not compile again; beside them, in
# llama.cpp-VERSION, the converter of those sources, for models that the workbook's own does not know.
set -eu
cd "$(dirname "$0")/.."

say() { printf '%s\n' "$*" >&2; }

say "[1/5] Looking at this machine …"
python=$(sh scripts/preflight.sh)

if ! .venv/bin/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    say "[2/5] Making .venv with $python …"
    rm -rf .venv
    "$python" -m venv .venv
else
    say "[2/5] Using the .venv that is there."
fi
pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

llama=$(grep '^llama_cpp_python==' requirements.txt)
grep '^llama_cpp_python==' requirements.txt >"$work/llama.txt"
compiled=yes
if [ -z "${WORKBOOK_WITHOUT_LLAMA_CPP:-}" ] && ! { sh scripts/compiler.sh c && sh scripts/compiler.sh cpp; }; then
    compiled=no # known before the downloads whether there is a wheel at all
    .venv/bin/python scripts/satisfied.py --quiet "$work/llama.txt" ||
        sh scripts/ready_wheel.sh .venv/bin/python "$llama" --dry-run
fi

torch=$(grep '^torch==' requirements.txt)
say "[3/5] Installing $torch first, so that pip chooses the build for this machine …"
grep -v '^llama_cpp_python==' requirements.txt >"$work/lock.txt"
if ! .venv/bin/python scripts/satisfied.py --quiet requirements.txt; then
    grep '^torch==' requirements.txt >"$work/torch.txt"
    if ! .venv/bin/python scripts/satisfied.py --quiet "$work/torch.txt"; then
        pip install --quiet --dry-run --report "$work/report.json" --constraint "$work/lock.txt" "$torch"
        if grep -q '"name": "nvidia-' "$work/report.json"; then
            say "      pip chose a build with CUDA (several GB; docs/setup.md says how to take the CPU build)."
            WORKBOOK_NEED_GB=12 sh scripts/preflight.sh >/dev/null
        fi
        pip install --quiet --constraint "$work/lock.txt" "$torch"
    fi
fi

say "[4/5] Installing the other packages of the lock (one to three minutes) …"
pip install --quiet --requirement "$work/lock.txt"
if [ -n "${WORKBOOK_WITHOUT_LLAMA_CPP:-}" ]; then
    say "      Without llama-cpp-python, as WORKBOOK_WITHOUT_LLAMA_CPP asks: notebooks 05 to 07 will not run."
elif .venv/bin/python scripts/satisfied.py --quiet "$work/llama.txt"; then
    :
elif [ "$compiled" = no ]; then
    say "      Without a compiler: a ready wheel of $llama (make doctor tries it) …"
    sh scripts/ready_wheel.sh .venv/bin/python "$llama"
else
    # GCC leaves out most of the tile configuration of llama.cpp's AMX code (its ldtilecfg says that it reads 8 of the
    # 64 bytes; seen with 12.2), and every prompt on 8-bit weights then ends in SIGSEGV: compiled without that code
    export CFLAGS="${CFLAGS:-} -U__AMX_INT8__" CXXFLAGS="${CXXFLAGS:-} -U__AMX_INT8__"
    flags=$(grep -m 1 -E '^(flags|Features)' /proc/cpuinfo 2>/dev/null || uname -p)
    key=$(printf '%s' "$flags ${CMAKE_ARGS:-} $CXXFLAGS" | cksum | cut -d ' ' -f 1)
    tag=$(.venv/bin/python -c 'import sysconfig, sys; print("cp%d%d-%s" % (*sys.version_info[:2], sysconfig.get_platform()))')
    cache="${XDG_CACHE_HOME:-$HOME/.cache}/quantization-workbook"
    wheels="$cache/wheels/$tag-$key" converter="$cache/llama.cpp-${llama#*==}"
    sources() { # the source distribution, fetched once
        [ -d "$work/sources" ] ||
            pip download --quiet --no-deps --no-cache-dir --no-binary llama_cpp_python --dest "$work/sources" "$llama"
        ls "$work"/sources/llama_cpp_python-*.tar.gz
    }
    if ! ls "$wheels"/llama_cpp_python-"${llama#*==}"-*.whl >/dev/null 2>&1; then
        say "      Compiling $llama, once: about 4 minutes on 2 cores (kept for next time in $wheels) …"
        # no pip cache: what it holds may have been compiled with other CMAKE_ARGS or for another processor
        pip wheel --quiet --no-deps --no-cache-dir --wheel-dir "$work/wheels" "$(sources)"
        mkdir -p "$wheels"
        mv "$work"/wheels/*.whl "$wheels/"
    fi
    if [ ! -f "$converter/convert_hf_to_gguf.py" ]; then
        say "      Keeping the converter of llama.cpp in $converter …"
        .venv/bin/python scripts/keep_converter.py "$(sources)" "$converter"
    fi
    pip install --quiet --no-deps --no-index --force-reinstall "$wheels"/llama_cpp_python-"${llama#*==}"-*.whl
fi

say "[5/5] Installing this project …"
pip install --quiet --no-deps --no-build-isolation --editable .
touch .venv/.ready
say "Ready."
