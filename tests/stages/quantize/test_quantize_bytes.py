"""The quantizer gives llama-quantize's bytes; sizes are known before.

The hashes are those of llama-quantize, built from the llama.cpp sources inside the source distribution of
llama-cpp-python 0.3.36 (tools/quantize/*.cpp with common/{common,log,json,imatrix-loader}.cpp, linked against the
installed libllama), run on the files of tests/tiny_gguf.py:

    llama-quantize w256-F16.gguf out.gguf TYPE 1 && sha256sum out.gguf
    llama-quantize --imatrix imatrix.gguf w256-F16.gguf out.gguf TYPE 2 && sha256sum out.gguf
    llama-quantize --tensor-type … --token-embedding-type … w256-F16.gguf out.gguf TYPE 1 && sha256sum out.gguf

Numbers: 16 hex digits of the SHA-256, size in bytes, of the 256-wide and of the 896-wide model.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from lib.errors import InputError
from lib.runs.files import sha256_file
from lib.settings import IMATRIX_TYPES, QUANTIZATION_TYPES, TENSOR_TYPES, UNQUANTIZED
from lib.stages.quantize import files, quantizer
from lib.stages.quantize.files import Options, predict_sizes
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
    "IQ3_M": ("49506803677e9544", 602528, "7cc070c067a01c6d", 3999840),
    "IQ3_S": ("29cbec36a2cf9160", 576416, "89cd876a95df4c13", 3799136),
    "MXFP4_MOE": ("bc83e517fe0c8706", 1338976, "42e8023c25dd1569", 7103584),
    "Q2_0": ("394f35d907c75640", 401312, "cae28b5739244ee7", 2085984),
    "Q1_0": ("73db2228670c402c", 235424, "1380d6d25afc65be", 1182816),
    "F16": ("15ac4cc58e115ad8", 2507040, "0aef402f7c5c19a1", 13342240),
    "BF16": ("d49dc2af41099599", 2507040, "cb8472e16b1c1e32", 13342240),
    "F32": ("4264f1a15801182b", 4998944, "d5b064e70693db21", 26651424),
}
SOURCES = {
    256: "e3f82df5d6dd526335051236c8202352766b1549e65d05ee5c9f824596faaef4",
    896: "cf79e0c7bc33046e1ae8e68bf6a9c6a9cb325b20d90b959008a12b18922d0d3c",
}
WITH_IMATRIX = {
    ("Q4_K_M", False): "306afb54cfdd9413",
    ("Q4_0", False): "c3ca951db0b50ba1",
    ("Q8_0", False): "d79ed800c21a8623",
    ("IQ3_XS", False): "5574fb426aac3dde",
    ("IQ3_XXS", False): "8de81e0cd224355c",
    ("Q2_K_S", False): "9d77b9643a36e2b8",
    ("IQ2_M", False): "99d7854464a1d522",
    ("IQ2_S", False): "9c5195ed5613267a",
    ("IQ2_XS", False): "41c755717dd85781",
    ("IQ2_XXS", False): "faa43950142a469f",
    ("IQ1_M", False): "3d1092ba6a19f990",
    ("IQ1_S", False): "6f303dc615d804e7",
    ("Q4_K_M", True): "cdd87c5dad90d6f3",
}
# --tensor-type, --output-tensor-type and --token-embedding-type: width, type, options, hash.
WITH_TYPES = {
    "one expression": (256, "Q4_K_M", Options(tensor_types=("attn_v=q8_0",)), "422494135d4bcbec"),
    "the first that fits": (
        256,
        "Q4_K_M",
        Options(tensor_types=(r"blk\.0\.ffn_.*=Q6_K", "ffn_down=iq4_nl", "attn_(k|q)=bf16")),
        "80dd852210afbc5d",
    ),
    "output of a tied model": (256, "Q4_0", Options(output_tensor_type="q8_0"), "df4a48af3e3b7981"),
    "embedding": (256, "Q4_0", Options(token_embedding_type="Q4_K"), "c756f0996a860b17"),
    "embedding and one expression": (
        896,
        "Q4_K_M",
        Options(tensor_types=("attn_v=q6_k",), token_embedding_type="q5_0"),
        "803f513f886949a4",
    ),
    "output that falls back": (896, "Q4_K_M", Options(output_tensor_type="q6_k"), "b730ae5a306009c0"),
    "embedding of a file of full weights": (256, "F16", Options(token_embedding_type="q8_0"), "5d24238dd10d3e21"),
    "rare types": (
        256,
        "Q8_0",
        Options(
            tensor_types=(
                *("attn_v=nvfp4", "attn_k=mxfp4", "attn_q=q1_0"),
                *("ffn_up=q2_0", "ffn_down=tq1_0", "ffn_gate=f32"),
            )
        ),
        "690945519df45030",
    ),
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
        width: {row["type"]: row for row in predict_sizes(source, list(files.FILE_TYPES))}
        for width, source in sources.items()
    }


def test_the_source_files_are_those_of_the_oracle(sources: dict[int, Path]) -> None:
    assert {width: sha256_file(path) for width, path in sources.items()} == SOURCES


def test_every_type_of_the_settings_has_an_oracle() -> None:
    assert set(LLAMA_QUANTIZE) == {*QUANTIZATION_TYPES, *UNQUANTIZED}
    assert {name for name, _ in WITH_IMATRIX} >= set(IMATRIX_TYPES)
    assert {*LLAMA_QUANTIZE, *IMATRIX_TYPES} == set(files.FILE_TYPES)


def test_the_numbers_are_those_of_the_library() -> None:
    import llama_cpp

    for name, number in files.FILE_TYPES.items():
        constant = "LLAMA_FTYPE_ALL_F32" if name == "F32" else f"LLAMA_FTYPE_MOSTLY_{name}"
        assert getattr(llama_cpp, constant) == number


@same_floats
@pytest.mark.parametrize("name", LLAMA_QUANTIZE)
@pytest.mark.parametrize("width", SOURCES)
def test_same_bytes_as_llama_quantize(
    sources: dict[int, Path], predictions: dict[int, dict[str, dict]], tmp_path: Path, name: str, width: int
) -> None:
    output = tmp_path / "out.gguf"
    argument = {
        "source": str(sources[width]),
        "output": str(output),
        "type": name,
        "options": vars(Options()),
        "n_threads": 2,
    }
    description = quantizer.quantize(argument)["description"]
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
    prediction = predict_sizes(sources[256], [name], Options(matrix))[0]
    output = tmp_path / "out.gguf"
    argument = {"source": str(sources[256]), "output": str(output), "type": name, "n_threads": 1}
    quantizer.quantize({**argument, "options": vars(Options(matrix))})
    assert sha256_file(output)[:16] == WITH_IMATRIX[name, legacy]
    assert output.stat().st_size == prediction["bytes"]


@same_floats
@pytest.mark.parametrize("case", WITH_TYPES)
def test_same_bytes_with_types_of_single_tensors(sources: dict[int, Path], tmp_path: Path, case: str) -> None:
    width, name, options, digest = WITH_TYPES[case]
    prediction = predict_sizes(sources[width], [name], options)[0]
    output = tmp_path / "out.gguf"
    argument = {"source": str(sources[width]), "output": str(output), "type": name, "n_threads": 2}
    description = quantizer.quantize({**argument, "options": vars(options)})["description"]
    assert sha256_file(output)[:16] == digest
    for key in ("bytes", "tensor_bytes", "histogram", "fallbacks"):
        assert description[key] == prediction[key]
    changed = {row["tensor"] for row in prediction["set_by_hand"]}
    assert changed or case == "output that falls back"  # Q8_0 either way, but said: see the fallbacks
    assert bool(prediction["fallbacks"]) == (width == 896)


@same_floats
def test_the_hashes_are_those_of_llama_quantize(sources: dict[int, Path], home: Path) -> None:
    """Compiled from the checkout that WORKBOOK_LLAMA_CPP names, run on the same files."""
    from benchmarks.peers import LLAMA_CPP_VARIABLE, tool

    if not os.environ.get(LLAMA_CPP_VARIABLE):
        pytest.skip(f"{LLAMA_CPP_VARIABLE} does not name a checkout of llama.cpp")
    binary, output = tool("llama-quantize"), home / "out.gguf"

    def official(width: int, name: str, *options: str) -> str:
        command = [binary, *options, sources[width], output, name, "2"]
        subprocess.run(command, check=True, capture_output=True, cwd=home)
        return sha256_file(output)[:16]

    for name, hashes in LLAMA_QUANTIZE.items():
        assert (official(256, name), official(896, name)) == hashes[::2], name
    tiny_gguf.write_imatrix(home / "imatrix.gguf")
    tiny_gguf.write_imatrix(home / "imatrix.dat", legacy=True)
    for (name, legacy), digest in WITH_IMATRIX.items():
        assert official(256, name, "--imatrix", f"imatrix.{'dat' if legacy else 'gguf'}") == digest, name
    for case, (width, name, options, digest) in WITH_TYPES.items():
        given = [part for entry in options.tensor_types for part in ("--tensor-type", entry)]
        for flag, kind in (
            ("--output-tensor-type", options.output_tensor_type),
            ("--token-embedding-type", options.token_embedding_type),
        ):
            given += [flag, kind] if kind else []
        assert official(width, name, *given) == digest, case


def test_the_numbers_of_tensor_types_are_those_of_the_library() -> None:
    from lib.stages.quantize import llama_library

    for name in TENSOR_TYPES:
        assert llama_library.block_size(name) in (1, 32, 64, 128, 256)


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
    assert {name for name, row in predictions[256].items() if row["needs_imatrix"]} == set(IMATRIX_TYPES)


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


@pytest.mark.parametrize("keys", [{"split.count": 1}, {"split.no": 0, "split.count": 1, "split.tensors.count": 9}])
def test_a_model_in_one_part_is_no_split_model(keys: dict[str, int], sources: dict[int, Path], tmp_path: Path) -> None:
    source = tiny_gguf.with_values(sources[256], tmp_path / "one.gguf", keys)
    made = tiny_gguf.quantize_file(source, tmp_path / "out.gguf", "Q4_0", n_threads=1)
    assert made.bytes == made.predicted_bytes == (tmp_path / "out.gguf").stat().st_size
    with pytest.raises(InputError, match="one part of a split model"):
        tiny_gguf.quantize_file(
            tiny_gguf.with_values(source, tmp_path / "two.gguf", {"split.no": 0, "split.count": 2}),
            tmp_path / "o.gguf",
            "Q4_0",
        )
