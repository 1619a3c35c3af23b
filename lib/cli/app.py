"""The commands and their options; the work itself is imported only when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lib.cli import package, quantize, select
from lib.cli.console import (
    Data,
    GpuLayers,
    Json,
    LabelColumn,
    LabelNames,
    MaxLength,
    MaxSamples,
    RunName,
    SystemPrompt,
    TextColumn,
    Threads,
    UserPrompt,
    guarded,
)

app = typer.Typer(
    name="workbook",
    help="From data to a quantized model for the phone, with the evidence for every step.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command(short_help="what this machine can run, and the cure for every lack")
@guarded
def doctor(
    params_file: Annotated[
        Path | None, typer.Argument(help="recommend a way to train this parameter file", metavar="[PARAMS.yaml]")
    ] = None,
    model: Annotated[str | None, typer.Option(help="model folder in place of base_model", metavar="DIR")] = None,
    parameters: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="KEY VALUE", help="replace one key")
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine can run, with cures; with PARAMS.yaml or --model: which way of training fits it."""
    from lib.cli import doctor as cli_doctor

    if params_file or model:
        cli_doctor.tell_strategy(params_file, model, parameters or [], as_json)
    elif not cli_doctor.tell(as_json):
        raise typer.Exit(2)


@app.command(short_help="every key of a parameter file")
@guarded
def params(as_json: Json = False) -> None:
    """Every key of a parameter file: type, default, meaning."""
    from lib.cli.console import show
    from lib.cli.report import as_text, keys

    found = keys()
    show({"parameters": found}, as_json, as_text(found))


@app.command(short_help="what a model folder, adapter or GGUF file is, and what it lacks")
@guarded
def inspect(
    path: Annotated[str, typer.Argument(help="model folder, adapter folder or .gguf file", metavar="PATH")],
    as_json: Json = False,
) -> None:
    """Describe a model, an adapter or a GGUF file without loading it; exit code 2 if it cannot be used."""
    from lib.cli import inspect as cli_inspect

    if not cli_inspect.inspect(path, as_json):
        raise typer.Exit(2)


@app.command(short_help="run the seven notebooks, publish the pages")
@guarded
def report(
    params_file: Annotated[Path, typer.Argument(help="parameter file", metavar="PARAMS.yaml")],
    parameters: Annotated[
        list[str] | None,
        typer.Option("-p", "--parameter", metavar="KEY VALUE", help="replace one key; may be repeated"),
    ] = None,
    start_from: Annotated[str | None, typer.Option("--from", metavar="NN", help="first notebook, e.g. 04")] = None,
    end_at: Annotated[str | None, typer.Option("--to", metavar="NN", help="last notebook, e.g. 03")] = None,
    seeds: Annotated[int, typer.Option(help="train this many runs that differ in train_seed alone", min=1)] = 1,
    fast: Annotated[bool, typer.Option("--fast", help="fewer rows and tokens, as run RUN-fast: a first look")] = False,
    timeout: Annotated[float, typer.Option(help="seconds that one notebook may take", min=1)] = 86400.0,
    as_json: Json = False,
) -> None:
    """Run the seven notebooks with a parameter file and publish reports/<run>/index.html."""
    from lib.cli import report as cli_report

    cli_report.report(params_file, parameters or [], start_from, end_at, seeds, fast, timeout, as_json)


select.register(app)


@app.command(short_help="GGUF file → model folder")
@guarded
def unpack(
    file: Annotated[Path, typer.Argument(help="GGUF file of a Qwen2, Qwen3 or Llama model", metavar="FILE.gguf")],
    folder: Annotated[Path, typer.Argument(help="new model folder", metavar="FOLDER")],
    dtype: Annotated[str, typer.Option(help="auto (float16 where they fit), float16, bfloat16 or float32")] = "auto",
    off_grid: Annotated[
        bool, typer.Option("--off-grid", help="rescale channels: same function, weights off the grid of their type")
    ] = False,
    as_json: Json = False,
) -> None:
    """Turn a GGUF file into a model folder: weights dequantized, configuration and tokenizer rebuilt."""
    from lib.cli import inspect as cli_inspect

    cli_inspect.unpack(file, folder, dtype, off_grid, as_json)


