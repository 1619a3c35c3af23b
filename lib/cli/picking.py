"""`workbook pick`: the limits against the comparison of a finished run."""

from __future__ import annotations

from lib.cli.output import show, table


def pick(run_name: str, max_mb: float | None, max_loss: float, as_json: bool) -> None:
    """Print the file to ship, or why there is none.

    Raises:
        InputError: no such run, no comparison in it, limits that cannot be.
    """
    from lib.comparison import picking
    from lib.run import known_run
    from lib.run.files import read_json

    product = known_run(run_name).require("comparison")
    answer = picking.pick(read_json(product.path / "comparison.json"), max_mb, max_loss)
    rows = [
        {
            "type": c["type"],
            "MB": round(c["megabytes"], 3),
            "loss": round(c["loss"], 3) + 0.0,
            "95 % interval": "–" if None in c["interval"] else [round(limit, 3) + 0.0 for limit in c["interval"]],
            "fits": "yes" if c["fits"] else "no",
            "evidence": c["evidence"] + (" (worse on leak-free rows)" if c["leak_free"] else ""),
        }
        for c in answer["candidates"]
    ]
    head = f"loss in {answer['limits']['unit']}, at most {max_loss:g}\n"
    show(answer, as_json, f"{head}{table(rows, list(rows[0]))}\n\n{answer['text']}\nRule: {answer['rule']}")
