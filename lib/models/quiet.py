"""Libraries told not to talk: what they print would land in a report page. Errors stay errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import warnings
from collections.abc import Iterator


@functools.cache
def quiet() -> None:
    """Switch off progress bars and advice of transformers, peft and the hub client, once for this process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import huggingface_hub.utils
    import transformers.utils.logging

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """Python warnings of the libraries called inside are dropped; exceptions pass."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
