"""How to use the packaged model.   python usage_examples.py [chat|stream|labels|transformers|onnx|mnn]   (default: all)

Needs llama-cpp-python (requirements.txt); the last three need folders of the export tree and their packages.
"""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def said(message: str, **values: object) -> str:
    """A message with its values."""
    return message.format(**values)


def read_info() -> dict:
    """What the package says of its model."""
    try:
        return json.loads((HERE / "model_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        again = said("Unpack or download the package again.")
        sys.exit(said("model_info.json cannot be read ({error}). {again}", error=error, again=again))


INFO = read_info()


def messages_for(text: str) -> list[dict]:
    """The two turns that the model was trained on."""
    user = INFO["user"].replace("{text}", text)
    return [{"role": "system", "content": INFO["system"]}, {"role": "user", "content": user}]


def prompt_for(messages: list[dict]) -> str:
    """The prompt exactly as in training. Names of special tokens in a text are made harmless by a space."""
    turns, text = INFO["turns"], INFO["turns"]["begin"]
    for message in messages:
        content = message["content"]
        for token in INFO["special_tokens"]:
            content = content.replace(token, token[:1] + " " + token[1:])
        text += turns["opening"][message["role"]] + content + turns["closing"][message["role"]]
    return text + turns["answer"]


def load():
    """The model in llama.cpp."""
    from llama_cpp import Llama

    return Llama(str(HERE / INFO["file"]), n_ctx=INFO["n_ctx"], flash_attn=True, verbose=False)


def ids_for(llm, text: str) -> list[int]:
    """Token ids of a text of the user."""
    return llm.tokenize(prompt_for(messages_for(text)).encode("utf-8"), add_bos=False, special=True)


def chat(llm, text: str) -> str:
    """One whole answer."""
    answer = llm.create_completion(ids_for(llm, text), max_tokens=INFO["max_tokens"], temperature=0, stop=INFO["stops"])
    return answer["choices"][0]["text"]


def stream(llm, text: str):
    """The answer, piece by piece while it is written."""
    options = {"max_tokens": INFO["max_tokens"], "temperature": 0, "stop": INFO["stops"], "stream": True}
    for piece in llm.create_completion(ids_for(llm, text), **options):
        yield piece["choices"][0]["text"]


def labels(llm, text: str) -> dict[str, float]:
    """The probability of each label, given that the answer is one of them: better than reading a written answer."""
    import llama_cpp
    import numpy as np

    prompt, scores = ids_for(llm, text), []
    for label in INFO["labels"]:
        llm.reset()
        given, score = prompt, 0.0
        for token in label["ids"]:
            llm.eval(given)
            pointer = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
            logits = np.ctypeslib.as_array(pointer, shape=(llm.n_vocab(),)).astype(np.float64)
            score += float(logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum()))
            given = [token]
        scores.append(score)
    llm.reset()
    weights = [math.exp(score - max(scores)) for score in scores]
    return {label["name"]: weight / sum(weights) for label, weight in zip(INFO["labels"], weights, strict=True)}


CHATTER = {
    "torchao": "Failed to load ",
    "torch.utils._pytree": "%s is an Enum subclass",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
}
"""Logger → beginning of what it says at every start and is no fault: kernels of other machines, how INT8 computes."""


def transformers(folder: Path, text: str) -> str:
    """An answer of one of the exported folders (16 bit, bitsandbytes or GPTQ; the folder knows which it is)."""
    for name, start in CHATTER.items():
        logging.getLogger(name).addFilter(lambda record, start=start: not str(record.msg).startswith(start))
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(prompt_for(messages_for(text)), add_special_tokens=False, return_tensors="pt")
    written = model.generate(**prompt.to(model.device), max_new_tokens=INFO["max_tokens"], do_sample=False)
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def onnx_runtime(folder: Path, text: str) -> str:
    """An answer of the folder for ONNX Runtime GenAI."""
    import onnxruntime_genai as genai
    from transformers import AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), genai.Model(str(folder))
    prompt = tokenizer(prompt_for(messages_for(text)), add_special_tokens=False)["input_ids"]
    most = json.loads((folder / "genai_config.json").read_text())["model"]["context_length"]
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=min(len(prompt) + INFO["max_tokens"], most), do_sample=False)
    written = genai.Generator(model, settings)
    written.append_tokens(prompt)
    while not written.is_done():
        written.generate_next_token()
    return tokenizer.decode(written.get_sequence(0)[len(prompt) :], skip_special_tokens=True)


def mnn(folder: Path, text: str) -> str:
    """An answer of the folder for MNN."""
    import MNN.llm

    model = MNN.llm.create(str(folder / "config.json"))
    model.set_config({"use_template": False, "sampler_type": "greedy", "max_new_tokens": INFO["max_tokens"]})
    model.load()
    return model.response(prompt_for(messages_for(text)))


def show_llama(wanted: str | None) -> None:
    """The examples with llama.cpp."""
    llm, text = load(), INFO["examples"][0]
    print(said("question: {text}", text=text))
    if wanted in (None, "chat"):
        print(said("chat: {text}", text=chat(llm, text)))
    if wanted in (None, "stream"):
        print(said("stream: "), end="")
        for piece in stream(llm, text):
            print(piece, end="", flush=True)
        print()
    if wanted in (None, "labels") and INFO["labels"]:
        for example in INFO["examples"]:
            scores = ", ".join(f"{name} {share:.1%}" for name, share in labels(llm, example).items())
            print(said("labels: {text} → {scores}", text=example, scores=scores))


def main() -> int:
    """Run the asked example, or all."""
    programs = {"transformers": transformers, "onnx": onnx_runtime, "mnn": mnn}
    kinds = {name: name if name in programs else "transformers" for name in INFO["folders"]}
    folders = {kind: [name for name in kinds if kinds[name] == kind] for kind in programs}
    known = ["chat", "stream", *(["labels"] if INFO["labels"] else []), *(kind for kind in programs if folders[kind])]
    wanted = sys.argv[1] if len(sys.argv) > 1 else None
    if wanted is not None and wanted not in known:
        names = {"known": ", ".join(known), "wanted": wanted}
        print(said("this package has the examples {known}, not {wanted!r}", **names))
        return 1
    if wanted not in programs:
        show_llama(wanted)
    for kind, names in folders.items():
        for name in names if wanted in (None, kind) else ():
            print(f"{kind}, {name}/:", programs[kind](HERE / name, INFO["examples"][0]))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal of another encoding (cp1252) shows "?", and goes on
    sys.exit(main())
