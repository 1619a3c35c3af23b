"""environment.yml, pyproject.toml and requirements.txt say the same; nothing names a registry or this machine."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from lib.errors import EXTRAS, missing_library, other_version

PROJECT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def lock() -> dict[str, Requirement]:
    lines = (PROJECT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(r.name): r for r in requirements}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def environment() -> dict:
    return yaml.safe_load((PROJECT / "environment.yml").read_text(encoding="utf-8"))


LOCKED = ("torch", "gguf", "serve", "gptq", "onnx", "lab", "dev")
"""Extras that the lock holds; modelscope is installed by those who want it."""


def version_of(requirement: Requirement) -> str:
    (pin,) = requirement.specifier
    assert pin.operator == "==", f"{requirement} is not exact"
    return pin.version


def test_the_lock_is_exact_and_sorted(lock: dict[str, Requirement]) -> None:
    for requirement in lock.values():
        assert "+" not in version_of(requirement), f"{requirement} names a build: pip must choose it"
    assert list(lock) == sorted(lock)


def requirements_of(project: dict, *extras: str) -> list[Requirement]:
    """What the project needs for itself and for these extras."""
    wanted = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]
    return [Requirement(text) for texts in wanted for text in texts]


def test_every_dependency_is_a_range_that_holds_the_lock(lock: dict[str, Requirement], project: dict) -> None:
    for requirement in requirements_of(project, *LOCKED):
        name = canonicalize_name(requirement.name)
        assert all(part.operator != "==" for part in requirement.specifier), f"{requirement} is no range"
        assert name in lock, f"{name} is not in requirements.txt"
        assert Version(version_of(lock[name])) in requirement.specifier, f"{name}: lock and pyproject.toml disagree"


def closure(wanted: list[Requirement]) -> set[str]:
    """Names of these packages and of all that they need, as installed here."""
    todo = list(wanted)
    seen: set[tuple[str, tuple[str, ...]]] = set()
    while todo:
        requirement = todo.pop()
        key = (canonicalize_name(requirement.name), tuple(sorted(requirement.extras)))
        if key in seen:
            continue
        seen.add(key)
        try:
            needs = [Requirement(r) for r in metadata.requires(key[0]) or []]
        except metadata.PackageNotFoundError:
            pytest.skip(f"{key[0]} is not installed here")
        for need in needs:
            environments = [{**default_environment(), "extra": extra} for extra in ("", *key[1])]
            if need.marker is None or any(need.marker.evaluate(e) for e in environments):
                todo.append(need)
    gpu_builds = ("nvidia-", "triton", "cuda-")  # which torch names itself; nvidia-ml-py is llm-compressor's
    return {name for name, _ in seen if name == "nvidia-ml-py" or not name.startswith(gpu_builds)}


def test_the_lock_is_the_closure_of_all_extras_and_nothing_else(lock: dict[str, Requirement], project: dict) -> None:
    """Everything that the dependencies need is locked, and nothing that nobody needs (as installed here)."""
    names = closure(requirements_of(project, *LOCKED))
    locked = {name for name, r in lock.items() if r.marker is None or r.marker.evaluate()}
    assert names - locked == set(), "needed, but not in requirements.txt"
    assert locked - names == set(), "in requirements.txt, but nothing needs it"


def test_training_or_scoring_alone_needs_less_than_half(lock: dict[str, Requirement], project: dict) -> None:
    base, training = closure(requirements_of(project)), closure(requirements_of(project, "torch"))
    scoring = closure(requirements_of(project, "torch", "gguf"))
    assert not base & {"torch", "llama-cpp-python"}, "inspecting and simulating need neither"
    assert not training & {"llama-cpp-python", "llmcompressor", "jupyterlab", "matplotlib", "fastapi"}
    assert len(training) < len(scoring) < len(lock) / 2


def test_every_library_is_named(project: dict) -> None:
    """What lib imports comes with the project, or with the extra that a missing library is explained by."""
    imported: set[str] = set()
    for path in (PROJECT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "lib", "pynvml"}  # pynvml: where a GPU's libraries brought it
    packages = metadata.packages_distributions()
    if absent := imported - {*packages, "modelscope"}:
        pytest.skip(f"{', '.join(absent)} not installed here")
    for name in imported - {"modelscope"}:
        extra = [EXTRAS[name]] if name in EXTRAS else []
        names = {canonicalize_name(package) for package in packages[name]}
        assert names & closure(requirements_of(project, *extra)), f"{name}: in {extra or 'the dependencies'}"
    assert set(EXTRAS.values()) == set(project["optional-dependencies"]) - {"dev"}


def test_a_missing_library_is_said_with_its_extra() -> None:
    assert "Found: llama_cpp is not installed. Expected: the libraries of the extra gguf." in str(
        missing_library("llama_cpp")
    )
    assert "pip install -e '.[lab]'" in str(missing_library("matplotlib.pyplot"))
    assert "peft, torch are not installed" in str(missing_library("peft", "torch"))


def test_a_library_of_another_version_is_said() -> None:
    """One that lacks what the locked version has; an error of this project's own is none of that."""
    for source in ("yaml.no_such_name", "exec('from yaml import no_such_name')"):
        with pytest.raises((AttributeError, ImportError)) as caught:
            eval(source, {"yaml": yaml})
        assert "Found: another version of yaml" in str(other_version(caught.value))
    with pytest.raises(AttributeError) as caught:
        Path().no_such_name  # noqa: B018
    assert other_version(caught.value) is None and other_version(ValueError("x")) is None


