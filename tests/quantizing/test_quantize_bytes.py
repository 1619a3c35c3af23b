"""The quantizer gives llama-quantize's bytes; sizes are known before.

The hashes are those of llama-quantize, built from the llama.cpp sources inside the source distribution of
llama-cpp-python 0.3.36 (tools/quantize/*.cpp with common/{common,log,json,imatrix-loader}.cpp, linked against the
installed libllama), run on the files of tests/tiny_gguf.py:

    llama-quantize w256-F16.gguf out.gguf TYPE 1 && sha256sum out.gguf
    llama-quantize --imatrix imatrix.gguf w256-F16.gguf out.gguf TYPE 2 && sha256sum out.gguf

Numbers: 16 hex digits of the SHA-256, size in bytes, of the 256-wide and of the 896-wide model.
"""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from lib.quantizing import predict_sizes, recipes, worker
from lib.run.files import sha256_file
from lib.settings import QUANTIZATION_TYPES
from tests import tiny_gguf

LLAMA_QUANTIZE = {
    "Q8_0": ("946bcd06761ed6cd", 1338976, "64198ca3bbf9f5c1", 7103584),
    "Q6_K": ("7519b61a67856d2a", 1037216, "eec06cdd812f3f84", 6881376),
    "Q5_K_M": ("4fe385cfc4f6794a", 902304, "8a3dca9d44f6e0e0", 5135968),
    "Q5_K_S": ("5d78cc769f1e6558", 880544, "2cff15d1d52249fa", 5039200),
    "Q5_1": ("61069cf78a8812e7", 954272, "3c0ba4c9b8d00500", 5096544),
    "Q5_0": ("d21d3bf9632543ba", 880544, "ef2e3371f1fdc68d", 4695136),
    "Q4_K_M": ("894f66ff21e26bf4", 775328, "b730ae5a306009c0", 4741728),
    "Q4_K_S": ("965ff54e7c571985", 741280, "06633a97858ecc16", 4594784),
    "Q4_1": ("7f016d1519dd465e", 806816, "f573bb415e34e882", 4293728),
    "Q4_0": ("7a7b9e08b4fc2315", 733088, "e46c13bb9259330d", 3892320),
    "Q3_K_L": ("2bfd6391fca3739c", 694688, "420dda0cb91043e5", 4351072),
    "Q3_K_M": ("0fdfcbbde07da5ec", 645536, "fd20e7b67136e06d", 4136032),
    "Q3_K_S": ("a4d2484e32462d36", 576416, "5a3a440fad18eb71", 3770464),
    "Q2_K": ("110a62cd1826a286", 503200, "5de94880eb2feba4", 3799136),
    "IQ4_NL": ("9d8df3cacbe7ddf6", 733088, "bd460c1960c23670", 3935328),
    "IQ4_XS": ("ebb0ef7c7ddaac74", 696224, "477580c6a55eb1eb", 3906656),
    "TQ2_0": ("9eedbe0b4c8ef372", 373664, "31c2f6da5e29ce1c", 3612768),
    "TQ1_0": ("2b84efdd279ac5e5", 318368, "975a2182472e5cab", 3569760),
}
SOURCES = {
    256: "e3f82df5d6dd526335051236c8202352766b1549e65d05ee5c9f824596faaef4",
    896: "cf79e0c7bc33046e1ae8e68bf6a9c6a9cb325b20d90b959008a12b18922d0d3c",
}
WITH_IMATRIX = {
    ("Q4_K_M", False): "306afb54cfdd9413ba986903d5f45e396ebd0a1ae9bbd96dc4de88a0b7f5ea15",
    ("Q4_0", False): "c3ca951db0b50ba18b39c23ed086e3e1c72e1491cfe22a19e1a615fe9022ab5c",
    ("Q2_K_S", False): "9d77b9643a36e2b8c90482201b06b86582a069f2ef03b2cf3b55e3cf1fa009e6",
    ("Q4_K_M", True): "cdd87c5dad90d6f3944bb702dd251137d187ff99450227f82e2541cac5366f20",
}

