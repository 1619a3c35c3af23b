"""The report: notebooks executed one process each, rendered as self-contained pages, checked, and indexed.

`lib.reporting.runner.run_report` is the one entry; it is what ``workbook report`` calls.
"""

from lib.errors import Terminated

__all__ = ["Terminated"]
