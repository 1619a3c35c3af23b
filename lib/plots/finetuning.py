"""What page 02 shows of a FinetuneResult, whether it was trained in this run or adopted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lib.device import physical_cores
from lib.plots import charts, rows
from lib.plots import resources as machine
from lib.plots.display import key_values, say, table

if TYPE_CHECKING:
    from IPython.display import HTML, Markdown


def card(result: Any) -> HTML:
    """What the adapter is and how it came about."""
    if not result.adopted:
        return key_values(rows.training_card(result), "What was trained, and how")
    given = result.adopted
    values = {
        "trained here": "no: the adapter was adopted",
        "adapter": f"{given['id']} ({str(given['revision'])[:23]})",
        "its own base model": given["base"] or "not named",
        "base model of this run": f"{result.base['id']} ({str(result.base['revision'])[:12]})",
        "method": result.method,
        "base in its training": given.get("trained_on", "not known"),
        "changed modules": given["targets"],
        "weights": f"{result.trainable:,} of {result.total:,} ({100 * result.trainable_share:.2f} %), {result.dtype}",
        "checked": "every tensor has its place and shape in the base model; no NaN, no infinity; safetensors",
    }
    return key_values(values, "What was adopted (nothing was trained in this run)")


def memory(result: Any) -> HTML | Markdown:
    """Estimated and measured memory of the training."""
    if result.adopted:
        return say("**Nothing was trained here**, so there is no memory to estimate.")
    caption = "Estimated need by purpose, memory that was free, and the measured peak (MiB = 2²⁰ bytes)."
    return table(rows.memory(result), caption)


def advice(result: Any) -> Markdown:
    """What to change when memory is scarce."""
    if result.adopted:
        return say("To train instead, leave the parameter `adapter` empty.")
    return say("\n".join(f"- {line}" for line in result.advice) or "Memory was not scarce: no advice is needed.")


def curves(result: Any) -> HTML | Markdown:
    """Losses and learning rate over the updates."""
    if result.adopted:
        return say("An adopted adapter brings no history: its losses are not known here.")
    return charts.learning_curves(result.history, result.chosen_step)


def chosen(result: Any) -> Markdown:
    """Which checkpoint is kept, and whether more training would help."""
    if result.adopted:
        return say(f"The adapter is taken as it came: {result.trainable:,} weights, {result.adopted['revision']}.")
    losses = _validation(result)
    best, last = losses[result.chosen_step], max(losses)
    then = (
        f"; training on to update {last} raised it to {losses[last]:.4f}."
        if last != result.chosen_step
        else ", and the last one: more updates might lower it further."
    )
    return say(
        f"The checkpoint after update **{result.chosen_step} of {result.steps}** is kept: its validation loss of "
        f"{best:.4f} nats a loss token is the lowest of {len(losses)}{then}"
    )


def speed(result: Any) -> Markdown:
    """Tokens a second and the time of the whole stage."""
    seconds = result.product.entry.seconds
    if result.adopted:
        return say(f"Checking and copying the adapter took {seconds:.1f} s.")
    return say(
        f"{result.throughput:,.0f} non-padding tokens a second (median); the whole stage, with the base model and "
        f"{len(_validation(result))} validation passes, took {seconds:.0f} s. Details, update by update, are in "
        f"`training.log`."
    )


def resources(result: Any) -> HTML | Markdown:
    """Processor, GPU and memory over time."""
    if result.adopted:
        return say("Nothing was trained here, so nothing was measured.")
    return machine.resources(result.samples, result.product.entry.facts.get("resources", {}), physical_cores())


def learned(result: Any) -> Markdown:
    """The conclusions of the page."""
    if result.adopted:
        return say(
            f"- Nothing was trained in this run: {result.adopted['id']} was adopted ({result.method}).\n"
            f"- It fits the base model and holds {100 * result.trainable_share:.2f} % of all weights.\n"
            f"- Its training rows are not known. If it has seen the test rows, the accuracies of this run are too "
            f"high; the leak audit of 01 compares only with this run's own training rows."
        )
    losses = _validation(result)
    first = min(losses)
    return say(
        f"- {100 * result.trainable_share:.2f} % of the weights were trained ({result.method}).\n"
        f"- Validation loss went from {losses[first]:.3f} (update {first}) to {losses[result.chosen_step]:.3f} nats a "
        f"loss token.\n"
        f"- A low loss is not yet a good answer: that is measured next, on rows that were never trained on."
    )


def _validation(result: Any) -> dict[int, float]:
    """Validation loss by update."""
    return {row["step"]: row["eval_loss"] for row in result.history if "eval_loss" in row}
