"""The workbook's library: from data to a phone-ready quantized file, with the cost of every step measured.

Importing this package loads nothing heavy; see docs/HOUSE.md for the rooms and their floors.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__version__ = "0.1.0"

# tqdm says on stderr that ipywidgets is absent; in a headless notebook that line would be part of the report.
warnings.filterwarnings("ignore", message="IProgress not found")

# Waiting threads sleep instead of spinning. On a machine that is shared, even a little, spinning threads keep each
# other from running: training the offline base with two threads was measured 27 times slower than with this setting.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# llama.cpp ends at once where it aborts: its call of a debugger took a minute, and buried the reason.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

# nbformat's library of schemas would compile a grammar of international addresses at its import, 1.7 of 1.9 seconds,
# for a check that no schema of notebooks asks for. It goes without where the grammar's library is absent.
sys.modules.setdefault("rfc3987_syntax", None)

# transformers says at its import that torch is absent; whoever needs torch is told so by name.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

if os.environ.get("WORKBOOK_LOG_FILE"):  # set by a command that shows what is logged
    from lib.progress import keep_log

    keep_log()

# What libraries say as soon as transformers or peft looks at them: GPU kernels that torchao cannot load, Enums that it
# registers, an optional kernel of bitsandbytes for single rows; and, at every first pass of an INT8 layer, that
# LLM.int8() computes in float16, which is how it works. Other messages of these loggers are kept.
CHATTER = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
for _name, _start in CHATTER.items():
    logging.getLogger(_name).addFilter(lambda record, start=_start: not str(record.msg).startswith(start))
