"""The workbook's library: from data to a phone-ready quantized file, with the cost of every step measured.

Importing this package loads nothing heavy; see docs/HOUSE.md for the rooms and their floors.
"""

import logging
import os
import warnings

__version__ = "0.1.0"

# tqdm says on stderr that ipywidgets is absent; in a headless notebook that line would be part of the report.
warnings.filterwarnings("ignore", message="IProgress not found")

# Waiting threads sleep instead of spinning. On a machine that is shared, even a little, spinning threads keep each
# other from running: training the offline base with two threads was measured 27 times slower than with this setting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# What torchao says whenever transformers looks at it: GPU kernels that do not load, Enums that it registers. Other
# messages of these loggers are kept.
for _name, _start in (("torchao", "Failed to load "), ("torch.utils._pytree", "%s is an Enum subclass")):
    logging.getLogger(_name).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))