same_floats = pytest.mark.skipif(
    platform.machine() != "x86_64", reason="the hashes were made on x86-64; other processors fuse multiply and add"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {width: tiny_gguf.write(folder / f"w{width}-F16.gguf", width) for width in SOURCES}


@pytest.fixture(scope="module")
def predictions(sources: dict[int, Path]) -> dict[int, dict[str, dict]]:
    return {
        width: {row["type"]: row for row in predict_sizes(source, list(recipes.FILE_TYPES))}
        for width, source in sources.items()
    }


def test_the_source_files_are_those_of_the_oracle(sources: dict[int, Path]) -> None:
    assert {width: sha256_file(path) for width, path in sources.items()} == SOURCES


def test_every_type_of_the_settings_has_an_oracle() -> None:
    assert set(LLAMA_QUANTIZE) == set(QUANTIZATION_TYPES) <= set(recipes.FILE_TYPES)


def test_the_numbers_are_those_of_the_library() -> None:
    import llama_cpp

    for name, number in recipes.FILE_TYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(llama_cpp, constant) == number


@same_floats
@pytest.mark.parametrize("name", QUANTIZATION_TYPES)
@pytest.mark.parametrize("width", SOURCES)
def test_same_bytes_as_llama_quantize(
    sources: dict[int, Path], predictions: dict[int, dict[str, dict]], tmp_path: Path, name: str, width: int
) -> None:
    output = tmp_path / "out.gguf"
    argument = {"source": str(sources[width]), "output": str(output), "type": name, "imatrix": None, "n_threads": 2}
    description = worker.quantize(argument)["description"]
    digest, size = LLAMA_QUANTIZE[name][:2] if width == 256 else LLAMA_QUANTIZE[name][2:]
    assert sha256_file(output)[:16] == digest
    assert output.stat().st_size == size == predictions[width][name]["bytes"] == description["bytes"]
    for key in ("tensor_bytes", "weights", "bits_per_weight", "fallbacks"):
        assert description[key] == predictions[width][name][key]
    assert description["type"] == name


@same_floats
@pytest.mark.parametrize(("name", "legacy"), WITH_IMATRIX)
def test_same_bytes_with_an_importance_matrix(
    sources: dict[int, Path], tmp_path: Path, name: str, legacy: bool
) -> None:
    matrix = tiny_gguf.write_imatrix(tmp_path / ("imatrix.dat" if legacy else "imatrix.gguf"), legacy=legacy)
    prediction = predict_sizes(sources[256], [name], matrix)[0]
    output = tmp_path / "out.gguf"
    argument = {"source": str(sources[256]), "output": str(output), "type": name, "n_threads": 1}
    worker.quantize({**argument, "imatrix": str(matrix)})
    assert sha256_file(output) == WITH_IMATRIX[name, legacy]
    assert output.stat().st_size == prediction["bytes"]


@pytest.mark.parametrize(
    ("name", "wanted", "stored"),
    [("Q4_K_M", "q4_K", "q5_0"), ("Q5_K_M", "q5_K", "q5_1"), ("Q6_K", "q6_K", "q8_0"), ("Q2_K", "q2_K", "q4_0")],
)
def test_fallbacks_of_896_columns_are_named(
    predictions: dict[int, dict[str, dict]], name: str, wanted: str, stored: str
) -> None:
    """3.5 super-blocks a row: the types of shared/FEATURES.md A3 and PERFORMANCE.md 3.2."""
    rows = predictions[896][name]["fallbacks"]
    assert {"tensor": "blk.0.attn_q.weight", "columns": 896, "wanted": wanted, "type": stored} in rows
    assert {"tensor": "token_embd.weight", "columns": 896, "wanted": "q6_K", "type": "q8_0"} in rows
    assert len(rows) == 13  # six of seven matrices in two layers (ffn_down has 512 columns), and the embedding
    assert predictions[256][name]["fallbacks"] == []


def test_types_that_need_an_importance_matrix(predictions: dict[int, dict[str, dict]]) -> None:
    need = {name for name, row in predictions[256].items() if row["needs_imatrix"]}
    assert need == {"IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"}


def test_bits_per_weight_of_the_embedding_and_blocks_add_up(predictions: dict[int, dict[str, dict]]) -> None:
    """Q8_0 stores 32 weights in 34 bytes; the norms and biases stay F32."""
    row = predictions[256]["Q8_0"]
    one_dimensional = 2 * (256 + 128 + 128 + 2 * 256) + 256
    matrices = row["weights"] - one_dimensional
    assert row["tensor_bytes"] == matrices // 32 * 34 + 4 * one_dimensional
    assert row["bits_per_weight"] == pytest.approx(8 * row["tensor_bytes"] / row["weights"])


def test_a_q4_k_m_of_a_half_billion_qwen_is_no_250_megabytes(tmp_path: Path) -> None:
    """The sizes of Qwen2.5-0.5B, told from its shapes alone: MiB of weights, bits per weight, fallbacks.

    shared/PERFORMANCE.md 3.2, measured there with llama-quantize --dry-run; 144 matrices fall back, and the embedding.
    """
    source = tiny_gguf.write_shapes_of_qwen25_05b(tmp_path / "q-F16.gguf")
    wanted = {"Q8_0": (501, 8.50, 0), "Q6_K": (477, 8.09, 145), "Q5_K_M": (395, 6.71, 145), "Q4_K_M": (374, 6.35, 145)}
    wanted |= {"Q4_0": (330, 5.61, 1), "Q3_K_M": (333, 5.66, 145), "Q2_K": (317, 5.39, 145)}
    for row in predict_sizes(source, list(wanted)):
        mebibytes, bits, fallbacks = wanted[row["type"]]
        assert round(row["tensor_bytes"] / 2**20) == mebibytes
        assert row["bits_per_weight"] == pytest.approx(bits, abs=0.005)
        assert len(row["fallbacks"]) == fallbacks
