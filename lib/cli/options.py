"""Options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Data = Annotated[
    str | None, typer.Option(help="labelled rows: CSV, TSV, JSON, JSONL, Parquet; or a folder", metavar="FILE")
]
RunName = Annotated[str | None, typer.Option("--run", help="take task and, without --data, test rows of a run")]
MaxSamples = Annotated[int, typer.Option(help="most rows, drawn with seed 42; 0 = all", min=0)]
GpuLayers = Annotated[int, typer.Option(help="layers of a .gguf on the GPU; -1 = all", min=-1)]
Threads = Annotated[int, typer.Option(help="CPU threads of llama.cpp; 0 = physical cores", min=0)]
TextColumn = Annotated[str, typer.Option(help="column with the text; empty = find it")]
LabelColumn = Annotated[str, typer.Option(help="column with the label; empty = find it")]
LabelNames = Annotated[str | None, typer.Option(help="answer words of label 0,1,… joined by commas")]
SystemPrompt = Annotated[str | None, typer.Option(help="system turn")]
UserPrompt = Annotated[str | None, typer.Option(help="user turn; {text} is the row's text")]
MaxLength = Annotated[int | None, typer.Option(help="tokens of prompt and answer together")]
