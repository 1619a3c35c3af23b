"""``python -m lib.cli``: the command line without an installed entry point."""

from lib.cli import main

main()
