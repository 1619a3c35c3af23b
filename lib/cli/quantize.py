"""`workbook quantize`: by recipes, and under a size budget by the sensitivity of every tensor; `workbook imatrix`."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.cli.console import replacing, show, table
from lib.cli.models import UNQUANTIZED, kind_of_gguf
from lib.errors import InputError, refusal
from lib.progress import say
from lib.runs.files import user_path
from lib.runs.machine import has_module

if TYPE_CHECKING:
    from lib.stages.quantize.files import Options
    from lib.stages.quantize.size_budget import Budget


@dataclass(frozen=True)
class BudgetOptions:
    """Options of a file under a size budget."""

    size_budget_mb: float | None = None
    bits_per_weight: float | None = None
    model: Path | None = None
    text: Path | None = None
    text_column: str = ""
    data: Path | None = None
    answer_weight: float = 0.5
    n_ctx: int = 512

    def budget(self, source: Path) -> Budget | None:
        """What they say for a source.

        Raises:
            InputError: two budgets; one of the three options without the others; a text and the rows of a run.
        """
        if self.size_budget_mb is not None and self.bits_per_weight is not None:
            raise refusal("cli/two-budgets")
        budget = "size_budget_mb" if self.bits_per_weight is None else "bits_per_weight"
        if self.text is not None and self.data is not None:
            raise InputError("--text and --data.", "one of the two: what gradients are of.", "leave one out.")
        needed = (budget, "model", "text" if self.data is None else "data")
        given = {f"--{name.replace('_', '-')}": getattr(self, name) for name in needed}
        lacking = [name for name, value in given.items() if value is None]
        heeded = {"text_column": ("--text", self.text), "answer_weight": ("--data", self.data)}
        heeded["n_ctx"] = ("--text or --data", self.text or self.data)
        for name, (place, there) in heeded.items():
            if there is None and getattr(self, name) != _DEFAULT[name]:
                option = f"--{name.replace('_', '-')}"
                raise InputError(f"{option} without {place}.", "a size budget that is measured there.", "leave it out.")
        if len(lacking) == 3:
            return None
        if lacking or self.model is None:
            raise refusal(
                "cli/budget-in-part", given=" and ".join(set(given) - set(lacking)), lacking=" and ".join(lacking)
            )
        from lib.cli.perplexity import read_text
        from lib.models.gguf_file import check_model_gguf
        from lib.stages.quantize.size_budget import Budget, budget_bytes

        check_model_gguf(source)
        most = budget_bytes(source, self.size_budget_mb or 0.0, self.bits_per_weight or 0.0)
        if self.data is not None:
            rows = user_path(str(self.data))
            return Budget(most, self.model, n_ctx=self.n_ctx, data=rows, answer_weight=self.answer_weight)
        assert self.text is not None
        text = read_text(self.text, self.text_column, "train")
        return Budget(most, self.model, text, user_path(str(self.text)), self.n_ctx)


_DEFAULT = vars(BudgetOptions())


def quantize(
    source: Path,
    output: Path,
    types: list[str] | None = None,
    imatrix: Path | None = None,
    under_budget: BudgetOptions = BudgetOptions(),
    tensor_type: list[str] | None = None,
    output_tensor_type: str = "",
    token_embedding_type: str = "",
    n_threads: int = 0,
    dry_run: bool = False,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Quantize a GGUF file with llama.cpp: to types, or under a size budget with types chosen by measurement."""
    from lib.stages.quantize.files import Options

    options = Options(imatrix, tuple(tensor_type or ()), output_tensor_type, token_embedding_type)
    wanted = types or []
    if not wanted and options.any_types():
        raise refusal("cli/types-without-type")
    budget = under_budget.budget(source)
    if not wanted and budget is None:
        raise refusal("cli/no-type")
    if dry_run:
        rows = _predict(source, wanted, options, budget, n_threads)
        show({"files": rows}, as_json, _as_text(rows))
        return
    rows = _make(source, output, wanted, options, budget, n_threads, force)
    single = len(rows) == 1 and not output.is_dir()
    show(rows[0] if single else {"files": rows}, as_json, _as_text(rows))


