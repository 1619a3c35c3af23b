"""What can be exported: for each format its words, the package it needs, and why it cannot be made here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

from lib.device import has_module


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        name: as in the setting `export_formats`; also its folder.
        title: what it is, in words.
        made_by: package that quantizes; None where transformers alone suffices.
        needs: packages that a reader of the folder installs beside torch and transformers.
        note: what a reader must know to use it.
    """

    name: str
    title: str
    made_by: str | None = None
    needs: tuple[str, ...] = ()
    note: str = ""

    def problem(self) -> str | None:
        """The package that is absent, in words; None when all are there (whether they work shows in the child)."""
        wanted = dict.fromkeys((*filter(None, (self.made_by,)), *self.needs))
        missing = [name for name in wanted if not has_module(name.replace("-", "_"))]
        return f"{' and '.join(missing)} not installed" if missing else None

    def version(self) -> str | None:
        """Installed version of `made_by`; None where it is absent or none is needed."""
        if self.made_by is None:
            return None
        try:
            return metadata.version(self.made_by)
        except metadata.PackageNotFoundError:
            return None

    def maker(self) -> str:
        """The package that makes it, with its version."""
        return f"{self.made_by} {self.version()}" if self.made_by else "transformers"


_SKIPPED = "The token embedding and the output layer stay in 16 bits."

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        Format("fp16", "16-bit floats, IEEE half", note="Slow on most CPUs, which have no half-precision units."),
        Format("bf16", "16-bit floats, bfloat16", note="The merged model itself where the base is in bfloat16."),
        Format(
            "int8",
            "LLM.int8(): INT8 rows, outlier columns in 16 bits",
            "bitsandbytes",
            ("bitsandbytes", "accelerate"),
            f"{_SKIPPED} The folder carries its quantization: pass no BitsAndBytesConfig. At the first pass "
            "bitsandbytes says that inputs are cast to float16: that is how the format works.",
        ),
        Format(
            "nf4",
            "NormalFloat4 in blocks of 64, block scales quantized again",
            "bitsandbytes",
            ("bitsandbytes", "accelerate"),
            f"{_SKIPPED} The folder carries its quantization: pass no BitsAndBytesConfig.",
        ),
        Format(
            "gptq",
            "GPTQ: INT4 groups, errors corrected on training rows",
            "llmcompressor",
            ("compressed-tensors",),
            f"{_SKIPPED} Small on the disk; transformers unpacks the weights to 16 bits at the first pass, so "
            "memory is saved only by programs that compute on packed weights, such as vLLM.",
        ),
        Format(
            "torchao-int8",
            "torchao: INT8 weights, one scale a row",
            "torchao",
            ("torchao",),
            _SKIPPED,
        ),
    )
}
"""The formats by name, in the order of the pages."""
