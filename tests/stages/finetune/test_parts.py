"""Loss at the answer tokens, row order, padding, checkpoint records, memory estimate."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.prompts.conversations import Encoded
from lib.runs.files import read_json, write_json
from lib.stages.finetune import checkpoints, memory
from lib.stages.finetune.batches import IGNORED, Collator, GroupedOrder
from lib.stages.finetune.layout import answer_loss
from lib.stages.finetune.trainer import rates, training_arguments, warm_up
from tests.stages.finetune.conftest import encoded, tiny_settings

BATCH = [encoded([5, 6, 7, 8, 9], 3), encoded([5, 6, 7], 1), encoded(list(range(10, 22)), 10)]
INPUTS = ("input_ids", "attention_mask", "labels")


@pytest.fixture
def model():
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tuned = get_peft_model(
        Qwen2ForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return tuned.train()


def test_loss_and_gradients_equal_those_of_the_model_itself(model) -> None:
    batch = Collator(0)(BATCH)
    total, count = answer_loss(model, batch)
    (total / count).backward()
    short = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    plain = model(**{key: batch[key][:, :12] for key in INPUTS}).loss  # without the common padding
    plain.backward()
    assert count == 2 + 2 + 2
    assert abs(plain.item() - total.item() / count) < 1e-4
    assert len(short) == 2 * 2 * 7
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(short[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_every_answer_of_a_conversation_counts(model) -> None:
    """Two answers in one row: the loss of the model itself over labels made by hand, no turn between counted."""
    talk = Encoded(list(range(3, 23)), [(4, 7), (12, 18)])
    batch = Collator(0)([talk, BATCH[0]])
    wanted = [i for i in range(20) if 4 <= i < 7 or 12 <= i < 18]
    assert torch.nonzero(batch["labels"][0] != IGNORED).flatten().tolist() == wanted
    assert batch["labels"][0, wanted].tolist() == [talk.ids[i] for i in wanted] and len(talk.loss) == 9
    total, count = answer_loss(model, batch)
    plain = model(**{key: batch[key][:, :20] for key in INPUTS}).loss
    assert count == 9 + 2
    assert abs(plain.item() - total.item() / count) < 1e-4


def test_padding_is_on_the_right_and_outside_mask_and_loss() -> None:
    batch = Collator(63)(BATCH)
    assert batch["input_ids"].shape == (3, 16)
    assert batch["input_ids"][1].tolist() == [5, 6, 7] + [63] * 13
    assert batch["attention_mask"].sum(1).tolist() == [5, 3, 12]
    assert batch["labels"][0].tolist() == [IGNORED] * 3 + [8, 9] + [IGNORED] * 11


@given(st.lists(st.integers(1, 300), min_size=1, max_size=300), st.integers(1, 20), st.integers(0, 5))
def test_every_row_once_in_an_order_of_seed_and_epoch(lengths: list[int], size: int, epoch: int) -> None:
    order, other = GroupedOrder(lengths, size, 7), GroupedOrder(lengths, size, 7)
    order.epoch = other.epoch = epoch
    drawn = list(order)
    assert sorted(drawn) == list(range(len(lengths)))
    assert drawn == list(other) == list(order)


def test_rows_of_an_update_are_of_like_length_and_epochs_differ() -> None:
    lengths = [(i * 7919) % 400 for i in range(1600)]
    order = GroupedOrder(lengths, 16, 0)
    first = list(order)
    spread = [
        max(lengths[i] for i in first[s : s + 16]) - min(lengths[i] for i in first[s : s + 16])
        for s in range(0, 1600, 16)
    ]
    assert sum(spread) / len(spread) < 30  # a plain shuffle gives about 350
    order.epoch = 1
    assert list(order) != first


def _checkpoint(folder, step: int, loss: float | None):
    staged = folder / checkpoints.STAGED / "new"
    staged.mkdir(parents=True)
    (staged / "weights").write_bytes(bytes([step]) * 10)
    checkpoints.publish(staged, folder / f"checkpoint-{step}", step)
    if loss is not None:
        checkpoints.add_loss(folder / f"checkpoint-{step}", loss)


def test_best_is_the_earlier_of_equals_and_pruning_keeps_it(tmp_path) -> None:
    for step, loss in ((2, 0.5), (4, 0.3), (6, 0.3), (8, 0.4), (10, 0.6), (11, None)):
        _checkpoint(tmp_path, step, loss)
    good, problems = checkpoints.find(tmp_path)
    assert [c.step for c in good] == [2, 4, 6, 8, 10, 11] and problems == []
    assert checkpoints.best(good).step == 4
    (tmp_path / "checkpoint-99").mkdir()
    checkpoints.prune(tmp_path)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-10", "checkpoint-11", "checkpoint-4"]


def test_damage_is_named(tmp_path) -> None:
    for step in (2, 4, 6, 8):
        _checkpoint(tmp_path, step, 1.0)
    (tmp_path / "checkpoint-4" / "weights").write_bytes(b"other")
    (tmp_path / "checkpoint-6" / checkpoints.RECORD).write_text("{")
    (tmp_path / "checkpoint-8" / "more").touch()
    good, problems = checkpoints.find(tmp_path)
    assert [c.step for c in good] == [2]
    assert problems == [
        "checkpoint-4 is damaged (weights)",
        f"checkpoint-6 is damaged ({checkpoints.RECORD})",
        "checkpoint-8 is damaged (more)",
    ]
    write_json(tmp_path / "checkpoint-6" / checkpoints.RECORD, ["no", "record"])
    assert len(checkpoints.find(tmp_path)[1]) == 3


def estimated(process: int = 0, length: int = 128, answer: int = 3, dtype=torch.bfloat16, shape=(), **changes) -> int:
    """Bytes for a training of the shape of Qwen2.5-0.5B; nothing is allocated."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    half_billion = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    half_billion |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
    with torch.device("meta"):
        model = Qwen2ForCausalLM(Qwen2Config(**half_billion | dict(shape))).to(dtype).requires_grad_(False)
    chosen = {"lora_r": 16, "lora_dropout": 0.0, "per_device_train_batch_size": 4, "load_in_4bit": False}
    settings = tiny_settings(**chosen | changes)
    parts = memory.estimate(memory.with_adapter(model, settings), settings, length, answer)
    return sum(parts.values()) + process


