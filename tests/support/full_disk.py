"""`python -m tests.support.full_disk SMALL LARGE`: every stage with room, and again on a disk that fills up meanwhile.

Run where SMALL is a file system of its own (`tests.support.small_disk`). Prints as JSON what each stage said on the
full disk, what it left, and the digests of the products of both runs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lib.errors import InputError
from lib.models import offline_base
from lib.runs.files import HOME_VARIABLE
from lib.runs.manifest import NOTE
from lib.runs.run import Run, open_run
from lib.settings import Settings, check
from lib.stages.compare import stage as compare_stage
from lib.stages.convert import stage as convert_stage
from lib.stages.data import stage as data_stage
from lib.stages.evaluate import stage as evaluate_stage
from lib.stages.export import stage as export_stage
from lib.stages.finetune import stage as finetune_stage
from lib.stages.merge import stage as merge_stage
from lib.stages.quantize import stage as quantize_stage

TINY = offline_base.BaseRecipe(
    layers=1, hidden=64, intermediate=64, heads=2, kv_heads=1, window=64, batch=4, min_tokens=5_000, max_tokens=5_000
)
STAGES: dict[str, Callable[[Settings, Run], Any]] = {
    "data": data_stage.prepare,
    "adapter": finetune_stage.finetune,
    "evaluation": evaluate_stage.evaluate,
    "merged": merge_stage.merge,
    "gguf": convert_stage.export,
    "quantized": quantize_stage.quantize,
    "exports": export_stage.export,
    "comparison": compare_stage.compare,
}
VALUES = {
    "run_name": "small",
    "label_names": ["负面", "正面"],
    "system_prompt": "你是情感分析助手。",
    "user_prompt": "评论：{text}",
    "max_train_rows": 40,
    "max_eval_rows": 16,
    "num_train_epochs": 1.0,
    "save_steps": 2,
    "lora_r": 4,
    "dtype": "float32",
    "ladder": ["Q8_0"],
    "export_formats": ["bf16"],
    "n_ctx": 64,
    "perplexity_tokens": 512,
    "n_threads": 1,
}


def _begun(work: Path) -> bool:
    """Whether a stage has written a file of its own; two are too quick to wait for that."""
    quick = work.name in (".data.part", ".merged.part")
    with contextlib.suppress(OSError):
        return any(path.is_file() and (path.name != NOTE or quick) for path in work.rglob("*"))
    return False


@contextlib.contextmanager
def filling(home: Path, work: Path) -> Iterator[None]:
    """Somebody else fills the disk of `home` as soon as `work` is in use, and keeps it full."""
    ended, filler = threading.Event(), home / "filler"

    def fill() -> None:
        while not ended.is_set() and not _begun(work):
            time.sleep(0.001)
        with filler.open("ab", buffering=0) as stream:
            with contextlib.suppress(OSError):  # most of it at once
                os.posix_fallocate(stream.fileno(), 0, shutil.disk_usage(home).free - (1 << 16))
            stream.seek(0, os.SEEK_END)
            while not ended.is_set():
                for size in (1 << 12, 1):
                    with contextlib.suppress(OSError):
                        while not ended.is_set():
                            stream.write(bytes(size))
                time.sleep(0.001)

    thread = threading.Thread(target=fill)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        filler.unlink(missing_ok=True)


def main(small: Path, large: Path) -> dict[str, Any]:
    """What the command prints."""
    offline_base.BaseRecipe = lambda **changes: replace(TINY, **changes)  # type: ignore[misc, assignment]
    settings = check(VALUES, "the test")
    said, digests = {}, {}
    for home in (large, small):
        os.environ[HOME_VARIABLE] = str(home)
        run = open_run(settings.run_name)
        for product, stage in STAGES.items():
            if home == small:
                try:
                    with filling(home, run.folder / f".{product}.part"):
                        stage(settings, run)
                except InputError as error:
                    said[product] = {"said": str(error), "finished": list(run.manifest.entries())}
            stage(settings, run)
        entries = run.manifest.entries()
        digests[home.name] = {
            name: {k: v["sha256"] for k, v in entry.outputs.items()} for name, entry in entries.items()
        }
    left = sorted(path.name for path in small.rglob("*.part"))
    return {"said": said, "digests": digests, "left": left}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2])), ensure_ascii=False))
