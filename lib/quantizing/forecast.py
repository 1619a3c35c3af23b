"""What the sensitivities of a run's tensors predict of every file of its ladder."""

from __future__ import annotations

from lib.errors import InputError
from lib.quantizing.budget import TEXT
from lib.quantizing.errormap import SUMMARY as ERRORS
from lib.quantizing.sensitivity import RECORD
from lib.run import Run
from lib.run.files import read_json


def predictions(run: Run, loss: str = TEXT) -> dict[str, float]:
    """{file of the product `quantized`: KL divergence from the source that its types predict, nats a token}.

    Args:
        loss: "kld" of text, or "answer_kld" of a position that predicts a token of an answer.

    The sum over its tensors, as for the file under a size budget; 0 for a file that rounds nothing. From products
    alone: `sensitivity` (losses) and `tensor_errors` (types). Empty where these files were made without sensitivities;
    a file with a type that was not tried is left out.

    Raises:
        InputError: a missing or damaged product, or one that was made for other files.
    """
    quantized = run.require("quantized")
    if "sensitivity" not in quantized.entry.inputs:
        return {}
    measured, errors = run.require("sensitivity"), run.require("tensor_errors")
    same = quantized.entry.inputs["sensitivity"] == measured.entry.digest
    if not same or errors.entry.inputs["quantized"] != quantized.entry.digest:
        found = f"run {run.name!r} holds sensitivities or errors of other files than those in quantized/."
        raise InputError(found, "products of one run of 06.", "run notebooks/06_quantize.ipynb again.")
    tensors = read_json(measured.path / RECORD)["tensors"]
    losses = {(t["tensor"], kind["type"]): kind.get(loss) for t in tensors for kind in t["types"]}
    tried = {t["tensor"] for t in tensors}  # the others are in F16 in every file
    types = read_json(errors.path / ERRORS)["files"]
    found = {}
    for row in read_json(quantized.path / "quantized.json")["files"]:
        parts = [losses.get((t["tensor"], t["type"])) for t in types[row["type"]] if t["tensor"] in tried]
        if None not in parts:
            found[row["file"]] = sum(parts)
    return found