def test_memory_estimate_of_a_measured_training() -> None:
    # Measured (PERFORMANCE §5.1, Qwen2.5-0.5B shape, LoRA r16, 4 × 128 tokens, bf16): 2776 MB resident at most, of
    # which about 500 MB are Python and its libraries; float32 weights: 4749 MB.
    assert estimated(500_000_000) == pytest.approx(2776e6, rel=0.25)
    assert estimated(500_000_000, dtype=torch.float32) == pytest.approx(4749e6, rel=0.25)


def test_memory_estimate_of_measured_dialogues() -> None:
    """Two rows of 940 tokens, 706 of them in the loss, two layers of Qwen1.5-0.5B in bfloat16: 2,060 MiB measured.

    (4,037 MiB when the logits of all loss positions existed at one time.)
    """
    shape = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16}
    shape["num_key_value_heads"] = 16
    training = {"lora_r": 8, "lora_dropout": 0.05, "per_device_train_batch_size": 2}
    found = estimated(581 << 20, 940, 706, shape=shape, **training)
    assert found == pytest.approx(2060 << 20, rel=0.15)


def test_memory_estimate_falls_with_each_advice() -> None:
    base = estimated()
    assert estimated(per_device_train_batch_size=1) < base
    assert estimated(lora_r=4) < base
    assert estimated(load_in_4bit=True) < base
    assert estimated(length=64) < base
    assert estimated(gradient_checkpointing=True) < base


def test_advice_comes_in_order_and_only_when_needed() -> None:
    settings = tiny_settings(per_device_train_batch_size=4, lora_r=8)
    assert memory.advice(10, 100, settings, True) == []
    steps = memory.advice(100, 100, settings, True)
    assert [step.split(":")[0] for step in steps] == [
        *("per_device_train_batch_size", "lora_r", "load_in_4bit", "max_seq_length", "gradient_checkpointing")
    ]
    assert "gradient_accumulation_steps: 4" in steps[0]
    assert all("load_in_4bit" not in step for step in memory.advice(100, 100, settings, False))
    with pytest.raises(InputError, match="GiB"):
        memory.refuse_impossible(2**40, 2**30, steps)
    memory.refuse_impossible(2**30, 2**30, steps)


@pytest.mark.parametrize(
    "change", [{"step": 3}, {"eval_loss": 0.1}, {"eval_loss": "x"}, {"files": {}}, {"files": []}, {}]
)
def test_a_record_that_is_json_and_not_as_it_was_written_is_damage(tmp_path, change: dict) -> None:
    for step in (2, 4):
        _checkpoint(tmp_path, step, 1.0)
    (tmp_path / "checkpoint-20").write_text("a file")
    record = tmp_path / "checkpoint-4" / checkpoints.RECORD
    content = read_json(record)
    write_json(record, {**content, **change} if change else {"files": content["files"]})
    good, problems = checkpoints.find(tmp_path)
    assert [c.step for c in good] == [2] and problems == [f"checkpoint-4 is damaged ({checkpoints.RECORD})"]
    checkpoints.prune(tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir() and not record.exists()


@pytest.mark.parametrize("name", ["linear", "cosine", "inverse_sqrt", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("warm", "total"), [(1, 1), (4, 100), (0, 7), (6, 7)])
def test_a_schedule_is_that_of_transformers(name: str, warm: int, total: int) -> None:
    """Stepped as a training steps it: transformers' rates of one more step, without the first, whose rate is 0."""
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule, theirs = get_scheduler(name, optimizer, warm + 1, total + 1), []
    for _ in range(total + 1):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    found = list(map(rates(name, warm, total), range(total)))
    assert found == theirs[1:] and (theirs[0] == 0 or name == "constant") and all(found)


def test_warm_up_is_a_share_or_a_number_of_updates(tmp_path) -> None:
    asked = {0.04: 4, 0.0: 0, 0.001: 1, 0.5: 50, 7.0: 7, 1.0: 1}
    assert {share: warm_up(100, tiny_settings(warmup_steps=share)) for share in asked} == asked
    arguments = training_arguments(tmp_path, 100, tiny_settings(warmup_steps=7.0, lr_scheduler_type="linear"))
    assert arguments.get_warmup_steps(100) == 7 and arguments.lr_scheduler_type == "linear"
    assert arguments.dataloader_pin_memory is (arguments.device.type == "cuda")


def test_the_rate_rises_to_the_peak_and_falls_and_is_never_zero() -> None:
    for warm, total in ((1, 1), (1, 2), (4, 100), (0, 3)):
        found = list(map(rates("cosine", warm, total), range(total)))
        assert all(0 < share <= 1 for share in found)
        assert found[: warm + 1] == sorted(found[: warm + 1]) and found[warm:] == sorted(found[warm:], reverse=True)
        assert warm >= total or found[warm] == 1
    assert rates("cosine", 1, 9)(9) == pytest.approx(0) and rates("cosine", 4, 100)(0) == pytest.approx(0.2)