@app.command(short_help="adapter + base model → one model folder")
@guarded
def merge(
    base_model: Annotated[str, typer.Option(help="folder, .gguf file or id of the base model", metavar="DIR")],
    adapter: Annotated[str, typer.Option(help="folder, hub or ModelScope id of the LoRA adapter", metavar="DIR")],
    output_dir: Annotated[Path, typer.Option(help="new folder of the merged model", metavar="DIR")],
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16 [default: as the base]")] = None,
    revision: Annotated[str, typer.Option(help="commit, branch or tag of a hub id")] = "main",
    gguf: Annotated[
        Path | None, typer.Option(help="also convert, in the same pass over the weights", metavar="OUT.gguf")
    ] = None,
    outtype: Annotated[str, typer.Option(help="of the GGUF: f16, bf16, f32 or q8_0")] = "f16",
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base model; with --gguf convert the result at the same time."""
    from lib.cli import work

    work.merge(base_model, adapter, output_dir, dtype, revision, gguf, outtype, as_json)


@app.command(short_help="model folder → GGUF")
@guarded
def convert(
    model_dir: Annotated[Path, typer.Argument(help="folder of a full model", metavar="MODEL_DIR")],
    output: Annotated[Path, typer.Argument(help="new GGUF file", metavar="OUT.gguf")],
    outtype: Annotated[str, typer.Option(help="f16, bf16, f32 or q8_0")] = "f16",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="checkout whose official script converts instead", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Convert a model folder (Qwen2, Qwen3 or Llama family) to one GGUF file."""
    from lib.cli import work

    work.convert(model_dir, output, outtype, llama_cpp, as_json)


quantize.register(app)


@app.command(short_help="models on labelled rows")
@guarded
def evaluate(
    models: Annotated[
        list[str], typer.Argument(help="hub id, folder (quantized ones too) or .gguf file", metavar="MODEL")
    ],
    data: Data = None,
    run_name: RunName = None,
    max_samples: MaxSamples = 0,
    n_gpu_layers: GpuLayers = 0,
    n_threads: Threads = 0,
    output: Annotated[Path | None, typer.Option(help="also write the JSON there", metavar="FILE.json")] = None,
    base_model: Annotated[str | None, typer.Option(help="base of an adapter [default: as it names it]")] = None,
    revision: Annotated[str, typer.Option(help="commit, branch or tag of a hub id")] = "main",
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16")] = "auto",
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="NF4 (bitsandbytes)")] = False,
    batch_size: Annotated[int, typer.Option(help="rows scored together", min=1)] = 32,
    text_column: TextColumn = "",
    label_column: LabelColumn = "",
    label_names: LabelNames = None,
    system_prompt: SystemPrompt = None,
    user_prompt: UserPrompt = None,
    max_seq_length: MaxLength = None,
    as_json: Json = False,
) -> None:
    """Accuracy (without labels: answer perplexity), interval, speed and memory of models on the same rows."""
    from lib.cli import work

    given = _given(label_names, system_prompt, user_prompt, max_seq_length)
    rows = work.Rows(data, run_name, max_samples, text_column, label_column, given)
    options: dict[str, Any] = {
        "base_model": base_model,
        "revision": revision,
        "dtype": dtype,
        "load_in_4bit": load_in_4bit,
        "batch_size": batch_size,
        "n_threads": n_threads,
        "n_gpu_layers": n_gpu_layers,
    }
    work.evaluate(models, rows, options, output, as_json)


@app.command(short_help="quantized files and folders against their reference")
@guarded
def compare(
    reference: Annotated[Path, typer.Argument(help="the unquantized file", metavar="REFERENCE.gguf")],
    others: Annotated[list[Path], typer.Argument(help="quantized .gguf files, or exported folders", metavar="OTHER")],
    output: Annotated[Path, typer.Option(help="folder for comparison.json and the scores", metavar="DIR")],
    data: Data = None,
    run_name: RunName = None,
    max_samples: MaxSamples = 0,
    equivalence_margin: Annotated[
        float, typer.Option(help="accuracy points that count as equivalent", min=0.01, max=50)
    ] = 1.0,
    perplexity_margin: Annotated[
        float, typer.Option(help="percent of answer perplexity that count as equivalent, without labels", min=0.01)
    ] = 1.0,
    n_gpu_layers: GpuLayers = 0,
    n_threads: Threads = 0,
    text_column: TextColumn = "",
    label_column: LabelColumn = "",
    label_names: LabelNames = None,
    system_prompt: SystemPrompt = None,
    user_prompt: UserPrompt = None,
    max_seq_length: MaxLength = None,
    device: Annotated[
        list[Path] | None, typer.Option(help="result of a phone page on one of the files", metavar="FILE.json")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantized files and folders against their reference: accuracy, flips, divergence, perplexity, speed, verdict."""
    from lib.cli import work

    given = _given(label_names, system_prompt, user_prompt, max_seq_length)
    rows = work.Rows(data, run_name, max_samples, text_column, label_column, given)
    options: dict[str, Any] = {"equivalence_margin": equivalence_margin, "perplexity_margin": perplexity_margin}
    options |= {"n_gpu_layers": n_gpu_layers, "n_threads": n_threads}
    work.compare(reference, others, rows, output, options, device or [], as_json)


@app.command(short_help="perplexity and KL divergence on a text, as llama-perplexity")
@guarded
def perplexity(
    model: Annotated[str, typer.Argument(help=".gguf file or model folder (quantized ones too)", metavar="MODEL")],
    text: Annotated[
        Path, typer.Option(help="plain text (documents end at blank lines), or CSV, TSV, JSON, JSONL, Parquet")
    ],
    reference: Annotated[
        str | None, typer.Option(help=".gguf file or model folder to compare with", metavar="REF")
    ] = None,
    n_ctx: Annotated[int, typer.Option(help="tokens a window", min=16)] = 512,
    chunks: Annotated[int, typer.Option(help="most windows; 0 = the whole text", min=0)] = 0,
    text_column: TextColumn = "",
    n_gpu_layers: GpuLayers = 0,
    n_threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Perplexity on a text; with --reference the table of llama-perplexity --kl-divergence, and intervals."""
    from lib.cli import perplexity as cli_perplexity

    options = {"n_ctx": n_ctx, "chunks": chunks, "n_threads": n_threads, "n_gpu_layers": n_gpu_layers}
    cli_perplexity.perplexity(model, text, reference, text_column, options, as_json)


def _given(
    label_names: str | None, system_prompt: str | None, user_prompt: str | None, max_seq_length: int | None
) -> dict[str, Any]:
    """The task options that were given, as settings."""
    names = [name.strip() for name in label_names.split(",")] if label_names is not None else None
    values = {
        "label_names": names,
        "system_prompt": system_prompt,
        "user_prompt": user_prompt,
        "max_seq_length": max_seq_length,
    }
    return {key: value for key, value in values.items() if value is not None}


package.register(app)
