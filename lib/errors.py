"""The one kind of error a user should ever see: found, expected, do this."""

from __future__ import annotations


class InputError(ValueError):
    """Input the workbook cannot use, said so that the reader knows what to do next.

    Args:
        found: what is there (the path, key or value).
        expected: what would have been right.
        do: the next step, preferably a command or a setting.
    """

    def __init__(self, found: str, expected: str, do: str) -> None:
        self.found, self.expected, self.do = found, expected, do
        super().__init__(f"Found: {found} Expected: {expected} Do this: {do}")

    def __reduce__(self) -> tuple:
        return (InputError, (self.found, self.expected, self.do))
