"""The guide's commands for llama.cpp, with the prompt of the training, quoted for a POSIX shell.
deployment_guide.md: how the packaged file is run on phones and desktops, with the numbers of the run.
"""

from __future__ import annotations

import json
import shlex
from importlib import metadata

from lib.stages.package.facts import Facts
from lib.stages.package.self_test import QUESTIONS, REVIEWS

# The guide's commands for llama.cpp, with the prompt of the training, quoted for a POSIX shell.
#
# Options as in common/arg.cpp of the llama.cpp that llama-cpp-python 0.3.36 is built from: `-sys` is one of llama-cli
# alone (the server takes the system turn from each request), `--reasoning on|off` one of both, and of the texts only
# that of `-p` has its escapes processed.

ADDRESS = "http://127.0.0.1:8080"


def example_turn(facts: Facts) -> str:
    """A whole user turn: one of the project's own sentences in the wording of the training."""
    return facts.task.user_prompt.replace("{text}", (REVIEWS if facts.task.label_names else QUESTIONS)[0])


def chat_command(program: str, path: str, facts: Facts) -> str:
    """llama-cli as a chat that begins with the trained system turn."""
    system = facts.task.system_prompt
    options = f" \\\n  -sys {shlex.quote(system)}" if system else ""
    return f"{program} -m {path} -c {facts.n_ctx} -n {facts.most} --temp 0{switch(facts)}{options}"


def question_command(program: str, path: str, facts: Facts) -> str:
    """llama-cli with one question, answered once."""
    turn = example_turn(facts)
    raw = " --no-escape" if "\\" in turn else ""
    return f"{chat_command(program, path, facts)} \\\n  -st{raw} -p {shlex.quote(turn)}"


def request_command(facts: Facts) -> str:
    """The same question for a server."""
    turns = (("system", facts.task.system_prompt), ("user", example_turn(facts)))
    messages = [{"role": role, "content": content} for role, content in turns]
    body = json.dumps({"messages": messages, "temperature": 0, "max_tokens": facts.most}, ensure_ascii=False)
    head = f"curl {ADDRESS}/v1/chat/completions -H 'Content-Type: application/json'"
    return f"{head} \\\n  -d {shlex.quote(body)}"


def switch(facts: Facts) -> str:
    """The option that makes the template write the prompt of the training, where the template has two."""
    return f" --reasoning {'on' if facts.thinks else 'off'}" if facts.switches else ""


# deployment_guide.md: how the packaged file is run on phones and desktops, with the numbers of the run.

BANDWIDTHS = (
    ("LPDDR4X-4266", 4266),
    ("LPDDR5-6400", 6400),
    ("LPDDR5X-8533", 8533),
)
"""Memory of phones, mega-transfers a second: the number in the standard's name (JEDEC)."""

_BUS_BYTES = 8


def ceilings(bytes_per_token: int) -> list[tuple[str, float, float]]:
    """(memory, GB/s on a 64-bit bus, tokens/s that this bandwidth allows at most)."""
    rows = []
    for name, transfers in BANDWIDTHS:
        bandwidth = transfers * 1e6 * _BUS_BYTES
        rows.append((name, bandwidth / 1e9, bandwidth / bytes_per_token))
    return rows


def guide(facts: Facts) -> str:
    """The text."""
    parts = [
        _head(facts),
        _measured(facts),
        _ceiling(facts),
        _page(facts),
        _phones(facts),
        _desktops(facts),
        _trouble(),
    ]
    return "\n".join(part for part in parts if part)


def _head(facts: Facts) -> str:
    return f"""# Running {facts.title}

One file is needed: `{facts.file}`, {facts.bytes / 1e6:.2f} MB.
It holds weights, tokenizer and chat template. Begin with `python test_model.py`: it says whether the file is whole and
answers here as it did where it was packed.

The model was trained with this system turn; send it always, it is part of the question:

```text
{facts.task.system_prompt}
```
{_question(facts)}"""


def _question(facts: Facts) -> str:
    if not facts.task.label_names:
        return ""
    return f"""
And this user turn, with the text in place of `{{text}}`:

```text
{facts.task.user_prompt}
```
"""


def _number(value: float | None, form: str, unit: str) -> str:
    return "not measured" if value is None else f"{value:{form}} {unit}"


def _measured(facts: Facts) -> str:
    entry, here = facts.choice.entry, facts.comparison["conditions"]
    return f"""## Measured where it was packed ({here.get("processor", "processor unknown")}; {here["device"]})

| | |
|---|---|
| file | {facts.bytes / 1e6:.2f} MB, {entry["bits_per_weight"]:.2f} bits a weight |
| largest memory of the process | {_number(entry.get("peak_memory_mib"), ".0f", "MiB")} |
| reading a prompt | {_number(entry.get("prompt_tokens_per_second"), ".0f", "tokens/s")} |
| writing an answer | {_number(entry.get("generation_tokens_per_second"), ".0f", "tokens/s")} |

These are numbers of that machine. No phone measurement is part of this package, and nothing here is carried over to
one.
"""


