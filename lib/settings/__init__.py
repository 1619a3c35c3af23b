"""The parameters of a run: their schema, and how they are read."""

from lib.settings.reading import check, from_notebook, load, parse_override
from lib.settings.schema import OFFLINE_BASE, SAMPLE_DATASET, Settings

__all__ = ["OFFLINE_BASE", "SAMPLE_DATASET", "Settings", "check", "from_notebook", "load", "parse_override"]
