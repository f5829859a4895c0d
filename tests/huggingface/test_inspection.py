"""Laws of an inspection: it says what a folder is and all that does not fit, and reads no tensor."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from drills import folders, rig

from moe_jax import convert
from moe_jax.huggingface import inspection, shards
from moe_jax.huggingface.config_in import family_of
from moe_jax.huggingface.families import FAMILIES
from moe_jax.huggingface.others import OTHERS


@pytest.fixture(autouse=True)
def no_tensor_is_read(monkeypatch):
    def refuse(entry):
        raise AssertionError(f"{entry} was read")

    monkeypatch.setattr(shards, "read", refuse)
    monkeypatch.setattr(shards, "digest", refuse)


def test_a_folder_that_fits_is_described_with_its_numbers(tmp_path, capsys):
    folders.make(tmp_path / "hf", "glm4_moe", "bfloat16", num_nextn_predict_layers=1)
    assert convert.inspect(tmp_path / "hf")
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert "Glm4MoeForCausalLM" in first and last.startswith("fits")
    printed = "\n".join(lines)
    assert "2 layers of width 16, 2 heads (1 of keys and values), vocabulary 264" in printed
    assert "8 experts of width 8 in 1 layers, 2 a token, 2 shared of joint width 16" in printed
    assert "1 modules of multi-token prediction" in printed
    assert "BF16" in printed and "F32 2" in printed  # the biases of the layer and of the module


def test_everything_that_does_not_fit_is_listed_at_once(tmp_path, capsys):
    def change(values):
        values.pop("model.norm.weight")
        values["model.layers.0.self_attn.q_proj.bias"] = np.zeros(16, np.float32)
        values["lm_head.weight"] = np.zeros((264, 17), np.float32)

    values = folders.make(tmp_path / "good", "olmoe", change=change)
    folders.write(tmp_path / "keys", folders.config_of("olmoe", clip_qkv=8.0, hidden_act="gelu"), values)
    folders.write(tmp_path / "tensors", folders.config_of("olmoe"), values)
    assert not convert.inspect(tmp_path / "keys")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")]
    assert len(printed) == 2 and "clip_qkv=8.0" in printed[1] and "hidden_act='gelu'" in printed[0]
    assert not convert.inspect(tmp_path / "tensors")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("does not fit: ")]
    assert len(printed) == 3
    for line, words in zip(printed, ("model.norm.weight", "[264, 17] for [264, 16]", "q_proj.bias"), strict=True):
        assert line.startswith("does not fit: 1 tensors") and words in line


def test_a_config_without_its_weights_is_reported_as_one(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(folders.config_of("mixtral")))
    assert not convert.inspect(tmp_path)
    printed = capsys.readouterr().out
    assert "MixtralForCausalLM" in printed and "4 experts" in printed and "does not fit" in printed


def test_a_config_of_more_layers_than_there_are_tensors_ends_soon(tmp_path):
    values = folders.make(tmp_path / "good", "mixtral")
    folders.write(tmp_path / "hf", folders.config_of("mixtral", num_local_experts=4 * 10**8), values)
    found = inspection.inspected(tmp_path / "hf").obstacles
    assert any("tensors that config.json requires are missing" in obstacle for obstacle in found)


def test_a_workdir_and_an_empty_folder_are_told_to_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"--inspect=.* has no config\.json"):
        convert.inspect(tmp_path)
    (tmp_path / "config.json").write_text('{"model": {}}')
    with pytest.raises(ValueError, match="is a workdir and must be a Hugging Face folder"):
        convert.inspect(tmp_path)


@pytest.mark.parametrize("kind", OTHERS)
def test_a_family_that_we_do_not_have_is_refused_with_the_nearest_that_we_do(kind):
    with pytest.raises(ValueError, match=f"model_type='{kind}', a family with experts") as caught:
        family_of({"architectures": ["OfThisForCausalLM"], "model_type": kind})
    assert OTHERS[kind].lacks in str(caught.value) and OTHERS[kind].nearest in str(caught.value)
    assert OTHERS[kind].nearest in {family.architecture for family in FAMILIES}


def test_every_family_with_experts_of_transformers_is_ours_or_named():
    # a causal model whose file has a class of experts
    auto = pytest.importorskip("transformers.models.auto.modeling_auto", reason="needs transformers")
    beside_experts: set[str] = set()
    for file in Path(auto.__file__).parents[1].glob("*/modeling_*.py"):
        text = file.read_text()
        if re.search(r"^class \w*(Experts|MoE)\b", text, re.M):
            beside_experts |= set(re.findall(r"^class (\w+)", text, re.M))
    theirs = {kind for kind, name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items() if name in beside_experts}
    ours = {kind for family in FAMILIES for kind in family.model_types} - {"kimi_k2"}  # DeepSeek-V3 in transformers
    assert not ours & OTHERS.keys()
    assert theirs == ours | OTHERS.keys()


def test_the_command_ends_with_status_1_where_something_does_not_fit(tmp_path):
    (tmp_path / "config.json").write_text('{"architectures": ["DbrxForCausalLM"], "model_type": "dbrx"}')
    command = rig.Command("moe_jax.convert", tmp_path / "log", f"--inspect={tmp_path}")
    assert command.wait() == 1
    assert "no family that we have" in command.text and "nearest that we do have is Mixtral" in command.text


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--input=x"], "--output is missing; give"), (["--inspect=x", "--output=y"], "--inspect reads a folder")],
)
def test_flags_that_do_not_belong_together_are_told(flags, words, tmp_path):
    command = rig.Command("moe_jax.convert", tmp_path / "log", *flags)
    assert command.wait() == 2 and words in command.text
