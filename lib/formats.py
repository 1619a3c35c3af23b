"""Names of the formats that a model can be stored in. No library is needed to know them."""

from __future__ import annotations

QUANTIZATION_TYPES: tuple[str, ...] = (
    *("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0"),
    *("Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K", "IQ4_NL", "IQ4_XS", "IQ3_M", "IQ3_S", "MXFP4_MOE"),
    *("TQ2_0", "TQ1_0", "Q2_0", "Q1_0"),
)
"""Types of llama.cpp that quantize without an importance matrix, best first."""

IMATRIX_TYPES: tuple[str, ...] = (
    *("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"),
)
"""Types of llama.cpp that need an importance matrix, best first."""

TENSOR_TYPES: tuple[str, ...] = (
    *("f32", "f16", "bf16", "q8_0", "q6_K", "q5_K", "q5_1", "q5_0", "q4_K", "q4_1", "q4_0", "q3_K", "q2_K"),
    *("iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s"),
    *("mxfp4", "nvfp4", "tq2_0", "tq1_0", "q2_0", "q1_0"),
)
"""Types that one tensor can have (a type such as Q4_K_M is a recipe that mixes them), as llama.cpp writes them."""

EXPORT_FORMATS: tuple[str, ...] = ("fp16", "bf16", "int8", "nf4", "gptq", "torchao-int8")
"""Formats other than GGUF: see lib.exporting.formats."""

NF4 = "nf4"
"""The one of them that rounds the matrices of the layers to 16 values a block (Dettmers et al. 2023)."""


def mix_name(budget: int) -> str:
    """What stands in place of a type for a file under a budget of so many bytes: MIX_300MB, MIX_1968KB."""
    return f"MIX_{budget // 10**6}MB" if budget % 10**6 == 0 else f"MIX_{budget / 1000:.0f}KB"


GRID_SIZABLE = 0.1
"""Share of a file's weights in types on the grid of the base's own weights from which tables mark the file."""
