"""What a child process does not load."""

import subprocess
import sys

LOADED = """
import sys
from lib.runs.machine import quiet
quiet()
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM
from transformers.utils import is_scipy_available, is_sklearn_available
assert is_scipy_available() and is_sklearn_available(), "only the two modules are told that these are absent"
print(*sorted({"sklearn", "scipy", "pandas"} & set(sys.modules)))
"""


def test_a_model_needs_no_scikit_learn_and_no_scipy():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_notebooks_need_no_grammar_of_addresses():
    """And are checked all the same."""
    code = """
import sys
import lib, nbformat
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
nbformat.validate(notebook)
notebook.cells[0].cell_type = "none"
try:
    nbformat.validate(notebook)
except nbformat.ValidationError:
    print(*{"lark", "jsonschema"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["jsonschema"]
