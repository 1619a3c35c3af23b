"""Peak memory of merging and converting models of growing size: it must not grow with them.

    python benchmarks/large_model.py --json OUT.json [--sizes 1,3,10] [--limit 2] [--folder DIR]

For each size (GB) a sharded model of Qwen3's kind is made (random bfloat16 weights, layers of Qwen3-1.7B's shape, as
many as it takes, a small vocabulary) with a LoRA adapter of rank 16 on all linear layers. `workbook merge`, the proof
and the check of the merge, `workbook convert` and the gate are measured as whole processes inside a control group whose
memory is limited (GiB, page cache included), where this user may make one; else without, and the result says so. Every
size takes three times its bytes of disk, freed before the next.

RssAnon is what the processes allocate; resident memory counts mapped files too, whose pages the system takes back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import harness
from benchmarks.shapes import cache, linear_shapes, write_adapter
from lib.errors import InputError
from lib.runs.machine import CGROUPS, OWN_CGROUP

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "attention_bias": False,
}
LAYERS_A_SHARD = 5
STEPS = {
    "proof": """
from lib.stages.merge.proof import prove_merge
print(prove_merge(base, adapter, merged))
""",
    "check": """
from lib.stages.merge.verify import check_merge
prompts = [task.probe_ids(tokenizer, row) for row in rows]
print(check_merge(base, adapter, merged, prompts, "bfloat16"))
""",
    "gate": """
