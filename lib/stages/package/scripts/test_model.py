"""Does the packaged model work here as it did where it was packed?   python test_model.py

Needs llama-cpp-python and numpy (requirements.txt). Checks every file's SHA-256, loads the model, answers five
prompts, compares token ids, log-probabilities and label margins with the stored ones. Exit code 0: all is well; else 1.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def said(message: str, **values: object) -> str:
    """A message with its values."""
    return message.format(**values)


def damaged_files() -> list[str]:
    """What is wrong with SHA256SUMS, and with the files that it names."""
    if not (HERE / "SHA256SUMS").is_file():
        return [said("SHA256SUMS is missing")]
    lines = (HERE / "SHA256SUMS").read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.partition("  ")[::2] for line in lines]
    there = "model_info.json" in [name for _, name in named]
    wrong = [] if there else [said("SHA256SUMS does not name model_info.json")]
    for wanted, name in named:
        path = HERE / name
        if not path.is_file():
            wrong.append(said("{name} is missing", name=name or said("a file without a name")))
            continue
        digest = hashlib.sha256()
        with path.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
        if digest.hexdigest() != wanted:
            wrong.append(said("{name} is damaged: its SHA-256 is not the one in SHA256SUMS", name=name))
    return wrong


class Model:
    """The GGUF file, asked token by token."""

    def __init__(self, info: dict) -> None:
        import llama_cpp

        longest = max(len(check["prompt_ids"]) + len(check["ids"]) for check in info["checks"])
        room = longest + max((len(label["ids"]) for label in info["labels"]), default=0) + 8
        self.api = llama_cpp
        # Flash attention, as llama.cpp's own programs choose it where they can: without it the sums round otherwise.
        self.llm = llama_cpp.Llama(str(HERE / info["file"]), n_ctx=max(256, room), flash_attn=True, verbose=False)

    def tokens(self, text: str) -> list[int]:
        """Token ids of a rendered prompt."""
        return self.llm.tokenize(text.encode("utf-8"), add_bos=False, special=True)

    def log_probs(self):
        """Log-probabilities of the next token, nats."""
        import numpy as np

        pointer = self.api.llama_get_logits_ith(self.llm.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, shape=(self.llm.n_vocab(),)).astype(np.float64)
        top = logits.max()
        return logits - top - np.log(np.exp(logits - top).sum())

    def follow(self, prompt: list[int], ids: list[int]) -> list[tuple[int, float, float]]:
        """For each id behind the prompt: the likeliest token there, its log-probability, and that of the id."""
        self.llm.reset()
        given, found = prompt, []
        for token in ids:
            self.llm.eval(given)
            values = self.log_probs()
            best = int(values.argmax())
            found.append((best, float(values[best]), float(values[token])))
            given = [token]
        return found


def allowed(info: dict, stored: float) -> float:
    """Nats by which a value may differ from the stored one: unlikely tokens feel other kernels most."""
    return info["tolerance"] + info["tolerance_share"] * abs(stored)


def compare_answer(model: Model, check: dict, info: dict) -> list[str]:
    """How the answer differs from the stored one, in words."""
    wrong = []
    steps = model.follow(check["prompt_ids"], check["ids"])
    for i, (token, stored, (best, top, own)) in enumerate(zip(check["ids"], check["log_probs"], steps, strict=True)):
        if best != token and top - own > allowed(info, stored):
            told = {"place": i, "token": best, "stored": token, "gap": top - own}
            wrong.append(said("token {place} is {token}, stored {stored}, and it is {gap:.3f} nats likelier", **told))
        if not abs(own - stored) <= allowed(info, stored):  # written so that NaN fails
            told = {"place": i, "own": own, "stored": stored}
            wrong.append(said("token {place}: log-probability {own:.3f}, stored {stored:.3f}", **told))
    return wrong


def compare_labels(model: Model, check: dict, info: dict) -> tuple[list[str], str]:
    """How the label scores differ from the stored ones, in words; the label and its margin."""
    labels, stored = info["labels"], check["labels"]
    scores = [sum(own for _, _, own in model.follow(check["prompt_ids"], label["ids"])) for label in labels]
    ranked = sorted(range(len(labels)), key=lambda k: -scores[k])
    expected = max(range(len(labels)), key=lambda k: stored[k])
    margins, kept = ([value - max(values) for value in values] for values in (scores, stored))
    gaps = [abs(own - old) for own, old in zip(margins, kept, strict=True)]
    far = [gap for gap, old in zip(gaps, kept, strict=True) if not gap <= allowed(info, old)]
    wrong = [said("label margins differ by {gap:.3f} nats", gap=max(far))] if far else []
    name, lead = labels[ranked[0]]["name"], sorted(stored)[-1] - sorted(stored)[-2]
    if ranked[0] != expected and lead > allowed(info, lead):
        wrong.append(said("label {name}, stored {stored}", name=name, stored=labels[expected]["name"]))
    return wrong, said("{name}, margin {gap:.3f} nats", name=name, gap=scores[ranked[0]] - scores[ranked[1]])


def check_prompt(model: Model, check: dict, info: dict) -> bool:
    """Answer one prompt, say what came out."""
    wrong, shown = [], ""
    if model.tokens(check["prompt"]) != check["prompt_ids"]:
        wrong.append(said("the prompt has other token ids"))
    if info["labels"]:
        differences, shown = compare_labels(model, check, info)
        wrong += differences
    wrong += compare_answer(model, check, info)
    text = shown or model.llm.detokenize(check["ids"]).decode("utf-8", "replace")
    told = f"{check['text'][:40]} → {text}"
    print(said("FAILED: {what}", what=told) if wrong else said("ok: {what}", what=told))
    for line in wrong:
        print(f"  {line}")
    return not wrong


def main() -> int:
    """All checks; the exit code."""
    wrong = damaged_files()
    for line in wrong:
        print(said("FAILED: {what}", what=line))
    if wrong:
        print(said("Unpack or download the package again."))
        return 1
    info = json.loads((HERE / "model_info.json").read_text(encoding="utf-8"))
    print(said("ok: the files have the SHA-256 of SHA256SUMS ({file} among them)", file=info["file"]))
    try:
        model = Model(info)
    except ImportError as error:
        cure = said("Install what requirements.txt names: pip install -r requirements.txt")
        print(said("FAILED: {what}", what=f"{error}. {cure}"))
        return 1
    except (ValueError, OSError) as error:
        print(said("FAILED: llama.cpp does not load {file}: {error}", file=info["file"], error=error))
        return 1
    passed = sum([check_prompt(model, check, info) for check in info["checks"]])
    told = {"passed": passed, "all": len(info["checks"])}
    told |= {"nats": info["tolerance"], "share": info["tolerance_share"]}
    print(
        said("{passed} of {all} prompts answered as stored, within {nats} nats and {share:.0%} of the value.", **told)
    )
    return 0 if passed == len(info["checks"]) else 1


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding (cp1252) shows "?", and the checks go on
    sys.exit(main())
