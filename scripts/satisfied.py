"""Does the Python that runs this have exactly the lock? Exit code 0 yes, 1 no. Plain standard library.

python scripts/satisfied.py [--quiet] requirements.txt
"""

import sys


def differences(lock):
    """Packages of the lock that are absent or have another version, as text."""
    from importlib import metadata

    found = []
    for line in open(lock, encoding="utf-8"):  # noqa: PTH123, SIM115 - must run under any Python
        requirement, _, marker = line.partition("#")[0].partition(";")
        name, separator, version = requirement.strip().partition("==")
        if not separator or ("Darwin" in marker and sys.platform != "darwin"):
            continue
        try:
            have = metadata.version(name)
        except metadata.PackageNotFoundError:
            have = "absent"
        if have.partition("+")[0] != version:
            found.append("%s %s (lock: %s)" % (name, have, version))  # noqa: UP031 - must run under any Python
    return found


if __name__ == "__main__":
    quiet = "--quiet" in sys.argv
    if sys.version_info < (3, 11):  # noqa: UP036 - that is the question
        missing = ["Python %d.%d (needed: 3.11 or newer)" % sys.version_info[:2]]  # noqa: UP031
    else:
        missing = differences(sys.argv[-1])
    if missing and not quiet:
        print("; ".join(missing[:4]) + ("; …" if len(missing) > 4 else ""))
    sys.exit(1 if missing else 0)
