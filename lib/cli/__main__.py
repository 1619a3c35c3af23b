"""``python -m lib.cli``, and ``workbook``: the same functions as the notebooks, one command each."""

from __future__ import annotations

import sys


def joined(arguments: list[str]) -> list[str]:
    """``-p KEY VALUE`` (papermill's form) as ``-p KEY=VALUE``, which is the form the option parser knows."""
    result, rest = [], list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            return [*result, word, *rest]
        result.append(word)
        if word in ("-p", "--parameter") and rest:
            key = rest.pop(0)
            result.append(f"{key}={rest.pop(0)}" if "=" not in key and rest else key)
    return result


def main() -> None:
    """Entry point of ``workbook``."""
    from lib.cli.app import app

    app(joined(sys.argv[1:]), prog_name="workbook")


if __name__ == "__main__":
    main()