def imatrix(
    model_dir: Path,
    output: Path,
    text: Path,
    text_column: str = "",
    n_ctx: int = 512,
    chunks: int = 64,
    force: bool = False,
    as_json: bool = False,
) -> None:
    """Measure which inputs of every layer are large on a text: what llama-imatrix measures, for --imatrix."""
    from lib.cli.perplexity import read_text
    from lib.stages.quantize.calibration import measure_imatrix

    content = read_text(text, text_column, "train")
    replacing(output, force, lambda path: kind_of_gguf(path) == "imatrix")
    made = measure_imatrix(model_dir, output, content, user_path(str(text)), n_ctx, chunks)
    rows = "" if made["rows"] is None else f" of {made['rows']:,} rows"
    words = f"{output}: {made['entries']} layers, {made['tokens']:,} tokens{rows}; {made['dataset']}"
    show(made, as_json, words)


def _predict(
    source: Path, types: list[str], options: Options, budget: Budget | None, n_threads: int
) -> list[dict[str, Any]]:
    """What the files would be; nothing is written. Without llama.cpp sizes of plain types are told roughly."""
    from lib.stages.quantize.files import predict_sizes
    from lib.stages.quantize.size_budget import mix_for_budget

    if budget is None and options == type(options)() and not has_module("llama_cpp"):
        return _about(source, types)
    rows = predict_sizes(source, types, options) if types else []
    if budget is None:
        return rows
    with tempfile.TemporaryDirectory() as scratch:
        return [*rows, mix_for_budget(source, budget, options.imatrix, Path(scratch), n_threads).prediction]


def _about(source: Path, types: list[str]) -> list[dict[str, Any]]:
    """Sizes within a tenth, from the header alone: where llama.cpp, which knows them exactly, is not installed."""
    from lib.models.gguf_file import read_tensors
    from lib.stages.export.sizes import about_gguf
    from lib.stages.quantize.files import file_type

    for name in types:
        file_type(name)
    tensors = read_tensors(source)
    shapes, weights = {tensor.name: tensor.shape for tensor in tensors}, sum(tensor.size for tensor in tensors)
    say("sizes are rough: llama.cpp, which tells them exactly, is not installed (extra gguf)")
    sizes = {name: about_gguf(shapes, name) for name in types}
    return [
        {
            "type": n,
            "bytes": size,
            "bits_per_weight": 8 * size / weights,
            "fallbacks": [],
            "set_by_hand": [],
            "about": True,
        }
        for n, size in sizes.items()
    ]


def _make(
    source: Path, output: Path, types: list[str], options: Options, budget: Budget | None, n_threads: int, force: bool
) -> list[dict[str, Any]]:
    """Write the files; their reports."""
    from lib.settings import mix_name
    from lib.stages.quantize.files import make_files, output_path, plan_files
    from lib.stages.quantize.size_budget import mix_for_budget

    count = len(types) + (budget is not None)
    if output.suffix not in ("", ".gguf") and not output.is_dir():
        raise refusal("cli/no-file-name", output=output, name=output.with_suffix(".gguf"))
    if count > 1 and output.suffix == ".gguf" and not output.is_dir():
        raise refusal("cli/one-file-for-several", output=output, count=count)
    beside = [mix_name(budget.bytes)] if budget else []
    planned = plan_files(source, output, types, options, beside)
    for name in (*types, *beside):
        own = partial(_is_quantized, plain=name.upper() in ("F32", "F16", "BF16"))
        replacing(output_path(source, output, name), force, own)
    if budget:
        scratch = output.parent if output.suffix == ".gguf" and not output.is_dir() else output
        planned.append(mix_for_budget(source, budget, options.imatrix, scratch, n_threads))
    return [asdict(report) for report in make_files(source, output, planned, n_threads)]


def _is_quantized(path: Path, plain: bool) -> bool:
    """Whether a file may be one that this command made; `plain`: a type that is none was asked for."""
    kind = kind_of_gguf(path)
    return isinstance(kind, int) and (plain or kind not in UNQUANTIZED)


def _as_text(rows: list[dict[str, Any]]) -> str:
    """A table, and what its columns leave open."""
    from lib.report.sentences import sentence

    columns = ["type", "bytes", "bits_per_weight", "fallbacks", "set_by_hand"]
    columns += [name for name in ("imatrix", "seconds", "peak_memory_mib", "file") if name in rows[0]]
    counted = [{**r, "fallbacks": len(r["fallbacks"]), "set_by_hand": len(r["set_by_hand"])} for r in rows]
    lines = [table(counted, columns)]
    if any(row["fallbacks"] for row in rows):
        lines.append("fallbacks: tensors of another type than the recipe wants, whose rows do not fill its blocks")
    lines += [sentence("quantize.mix_in_words", row=row, mix=row["mix"]) for row in rows if row.get("mix")]
    return "\n".join(lines)
