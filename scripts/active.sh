#!/bin/sh
# The Python of an active conda or virtual environment that already has the lock; nothing when there is none.
cd "$(dirname "$0")/.." || exit 1
for root in "${VIRTUAL_ENV:-}" "${CONDA_PREFIX:-}"; do
    [ -n "$root" ] && [ -x "$root/bin/python" ] || continue
    [ "$root" = "$PWD/.venv" ] && continue
    if reason=$("$root/bin/python" scripts/satisfied.py requirements.txt); then
        printf '%s\n' "$root/bin/python"
        exit 0
    fi
    printf 'The active environment %s does not have the lock (%s); using .venv.\n' "$root" "$reason" >&2
done
