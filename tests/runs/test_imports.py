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