def test_every_file_of_lib_is_installed() -> None:
    settings = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = settings["package-data"]["*"]
    for path in tracked():
        if path.is_relative_to(PROJECT / "lib") and path.suffix != ".py":
            parts = path.relative_to(PROJECT / "lib").parts
            names = ["/".join(parts[i:]) for i in range(len(parts))]
            assert any(fnmatch(name, pattern.replace("**/", "*")) for name in names for pattern in patterns), path


def test_conda_brings_python_and_compilers_and_pip_the_lock(environment: dict, project: dict) -> None:
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    conda = [entry for entry in environment["dependencies"] if isinstance(entry, str)]
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == ["-r requirements.txt", "-e ."]
    names = {re.split(r"[ =<>]", entry)[0] for entry in conda}
    assert names == {"python", "pip", "compilers", "cmake", "make", "git"}
    (python,) = [entry for entry in conda if entry.startswith("python ")]
    lowest = project["requires-python"].removeprefix(">=")
    assert python.startswith(f"python >={lowest},<")
    preflight = (PROJECT / "scripts" / "preflight.sh").read_text(encoding="utf-8")
    highest = python.partition("<")[2]
    known = re.search(r"^ +([\d.| ]+)\)$", preflight, re.M)[1].replace(" ", "").split("|")
    assert known[0] == lowest and known[-1] == f"3.{int(highest.split('.')[1]) - 1}"


def test_torch_and_transformers_are_the_agreed_versions(lock: dict[str, Requirement]) -> None:
    assert version_of(lock["torch"]) == "2.13.0" and version_of(lock["transformers"]) == "5.17.0"


def test_make_help_lists_every_target() -> None:
    text = (PROJECT / "Makefile").read_text(encoding="utf-8")
    phony = set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split())
    listed = set(re.findall(r"^([a-z0-9-]+):.* ## ", text, re.M))
    assert phony == listed
    answer = subprocess.run(["make", "help"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert [line.split()[1] for line in answer.splitlines()] == re.findall(r"^([a-z0-9-]+):.* ## ", text, re.M)


def tracked() -> list[Path]:
    try:
        answer = subprocess.run(["git", "-C", str(PROJECT), "ls-files", "-z"], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [PROJECT / name for name in answer.stdout.decode().split("\0") if name]


def test_no_file_names_a_registry_host() -> None:
    host = re.compile(
        r"pypi\.(?:org|python)|pythonhosted|://conda\.anaconda|download\.py" + r"torch|--(?:extra-)?index-url"
    )
    for path in tracked():
        if path == Path(__file__) or not path.is_file():
            continue
        text = path.read_bytes().decode("utf-8", "replace")
        assert not host.search(text), f"{path.relative_to(PROJECT)} names a package registry"


def test_the_preflight_names_a_cure_for_everything(tmp_path: Path) -> None:
    """With nothing on the PATH every lack is named with its cure, and the exit code is 2."""
    script = PROJECT / "scripts" / "preflight.sh"
    answer = subprocess.run(["/bin/sh", str(script)], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert answer.returncode == 2 and answer.stdout == ""
    lines = [line for line in answer.stderr.splitlines() if line.startswith("Missing: ")]
    assert len(lines) == 5
    assert all(all(tool in line for tool in ("apt", "dnf", "conda")) for line in lines)