from lib.stages.convert.gate import gate
print(gate(merged, gguf, task, rows, 0.01, 0.5))
""",
}
"""What the notebooks 04 and 05 do besides: the proof of the weights, and the questions to both models."""
START = """
import sys
from pathlib import Path
from lib.models.loading import load_tokenizer
from lib.prompts.tasks import ClassificationTask
base, adapter, merged, gguf = map(Path, sys.argv[1:])
tokenizer, task = load_tokenizer(base), ClassificationTask(("negative", "positive"), "Judge.", "text {text}", 64)
rows = [{"text": f"about {number} things, good"} for number in range(2)]
"""


def write_model(folder: Path, gigabytes: float) -> dict[str, Any]:
    """A model folder of about that many gigabytes (10⁹ bytes) in shards; its configuration."""
    import torch
    from safetensors.torch import save_file

    from lib.models.offline_base import train_tokenizer

    words = ["positive", "negative"]
    train_tokenizer(
        [f"text {number} about {number * 7} things, some of them good" for number in range(500)], words, folder
    )
    vocabulary = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    size = max([len(vocabulary["model"]["vocab"]), *(token["id"] + 1 for token in vocabulary["added_tokens"])])
    layer = 2 * sum(rows * columns for rows, columns in linear_shapes(CONFIG).values())
    config = {**CONFIG, "vocab_size": size, "num_hidden_layers": max(1, round(gigabytes * 1e9 / layer))}
    draw, width, where = torch.Generator().manual_seed(0), config["hidden_size"], {}

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=draw)

    def norm(count: int) -> torch.Tensor:
        return torch.ones(count, dtype=torch.bfloat16)

    count = config["num_hidden_layers"]
    shards = -(-count // LAYERS_A_SHARD)
    for shard in range(shards):
        tensors = {}
        for number in range(shard * LAYERS_A_SHARD, min(count, (shard + 1) * LAYERS_A_SHARD)):
            prefix = f"model.layers.{number}."
            tensors |= {f"{prefix}{name}.weight": random(*shape) for name, shape in linear_shapes(config).items()}
            for name in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}{name}.weight"] = norm(width)
            for name in ("self_attn.q_norm", "self_attn.k_norm"):
                tensors[f"{prefix}{name}.weight"] = norm(config["head_dim"])
        if shard == 0:
            tensors |= {"model.embed_tokens.weight": random(size, width), "model.norm.weight": norm(width)}
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": layer * count}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return config


@contextlib.contextmanager
def limited(gibibytes: float) -> Iterator[tuple[list[str], str]]:
    """What a command begins with to run in a control group of so much memory, and the group's kind.

    Where none can be made the beginning is empty, and the second value is the reason.
    """
    own = {names: path for _, names, path in (line.split(":", 2) for line in OWN_CGROUP.read_text().splitlines())}
    version = 1 if "memory" in own else 2
    inside = CGROUPS / "memory" / own["memory"].lstrip("/") if version == 1 else CGROUPS / own.get("", "/").lstrip("/")
    group, file = inside / "large-model", "memory.limit_in_bytes" if version == 1 else "memory.max"
    try:
        group.mkdir(exist_ok=True)
        (group / file).write_text(str(int(gibibytes * 2**30)))
    except OSError as error:
        yield [], f"not limited: {error}"
        return
    try:
        enter = f'echo $$ > "{group / "cgroup.procs"}" && exec "$@"'
        yield ["sh", "-c", enter, "sh"], f"{gibibytes:g} GiB, control group of version {version}"
    finally:
        group.rmdir()


def measured(place: Path, gigabytes: float, limit: float) -> dict[str, Any]:
    """Make a model of that size below `place`, merge, prove and convert it; the figures of each step."""
    base, adapter, merged, gguf = paths = [place / name for name in ("base", "adapter", "merged", "model.gguf")]
    for folder in (base, adapter):
        folder.mkdir()
    config = write_model(base, gigabytes)
    write_adapter(adapter, base, config)
    own = {name: [sys.executable, "-c", START + code, *map(str, paths)] for name, code in STEPS.items()}
    steps = {
        "merge": harness.workbook("merge", "--base-model", base, "--adapter", adapter, "--output-dir", merged),
        "proof": own["proof"],
        "check": own["check"],
        "convert": harness.workbook("convert", merged, gguf),
        "gate": own["gate"],
    }
    for path in (*base.iterdir(), *adapter.iterdir()):  # what is cached now would not count against the limit
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    found: dict[str, Any] = {"layers": config["num_hidden_layers"]}
    found["base_bytes"] = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    with limited(limit) as (start, words):
        found["limit"] = words
        for name, command in steps.items():
            result = harness.measure([*start, *command])
            found[name] = {key: round(value, 1) for key, value in result.items()}
            shown = f"{result['peak_anonymous_mib']:.0f} MiB allocated, {result['peak_resident_mib']:.0f} resident"
            print(f"{gigabytes:g} GB, {name}: {shown}, {result['wall_seconds']:.0f} s", file=sys.stderr, flush=True)
    found["gguf_bytes"] = gguf.stat().st_size
    return found


def main() -> None:
    """Measure every size, write the result, print how memory and size grow from the first to the last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="OUT.json", help="file to write")
    parser.add_argument("--sizes", default="1,3,10", help="GB of the models [default: %(default)s]")
    parser.add_argument("--limit", type=float, default=2.0, help="GiB of memory [default: %(default)s]")
    parser.add_argument("--folder", type=Path, help="where the models are made [default: the benchmarks' cache]")
    chosen = parser.parse_args()
    sizes, results = [float(size) for size in chosen.sizes.split(",")], []
    folder = chosen.folder or cache()
    if shutil.disk_usage(folder).free < 3.3e9 * max(sizes):
        raise InputError(f"too little room in {folder}.", f"{3.3 * max(sizes):.0f} GB.", "choose another --folder.")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="large-model-", dir=folder) as place:
            results.append({"gigabytes": size, **measured(Path(place), size, chosen.limit)})
    first, last = results[0], results[-1]
    ratios = {"size": round(last["base_bytes"] / first["base_bytes"], 2)}
    for step in ("merge", "proof", "check", "convert", "gate"):
        ratios[step] = round(last[step]["peak_anonymous_mib"] / first[step]["peak_anonymous_mib"], 3)
    result = {"name": "large_model", "machine": harness.machine_line(), "memory_measure": harness.MEMORY}
    chosen.json.write_text(json.dumps({**result, "results": results, "ratios": ratios}, indent=1), encoding="utf-8")
    print(json.dumps({"name": "large_model", **ratios}))


if __name__ == "__main__":
    main()