def _ceiling(facts: Facts) -> str:
    rows = "\n".join(f"| {n} | {b:.1f} GB/s | {t:,.0f} tokens/s |" for n, b, t in ceilings(facts.bytes_per_token))
    return f"""## What a phone's memory allows at most (arithmetic, not measured)

To write one token, {facts.bytes_per_token / 1e6:.2f} MB of weights are read once. Memory bandwidth (transfers a second
in the standard's name × 8 bytes of a 64-bit bus) divided by that is a ceiling. Computing, the cache of keys and values
and heat make real phones slower, often several times; caches can matter for a model of a few MB.

| memory | bandwidth | ceiling |
|---|---|---|
{rows}
"""


def _page(facts: Facts) -> str:
    if not facts.page_rows:
        return ""
    return """## Any phone, in the browser

`web/` is a page that runs the file in the browser (llama.cpp as WebAssembly) and measures the phone: load time, tokens
a second, and whether it answers as stored. Serve this whole folder with any web server, over https or from localhost
(several threads and use without a network need that), with these headers:

```text
Cross-Origin-Opener-Policy: same-origin
Cross-Origin-Embedder-Policy: require-corp
```

An Android phone on a USB cable: `python -m http.server 8080 --bind 127.0.0.1` here, `adb reverse tcp:8080 tcp:8080`,
and `http://localhost:8080/web/` on the phone; the page adds the headers itself when it is loaded a second time. A
browser is slower than llama.cpp in an app of its own.
"""


def _phones(facts: Facts) -> str:
    return f"""## Android, in Termux

```bash
apt update && apt upgrade -y
apt install git cmake clang libandroid-spawn
git clone https://github.com/ggml-org/llama.cpp && cd llama.cpp
cmake -B build && cmake --build build --config Release -j 4 --target llama-cli llama-server
{chat_command("./build/bin/llama-cli -t 4", f"~/{facts.file}", facts)}
```

Copy the file into Termux's home folder (`termux-setup-storage`, then `cp`): files there are read fastest. `-t` is best
at the number of the phone's large cores; try 2, 4 and 6.

{_typed(facts)}

## Android, inside an app

llama.cpp's `examples/llama.android` is a Gradle project with a library module: import the folder into Android Studio,
build, and load the file from the app's private storage. Ship the GGUF as a download rather than inside the APK when it
is large. For a library without that project, llama.cpp cross-compiles with the NDK (`docs/android.md`, ABI arm64-v8a).

## iOS

`build-xcframework.sh` of llama.cpp (on a Mac with Xcode) makes an XCFramework for iOS 16.4 and later; releases of
llama.cpp hold one as well. `examples/llama.swiftui` is an app that uses it: add the GGUF to the app's documents.
"""


def _desktops(facts: Facts) -> str:
    file, n_ctx = facts.file, facts.n_ctx
    return f"""## Desktop

```bash
brew install llama.cpp            # macOS, Linux; Windows: winget install llama.cpp
# a chat:
{chat_command("llama-cli", file, facts)}
# one question, with the whole user turn:
{question_command("llama-cli", file, facts)}
pip install -r requirements.txt   # Python
python usage_examples.py
ollama create {facts.title.lower()} -f Modelfile && ollama run {facts.title.lower()}
```

The Modelfile sends the system turn by itself.
{_typed(facts)}

## As a server

```bash
llama-server -m {file} -c {n_ctx} --host 127.0.0.1 --port 8080{switch(facts)}
```

speaks the OpenAI protocol at {ADDRESS}/v1, with the file's own chat template. So does, with the workbook,

```bash
workbook serve {file}{" --thinking" if facts.thinks else ""}
```

Neither adds a system turn: every request sends it, and the whole user turn.

```bash
{request_command(facts)}
```

Both listen to this machine alone; other addresses make the server reachable for everybody in the network, without a
password.
"""


def _typed(facts: Facts) -> str:
    """What a user types into a chat, and what an empty system turn means there."""
    if facts.task.label_names:
        text = "What is typed becomes the user turn as it is: type the whole wording above, with the text in its place."
    else:
        text = "What is typed becomes the user turn as it is."
    if not facts.task.system_prompt:
        text += " The trained system turn is empty, which `llama-cli` cannot send: use a server, or Python."
    return text


def _trouble() -> str:
    return f"""## When something is wrong

- **Answers differ from those of the workbook.** Compare the prompt first: system turn, user turn and template must be
  those of `model_info.json`.
- **The process is killed.** A smaller context (`-c 512`) needs less memory.
- **An old program refuses the file.** It was made and tested with llama-cpp-python
  {metadata.version("llama_cpp_python")}; take a program with a llama.cpp of that age or newer.
"""
