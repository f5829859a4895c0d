"""Laws of gpt-oss's fp4: the numbers of its format by hand, and those of transformers."""

import json
import re

import ml_dtypes
import numpy as np
import pytest
from drills import folders

from conftest import assert_same_bits
from moe_jax.huggingface import load_hf, save_hf, shards
from moe_jax.huggingface.inspection import inspected
from moe_jax.huggingface.mxfp4 import dequantised


def test_a_byte_has_two_numbers_and_a_block_one_scale():
    # 0x71: low 1 is 0.5, high 7 is 6; 0x9F: low 15 is -6, high 9 is -0.5; scales 2^1 and 2^-1
    blocks = np.array([[[0x71, 0x9F], [0x71, 0x9F]]], np.uint8)
    found = dequantised(blocks, np.array([[128, 126]], np.uint8))
    np.testing.assert_array_equal(found, [[1, 12, -12, -1, 0.25, 3, -3, -0.25]])
    assert found.dtype == np.float32


def test_all_numbers_are_those_of_transformers():
    torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
    theirs = pytest.importorskip("transformers.integrations.mxfp4")
    draw = np.random.default_rng(0)
    blocks = draw.integers(0, 256, (2, 6, 3, 16), np.uint8)  # experts, rows, blocks, bytes
    scales = draw.integers(100, 140, (2, 6, 3), np.uint8)
    both = torch.from_numpy(blocks), torch.from_numpy(scales)
    expected = theirs.convert_moe_packed_tensors(*both, dtype=torch.float32)
    found = dequantised(blocks, scales)
    assert found.shape == (2, 6, 96)
    np.testing.assert_array_equal(found.swapaxes(1, 2), expected.numpy())  # they transpose what they have read


@pytest.mark.parametrize(
    ("blocks", "scales", "why"),
    [
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8), "must be uint8, one scale for each block"),
        (np.zeros((2, 16), np.uint8), np.zeros(3, np.uint8), r"blocks \[2, 16\] .* scales \[3\]"),
        (np.zeros((2, 16), np.uint8), np.array([1, 255], np.uint8), "1 scales are 255, which is NaN"),
    ],
)
def test_what_is_no_fp4_is_refused(blocks, scales, why):
    with pytest.raises(ValueError, match=why):
        dequantised(blocks, scales)


# --- folders --------------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=64, head_dim=8)
QUANTISED = dict(quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=["model.layers.*.self_attn"]))


def packed(values):
    """Replace experts' matrices by random blocks and scales, as gpt-oss is published."""
    draw = np.random.default_rng(0)
    for name in [n for n in values if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, rows, columns = values.pop(name).shape
        values[f"{name}_blocks"] = draw.integers(0, 256, (experts, columns, rows // 32, 16), np.uint8)
        values[f"{name}_scales"] = draw.integers(118, 124, (experts, columns, rows // 32), np.uint8)


def unpacked(values):
    """The same with the numbers that they stand for."""
    for name in [n.removesuffix("_blocks") for n in values if n.endswith("_blocks")]:
        both = values.pop(f"{name}_blocks"), values.pop(f"{name}_scales")
        values[name] = dequantised(*both).swapaxes(1, 2).astype(ml_dtypes.bfloat16)


@pytest.fixture
def folder(tmp_path):
    """A folder of gpt-oss as it is published."""
    folders.make(tmp_path / "packed", "gpt_oss", "bfloat16", change=packed, **SIZES, **QUANTISED)
    return tmp_path / "packed"


def test_a_packed_model_is_the_model_of_its_numbers_and_comes_back_as_bfloat16(folder, tmp_path):
    def change(values):
        packed(values)
        unpacked(values)

    wide = folders.make(tmp_path / "wide", "gpt_oss", "bfloat16", change=change, **SIZES)
    ours, theirs = load_hf(folder), load_hf(tmp_path / "wide")
    assert ours.config == theirs.config
    assert ours.config.param_dtype == "bfloat16"
    assert_same_bits(ours.params, theirs.params)
    save_hf(ours, tmp_path / "out")
    stored = shards.open_folder(tmp_path / "out")
    assert stored.keys() == wide.keys()
    for name, value in wide.items():
        assert shards.read(stored[name]).tobytes() == value.tobytes(), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_inspection_names_the_format_and_finds_everything_in_its_place(folder):
    lines = list(inspected(folder).lines())
    assert any("MXFP4" in line for line in lines)
    assert lines[-1] == "fits: every key and every tensor has its place"


NAME = "model.layers.0.mlp.experts.down_proj"


def drop_scales(values):
    del values[f"{NAME}_scales"]


def drop_blocks(values):
    del values[f"{NAME}_blocks"]


def other_groups(values):
    values[f"{NAME}_scales"] = values[f"{NAME}_scales"][..., :1]


def as_bytes(values):
    values["model.norm.weight"] = np.zeros(32, np.uint8)


def fewer_rows(values):
    for end in ("_blocks", "_scales"):
        values[NAME + end] = values[NAME + end][:, 1:]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (drop_scales, rf"{NAME}_blocks \[4, 32, 2, 16\] is U8, as only the _blocks and _scales of fp4 can be"),
        (drop_blocks, rf"{NAME}_scales \[4, 32, 2\] is U8"),
        (other_groups, rf"{NAME}_blocks \[4, 32, 2, 16\] is U8"),
        (as_bytes, r"model\.norm\.weight \[32\] is U8"),
        (fewer_rows, rf"{NAME} .* has shape \[4, 64, 31\], but config\.json makes it \[4, 64, 32\]"),
    ],
)
def test_a_damaged_folder_is_refused_by_the_name_of_a_tensor(tmp_path, damage, why):
    def change(values):
        packed(values)
        damage(values)

    folders.make(tmp_path / "hf", "gpt_oss", "bfloat16", change=change, **SIZES, **QUANTISED)
    with pytest.raises(ValueError, match=why):
        load_hf(tmp_path / "hf")
    assert any(re.search(why.split(" ")[0], line) for line in inspected(tmp_path / "hf").obstacles)


def test_another_quantisation_is_refused(tmp_path):
    folders.make(tmp_path / "hf", "gpt_oss", quantization_config=dict(quant_method="awq"))
    with pytest.raises(ValueError, match=r"known are quant_method 'mxfp4' and quant_method 'fp8' with fmt 'e4m3'"):
        load_hf(tmp_path / "hf")
