"""The one kind of error a user should ever see: found, expected, do this. And the end that SIGTERM asks for."""

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


class Terminated(SystemExit):
    """The process was asked to end by SIGTERM: uncaught, it ends Python with exit code 143 and no traceback."""

    def __init__(self, why: str = "ended by SIGTERM") -> None:
        super().__init__(143)
        self.why = why

    def __str__(self) -> str:
        return self.why
