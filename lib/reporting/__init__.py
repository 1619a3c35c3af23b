"""The report: notebooks executed one process each, rendered as self-contained pages, checked, and indexed.

`lib.reporting.runner.run_report` is the one entry; it is what ``workbook report`` calls.
"""


class Terminated(BaseException):
    """The process was asked to end by SIGTERM."""
