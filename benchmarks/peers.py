"""The peers: llama.cpp's own tools from the source distribution that requirements.txt pins. Never shipped.

The sources are downloaded once into the benchmarks' cache. Tools are compiled against the installed wheel's shared
libraries, so that peer and workbook run the same kernels and only what is around them differs.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from benchmarks.shapes import cache
from lib.errors import InputError
from lib.runs.files import PROJECT, sha256_file, sha256_json

LLAMA_CPP_VARIABLE = "WORKBOOK_LLAMA_CPP"
"""Environment variable: a checkout of llama.cpp to use instead of downloading its sources."""

_NEEDS = "sentencepiece>=0.1.98,<0.3"
_COMMON = tuple(f"common/{name}.cpp" for name in ("common", "log", "json", "imatrix-loader"))
_TOOLS = {
    "llama-quantize": ("tools/quantize/main.cpp", "tools/quantize/quantize.cpp", *_COMMON),
    "llama-bench": ("tools/llama-bench/main.cpp", "tools/llama-bench/llama-bench.cpp"),
}
_LIBRARIES = {"llama-bench": ("-lllama-common",)}
"""What a tool needs beside llama and ggml; installed beside the package, not in it."""
_INCLUDES = ("include", "ggml/include", "common", "vendor", "tools/quantize")


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp as a peer.

    Attributes:
        version: of llama-cpp-python, whose sources these are.
        folder: the sources.
        convert_script: the official converter.
        environment: variables that the converter needs (its packages lie beside ours).
    """

    version: str
    folder: Path
    convert_script: Path
    environment: dict[str, str]

    def convert_command(self, model: Path, output: Path, outtype: str = "f16") -> list[str]:
        """The official converter as a command; run it with `environment`."""
        script = [sys.executable, str(self.convert_script), str(model)]
        return [*script, "--outtype", outtype, "--outfile", str(output)]


def pinned_version() -> str:
    """Version of llama-cpp-python in requirements.txt."""
    text = (PROJECT / "requirements.txt").read_text(encoding="utf-8")
    return re.search(r"^llama_cpp_python==(\S+)$", text, re.M)[1]


def peer_llama_cpp() -> LlamaCpp:
    """The llama.cpp inside the pinned source distribution, ready to convert; downloaded once.

    WORKBOOK_LLAMA_CPP names a checkout to use instead.

    Raises:
        InputError: no network and nothing cached; the checkout is none.
    """
    version = pinned_version()
    given = os.environ.get(LLAMA_CPP_VARIABLE)
    folder = Path(given).resolve() if given else _sources(version)
    script = folder / "convert_hf_to_gguf.py"
    if not script.is_file():
        raise InputError(f"no convert_hf_to_gguf.py in {folder}.", "sources of llama.cpp.", "correct the path.")
    added = packages("converter-packages", _NEEDS)
    path = os.pathsep.join(filter(None, [str(added), os.environ.get("PYTHONPATH")]))
    return LlamaCpp(version, folder, script, {"PYTHONPATH": path})


def tool(name: str) -> Path:
    """The official llama-quantize or llama-bench, compiled once against the installed libraries.

    Raises:
        InputError: no compiler, or the sources do not compile.
    """
    peer, files = peer_llama_cpp(), _TOOLS[name]
    digest = sha256_json([sha256_file(peer.folder / file) for file in files])[:8]
    binary = cache() / f"{name}-{peer.version}-{digest}"
    if not binary.is_file():
        _compile(peer.folder, files, _LIBRARIES.get(name, ()), binary)
    return binary


def _run(command: list[str], what: str, do: str) -> None:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        last = " | ".join(answer.stderr.strip().splitlines()[-3:])
        raise InputError(f"{what} failed ({last}).", "an end without an error.", do)


def _sources(version: str) -> Path:
    """Download and unpack the source distribution; the folder vendor/llama.cpp in it."""
    target = cache() / f"llama_cpp_python-{version}"
    if not target.is_dir():
        part = cache() / ".sources.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        name = f"llama-cpp-python=={version}"
        command = [*pip, "download", "--no-deps", "--no-binary", "llama-cpp-python", name, "--dest", str(part)]
        _run(command, f"downloading the sources of {name}", f"connect, or set {LLAMA_CPP_VARIABLE} to a checkout.")
        (archive,) = part.glob("llama_cpp_python-*.tar.gz")
        with tarfile.open(archive) as packed:
            packed.extractall(part, filter="data")
        (part / f"llama_cpp_python-{version}").rename(target)
        shutil.rmtree(part)
    return target / "vendor" / "llama.cpp"


def packages(name: str, *requirements: str) -> Path:
    """A folder with packages that the workbook does not have and a peer imports; installed once, without dependencies.

    Args:
        name: of the folder in the benchmarks' cache.
        requirements: pinned; a change makes a new folder.

    Raises:
        InputError: no network and nothing cached.
    """
    folder = cache() / f"{name}-{sha256_json(list(requirements))[:8]}"
    if not folder.is_dir():
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
        command = [*pip, "install", "--no-deps", "--target", str(part), *requirements]
        _run(command, f"installing {', '.join(requirements)}", "connect.")
        part.rename(folder)
    return folder


def _compile(sources: Path, files: tuple[str, ...], more: tuple[str, ...], binary: Path) -> None:
    """Compile a tool of llama.cpp and link it against the libraries inside the installed llama-cpp-python."""
    import importlib.util

    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise InputError("llama-cpp-python is not installed.", "its shared libraries.", "see docs/setup.md.")
    libraries = Path(found.origin).parent / "lib"
    common = libraries.parents[1] / "lib"
    information = cache() / "build-info.cpp"
    text = (sources / "common" / "build-info.cpp.in").read_text(encoding="utf-8")
    text = text.replace("@LLAMA_BUILD_NUMBER@", "0")
    information.write_text(re.sub(r"@\w+@", "benchmark", text), encoding="utf-8")
    part = binary.with_name(f".{binary.name}.part")
    _run(
        [
            *("c++", "-std=c++17", "-O2", "-DNDEBUG", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"),
            *(f"-I{sources / folder}" for folder in _INCLUDES),
            *(str(information), *(str(sources / file) for file in files)),
            *(f"-L{libraries}", f"-L{common}", *more, "-lllama", "-lggml", "-lggml-base", "-lggml-cpu", "-lpthread"),
            *(f"-Wl,-rpath,{libraries}:{common}", "-o", str(part)),
        ],
        f"compiling {binary.name}",
        "install a C++ compiler (README.md names it).",
    )
    part.rename(binary)
