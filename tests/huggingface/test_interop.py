"""Laws of weights in and out, without torch: every bit comes back, and what does not belong is refused by name."""

import json
import os
import re
import shutil
import tracemalloc
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import vocabularies
from drills import folders, rig
from drills.folders import KINDS

from configs import from_checkpoint
from conftest import tiny_config
from moe_jax import evaluate
from moe_jax.config import validate
from moe_jax.convert import run
from moe_jax.data import open_corpus, prepare, training_batches
from moe_jax.huggingface import LanguageModel, load_hf, save_hf, shards
from moe_jax.huggingface.folders import to_folder, to_workdir
from moe_jax.huggingface.model import positions_in
from moe_jax.huggingface.shards import open_folder
from moe_jax.huggingface.weights import refuse_balance
from moe_jax.mesh import make_mesh
from moe_jax.model.abstract import abstract_weights
from moe_jax.runtime.checkpoint import Checkpointer, restore, restore_weights
from moe_jax.runtime.files import new_folder
from moe_jax.runtime.leaves import describe_leaves
from moe_jax.runtime.slices import open_newest
from moe_jax.runtime.workdir import config_of_run
from moe_jax.text import model as generate
from moe_jax.training import evaluation, loop
from moe_jax.training.compile import make_train_step
from moe_jax.training.start import start
from moe_jax.training.state import TrainState, abstract_state, initial_balance, read_bias


def stored(folder):
    """name -> (dtype, bytes) of every tensor of a folder."""
    return {name: (e.dtype, shards.read(e).tobytes()) for name, e in open_folder(folder).items()}


@pytest.mark.parametrize(("kind", "dtype"), [*((kind, "bfloat16") for kind in KINDS), ("deepseek_v3", "float32")])
def test_every_bit_comes_back_through_a_workdir(kind, dtype, tmp_path):
    case, keys = KINDS[kind]
    folders.make(tmp_path / "hf", case, dtype, shard_bytes=20_000, **keys)
    to_workdir(tmp_path / "hf", tmp_path / "run")
    to_folder(tmp_path / "run", tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "hf")
    of = [json.loads((tmp_path / name / "config.json").read_text())["architectures"] for name in ("hf", "back")]
    written = folders.model_of(json.loads((tmp_path / "hf/config.json").read_text()))[0].written_as
    assert of[1] == ([written] if written else of[0])  # although other families could hold it, too


@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v3, untied, one ahead"])
def test_every_bit_comes_back_through_a_model(kind, tmp_path):
    case, keys = KINDS[kind]
    folders.make(tmp_path / "hf", case, "bfloat16", **keys)
    save_hf(load_hf(tmp_path / "hf"), tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "hf")
    ours, theirs = (folders.model_of(json.loads((tmp_path / d / "config.json").read_text())) for d in ("back", "hf"))
    assert ours == theirs


def test_a_router_that_is_wider_than_the_rest_keeps_every_bit(tmp_path):
    def widen(values):
        for name in values:
            if name.endswith("mlp.gate.weight"):
                values[name] = values[name].astype(np.float32) + np.float32(1e-7)

    folders.make(tmp_path / "hf", "deepseek_v3", "bfloat16", change=widen)
    model = load_hf(tmp_path / "hf")
    assert model.config.param_dtype == "bfloat16"
    save_hf(model, tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "hf")


# --- dtypes ---------------------------------------------------------------------------------------------------


def test_half_precision_is_read_as_float32_which_loses_nothing(tmp_path):
    values = folders.make(tmp_path / "hf", "olmoe", "float16")
    model = load_hf(tmp_path / "hf")
    assert model.config.param_dtype == "float32"
    np.testing.assert_array_equal(model.params["embedding"], values["model.embed_tokens.weight"].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_that_is_asked_for_is_that_of_all_but_router_and_bias(dtype, tmp_path):
    folders.make(tmp_path / "hf", "deepseek_v3", "bfloat16" if dtype == "float32" else "float32")
    model = load_hf(tmp_path / "hf", dtype)
    kinds = {name: kind for name, (_, kind) in describe_leaves(dict(params=model.params, bias=model.bias)).items()}
    apart = {name for name in kinds if name.endswith(("/router", "/bias"))}
    assert {kinds[name] for name in apart} == {"float32"}
    assert {kinds[name] for name in kinds.keys() - apart} == {dtype}


def test_the_bias_is_carried_in_float32_whatever_the_dtype(tmp_path):
    values = folders.make(tmp_path / "hf", "deepseek_v3", "bfloat16")
    bias = values["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert not np.array_equal(bias, bias.astype(ml_dtypes.bfloat16).astype(np.float32))
    model = load_hf(tmp_path / "hf", "bfloat16")
    np.testing.assert_array_equal(read_bias(model.bias), bias[None])
    save_hf(model, tmp_path / "back", dtype="bfloat16")
    kind, data = stored(tmp_path / "back")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert (kind, data) == ("F32", bias.tobytes())


BLOCK = (4, 6)  # neither divides every shape
FLOAT8 = dict(quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=list(BLOCK)))


@pytest.fixture
def float8(tmp_path):
    """A folder of DeepSeek's float8, and its tensors."""
    values = folders.make(
        tmp_path / "hf", "deepseek_v3", "bfloat16", change=lambda v: folders.as_float8(v, BLOCK), **FLOAT8
    )
    return tmp_path / "hf", values


def test_float8_is_the_product_with_its_blocks_scale(float8):
    folder, values = float8
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    narrow, scale = values[name].astype(np.float32), values[name + "_scale_inv"]
    expected = np.array([[narrow[i, j] * scale[i // 4, j // 6] for j in range(16)] for i in range(8)])
    up = load_hf(folder, "float32").params["stacks"][1]["blocks"][0]["ffw"]["up"]
    np.testing.assert_array_equal(up[0, 3], expected.T)
    assert load_hf(folder).config.param_dtype == "bfloat16"


def test_float8_comes_back_as_bfloat16(float8, tmp_path):
    folder, values = float8
    to_workdir(folder, tmp_path / "run")
    to_folder(tmp_path / "run", tmp_path / "back")
    back = stored(tmp_path / "back")
    assert {kind for name, (kind, _) in back.items() if not name.endswith("bias")} == {"BF16"}
    assert back.keys() == {name for name in values if not name.endswith("_scale_inv")}
    once = {name: value.tobytes() for name, value in values.items() if value.dtype == ml_dtypes.bfloat16}
    assert {name: data for name, (_, data) in back.items() if name in once} == once
    to_workdir(tmp_path / "back", tmp_path / "again")
    to_folder(tmp_path / "again", tmp_path / "twice")
    assert stored(tmp_path / "twice") == back


# --- what does not belong -------------------------------------------------------------------------------------


def drop(name):
    return lambda values: values.pop(name)


def put(name, value):
    return lambda values: values.update({name: value})


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
WRONG = {
    "a missing tensor": (drop(UP), {}, rf"lacks tensors .*{UP} \[8, 16\]"),
    "one too many": (
        put("model.layers.0.mlp.experts.0.up_proj.weight", np.zeros((8, 16), np.float32)),
        {},
        "is not in the model of config",
    ),
    "a bias of attention": (put("model.layers.0.self_attn.q_proj.bias", np.zeros(3, np.float32)), {}, "q_proj.bias"),
    "another shape": (put(UP, np.zeros((8, 17), np.float32)), {}, rf"{UP} .*\[8, 17\], but .* \[8, 16\]"),
    "a transposed tensor": (put(UP, np.zeros((16, 8), np.float32)), {}, rf"{UP} .*\[16, 8\], but .* \[8, 16\]"),
    "a scale without float8": (put(UP + "_scale_inv", np.ones((1, 1), np.float32)), {}, "is F32, and needs no"),
    "more layers than there are": (None, dict(num_hidden_layers=3), r"lacks tensors .*model\.layers\.2\."),
    "more layers than fit anywhere": (None, dict(num_hidden_layers=10**9), r"lacks tensors .*model\.layers\.2\."),
    "more experts than fit anywhere": (None, dict(n_routed_experts=4 * 10**8), r"correction_bias .*\[8\], but"),
    "a width of text": (None, dict(hidden_size="16"), r"model\.embed_dim='16' must be an integer"),
    "no experts": (None, dict(n_routed_experts=0), "cannot hold a model with num_experts=0"),
    "a group of experts too many": (None, dict(n_group=3), "model.num_experts=8 must be divisible"),
    "float8 without a config": (
        lambda v: folders.as_float8(v, BLOCK),
        dict(quantization_config=None),
        "is float8, but config.json has no quantization_config",
    ),
    "a quantisation that is no object": (
        None,
        dict(quantization_config=["fp8"]),
        r"\['fp8'\], which must be an object",
    ),
    "a number that no float holds": (
        None,
        dict(rope_theta=10**400, rope_parameters=None),
        "rope_theta=inf must be a fi",
    ),
    "a theta of text": (None, dict(rope_theta="x", rope_parameters=None), "rope_theta='x' must be a number"),
    "a bias that is not finite": (put(BIAS, np.full(8, np.nan, np.float32)), {}, rf"{BIAS} has 8 values that are not"),
    "another quantisation": (None, dict(quantization_config=dict(quant_method="awq")), "quant_method 'fp8' with fmt"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_belong_is_refused_by_name_and_nothing_is_left(name, tmp_path):
    change, keys, words = WRONG[name]
    values = folders.make(tmp_path / "good", "deepseek_v3")
    if change is not None:
        change(values)
    folders.write(tmp_path / "hf", folders.config_of("deepseek_v3", **keys), values)
    with pytest.raises(ValueError, match=words):
        to_workdir(tmp_path / "hf", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good", "hf"]


def test_a_scale_of_another_shape_is_refused(float8):
    folder, values = float8
    values[UP + "_scale_inv"] = np.ones((1, 1), np.float32)
    shutil.rmtree(folder)
    folders.write(folder, folders.config_of("deepseek_v3", **FLOAT8), values)
    with pytest.raises(ValueError, match=r"_scale_inv has shape \[1, 1\], but blocks of \[4, 6\] make it \[2, 3\]"):
        load_hf(folder)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_no_quotient_of_largest_values_is_refused(scale, float8):
    folder, values = float8
    values[UP + "_scale_inv"][0, 0] = scale
    shutil.rmtree(folder)
    folders.write(folder, folders.config_of("deepseek_v3", **FLOAT8), values)
    with pytest.raises(ValueError, match="_scale_inv has 1 values that are not finite and not negative"):
        load_hf(folder)


def test_a_vector_in_float8_is_refused(float8):
    folder, values = float8
    values["model.norm.weight"] = values["model.norm.weight"].astype(ml_dtypes.float8_e4m3fn)
    values["model.norm.weight_scale_inv"] = np.ones(4, np.float32)
    shutil.rmtree(folder)
    folders.write(folder, folders.config_of("deepseek_v3", **FLOAT8), values)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is float8, but only matrices can be"):
        load_hf(folder)


def test_multi_token_prediction_is_read_if_it_is_there_whole(tmp_path):
    values = folders.make(tmp_path / "whole", "deepseek_v3", num_nextn_predict_layers=1)
    assert load_hf(tmp_path / "whole").config.mtp_depth == 1
    bare = {name: value for name, value in values.items() if ".layers.2." not in name}
    hf = folders.config_of("deepseek_v3", num_nextn_predict_layers=1)
    folders.write(tmp_path / "bare", hf, bare)  # as transformers writes it
    assert load_hf(tmp_path / "bare").config.mtp_depth == 0
    values.pop("model.layers.2.eh_proj.weight")
    folders.write(tmp_path / "part", hf, values)
    with pytest.raises(ValueError, match=r"lacks tensors .*model\.layers\.2\.eh_proj\.weight \[16, 32\]"):
        load_hf(tmp_path / "part")


def test_modules_ahead_that_transformers_does_not_read_are_left_out_and_told(tmp_path, capsys):
    values = folders.make(tmp_path / "bare", "hy_v3")
    ahead = {"model.layers.2.eh_proj.weight": np.zeros((16, 32), np.float32)}
    folders.write(tmp_path / "hf", folders.config_of("hy_v3", num_nextn_predict_layers=1), values | ahead)
    run(tmp_path / "hf", tmp_path / "run", None, "")
    assert "left out 1 tensors of multi-token prediction" in capsys.readouterr().out
    to_folder(tmp_path / "run", tmp_path / "back")
    assert stored(tmp_path / "back") == stored(tmp_path / "bare")
    folders.write(tmp_path / "other", folders.config_of("hy_v3"), values | ahead)  # which has no such module
    with pytest.raises(ValueError, match=r"eh_proj\.weight .* is not in the model of config"):
        load_hf(tmp_path / "other")


def test_a_copy_that_differs_is_refused_and_one_that_is_missing_is_not(tmp_path):
    values = folders.make(tmp_path / "whole", "deepseek_v3", num_nextn_predict_layers=1)
    hf, name = folders.config_of("deepseek_v3", num_nextn_predict_layers=1), "model.layers.2.shared_head.head.weight"
    folders.write(tmp_path / "other", hf, values | {name: values[name] + 1})
    with pytest.raises(ValueError, match=rf"{name} \[264, 16\] must be a copy of lm_head\.weight"):
        load_hf(tmp_path / "other")
    values.pop(name)
    folders.write(tmp_path / "without", hf, values)
    assert load_hf(tmp_path / "without").config.mtp_depth == 1


# --- biases that a family has no place for --------------------------------------------------------------------


def with_bias(folder, value):
    """A Mixtral with such a bias in every layer."""
    folders.make(folder, "mixtral")
    model = load_hf(folder)
    filled = jax.tree.map(lambda b: jnp.broadcast_to(jnp.asarray(value, jnp.float32), b.shape), model.bias)
    return LanguageModel(model.config, model.params, filled, folder)


def test_a_bias_that_would_be_lost_is_refused_by_name(tmp_path):
    model = with_bias(tmp_path / "hf", [0.0, 0.0, 0.5, 0.0])
    with pytest.raises(ValueError, match=r"MixtralForCausalLM has no place for a selection bias, but bias/stacks/0"):
        save_hf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_bias_that_is_the_same_for_all_experts_picks_nothing_and_may_be_lost(tmp_path):
    save_hf(with_bias(tmp_path / "hf", 0.5), tmp_path / "out")
    assert stored(tmp_path / "out") == stored(tmp_path / "hf")


@pytest.mark.parametrize("balance", [dict(hash={}), dict(bias_multiplicative={})])
def test_a_run_that_picks_experts_otherwise_is_not_exported(balance):
    with pytest.raises(ValueError, match="it cannot be exported"):
        refuse_balance(tiny_config(balance=balance))


def test_a_run_that_picks_by_scores_plus_bias_in_inference_is_exported():
    refuse_balance(tiny_config(balance=dict(bias_sign={}, aux_loss={})))
    refuse_balance(tiny_config(balance={}))


# --- memory, files --------------------------------------------------------------------------------------------


def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(tmp_path):
    keys = dict(num_local_experts=48, intermediate_size=256, hidden_size=64, head_dim=8)
    values = folders.make(tmp_path / "hf", "mixtral", **keys)
    largest, total = max(v.nbytes for v in values.values()), sum(v.nbytes for v in values.values())
    assert total > 100 * largest
    del values
    peaks = []
    for convert, *where in ((to_workdir, "hf", "run"), (to_folder, "run", "back")):
        tracemalloc.start()
        convert(*(tmp_path / d for d in where))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert max(peaks) < 8 * largest + 4 * 10**6 < total / 2  # 4 MB: the imports, the plan of the tensors


def test_the_tokenizers_files_go_along_both_ways(tmp_path):
    folders.make(tmp_path / "hf", "mixtral")
    files = {
        "tokenizer.json": "{}",
        "tokenizer_config.json": '{"a": 1}',
        "chat_template.jinja": "{{x}}",
        "vocab.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / "hf" / name).write_text(text)
    (tmp_path / "hf" / "modeling_mixtral.py").write_text("raise SystemExit")
    to_workdir(tmp_path / "hf", tmp_path / "run")
    assert {p.name for p in (tmp_path / "run" / "tokenizer").iterdir()} == {*files, "config.json"}
    to_folder(tmp_path / "run", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {*files, "config.json", "model.safetensors"}
    for name, text in files.items():
        assert (tmp_path / "back" / name).read_text() == text
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (64, 2)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Two steps of a Qwen3-MoE on a corpus of a trained vocabulary, whose separator was given by a flag."""
    root = tmp_path_factory.mktemp("spoken")
    (root / "text").mkdir()
    (root / "text" / "a.jsonl").write_text('{"text": "the cat sat on the mat, the hat"}\n' * 40)
    settings = dict(
        tokenizer_config=dict(bos_token="<|begin|>", pad_token=dict(content="<think>"), model_max_length=99),
        generation_config=dict(eos_token_id=[1], temperature=0.1),
        config=dict(max_position_embeddings=77),
    )
    vocabularies.write(root / "vocabulary", vocabularies.byte_level(), **settings)
    options = prepare.Options(root / "text", root / "corpus", tokenizer=str(root / "vocabulary"), separator="<|end|>")
    prepare.prepare(options)
    model = dict(vocab_size=304, score="softmax", num_shared_experts=0, qk_norm="head", first_dense=0)
    balance = dict(aux_loss=dict(weight=1e-3))
    config = tiny_config(num_steps=2, model=model, balance=balance, data=dict(path=str(root / "corpus")))
    loop.run(config, root / "run", quiet=True)
    return root


def test_a_run_on_a_trained_vocabulary_is_exported_with_it(spoken, tmp_path, capsys):
    run(spoken / "run", tmp_path / "hf", None, "")
    assert "no tokenizer.json was written" not in capsys.readouterr().out
    config, generation, settings = (
        json.loads((tmp_path / "hf" / f"{name}.json").read_text())
        for name in ("config", "generation_config", "tokenizer_config")
    )
    ids = dict(bos_token_id=1, eos_token_id=1, pad_token_id=300)
    assert generation == ids
    assert ids.items() <= config.items()
    assert config["max_position_embeddings"] == 16  # of this model, not of that which the vocabulary came with
    assert (settings["bos_token"], settings["pad_token"]) == ("<|end|>", "<think>")
    assert "model_max_length" not in settings
    assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (spoken / "vocabulary" / "tokenizer.json").read_bytes()


def test_transformers_reads_the_tokenizer_of_an_exported_run(spoken, tmp_path):
    transformers = pytest.importorskip("transformers")
    run(spoken / "run", tmp_path / "hf", None, "")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "hf"))
    ours = open_corpus(str(spoken / "corpus")).tokenizer
    for text in vocabularies.TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist()
    assert (theirs.bos_token_id, theirs.pad_token_id) == (1, 300)
    assert transformers.GenerationConfig.from_pretrained(str(tmp_path / "hf")).eos_token_id == 1


def test_an_exported_run_that_comes_back_speaks_as_before(spoken, tmp_path):
    run(spoken / "run", tmp_path / "hf", None, "")
    run(tmp_path / "hf", tmp_path / "back", None, "")
    corpus = open_corpus(str(spoken / "corpus"))
    for workdir in (spoken / "run", tmp_path / "back"):
        tokenizer, opened = generate.tokenizer_of(workdir, config_of_run(workdir))
        assert (tokenizer.name, tokenizer.ends, opened) == (corpus.tokenizer.name, (1,), True)
        assert generate.known_length(workdir, config_of_run(workdir)) == 16


@pytest.mark.parametrize("corpus", ["there", "gone"])
def test_an_older_run_takes_its_tokenizer_from_the_corpus_or_says_that_it_has_none(spoken, tmp_path, corpus, capsys):
    run(spoken / "run", tmp_path / "new", None, "")
    shutil.copytree(spoken / "run", tmp_path / "run", ignore=shutil.ignore_patterns("tokenizer"))
    if corpus == "gone":
        (spoken / "corpus").rename(spoken / "moved")
    try:
        run(tmp_path / "run", tmp_path / "hf", None, "")
    finally:
        if corpus == "gone":
            (spoken / "moved").rename(spoken / "corpus")
    if corpus == "gone":
        said = capsys.readouterr().out.splitlines()[-1]
        assert said.startswith("no tokenizer.json was written: the run's tokenizer is in its corpus, and data.path=")
        return
    assert (tmp_path / "hf" / "tokenizer.json").is_file()
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {p.name for p in (tmp_path / "new").iterdir()}
    for file in (tmp_path / "new").iterdir():
        assert file.read_bytes() == (tmp_path / "hf" / file.name).read_bytes()


def test_a_run_on_bytes_is_exported_with_the_word_that_no_tokenizer_goes_along(tmp_path, capsys):
    model = dict(score="softmax", num_shared_experts=0, qk_norm="head", first_dense=0)
    loop.run(tiny_config(num_steps=1, model=model, data=dict(eval_sequences=1)), tmp_path / "run", quiet=True)
    run(tmp_path / "run", tmp_path / "hf", None, "")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "no tokenizer.json was written: the model's tokens are bytes, and 256 opens a document"


def test_weights_beside_the_index_of_another_save_are_named(tmp_path, capsys):
    folders.make(tmp_path / "hf", "mixtral")
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002"}}')
    run(tmp_path / "hf", tmp_path / "run", None, "")
    assert (
        "read model.safetensors, as transformers does; ignored model.safetensors.index.json" in capsys.readouterr().out
    )


def test_a_tokenizers_file_may_not_lead_out_of_its_folder(tmp_path):
    folders.make(tmp_path / "hf", "mixtral")
    (tmp_path / "secret").write_text("s")
    (tmp_path / "hf" / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"tokenizer\.json is a link to .*secret, out of the folder"):
        to_workdir(tmp_path / "hf", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_templates_go_along_from_a_hugging_face_cache_and_from_nowhere_else(tmp_path):
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    folders.make(snapshot, "mixtral")
    blobs.mkdir()
    (blobs / "123").write_text("{{x}}")
    (snapshot / "additional_chat_templates").mkdir()
    (snapshot / "additional_chat_templates" / "tool.jinja").symlink_to(blobs / "123")
    to_workdir(snapshot, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer" / "additional_chat_templates" / "tool.jinja").read_text() == "{{x}}"
    outside = tmp_path / "outside"
    shutil.move(snapshot / "additional_chat_templates", outside)
    (outside / "tool.jinja").unlink()
    (outside / "tool.jinja").write_text("secret")
    (snapshot / "additional_chat_templates").symlink_to(outside)
    with pytest.raises(ValueError, match=r"tool\.jinja is a link to .*outside/tool\.jinja, out of the folder"):
        to_workdir(snapshot, tmp_path / "again")


# --- half-written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_a_conversion_that_fails_on_the_way(error, tmp_path, monkeypatch):
    folders.make(tmp_path / "hf", "mixtral")
    count, real = iter(range(100)), shards.read

    def read(entry):
        if next(count) == 7:
            raise error
        return real(entry)

    monkeypatch.setattr(shards, "read", read)
    with pytest.raises(error):
        to_workdir(tmp_path / "hf", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_nothing_is_left_of_a_folder_in_which_a_thread_still_writes(tmp_path, monkeypatch):
    late, real = tmp_path / ".run.partial" / "inner" / "late", os.rmdir

    def rmdir(*args, **keys):
        monkeypatch.undo()
        late.write_text("by a thread, just before its folder goes")
        real(*args, **keys)

    def interrupted():
        with new_folder(tmp_path / "run") as partial:
            (partial / "inner").mkdir()
            monkeypatch.setattr(os, "rmdir", rmdir)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path):
    folders.make(tmp_path / "hf", "mixtral")
    left = tmp_path / ".run.partial" / "checkpoints" / "00000000"
    left.mkdir(parents=True)
    (left / "junk").write_text("half")
    to_workdir(tmp_path / "hf", tmp_path / "run")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    assert not list((tmp_path / "run").rglob("junk"))


@pytest.mark.parametrize("there", ["a file", "a full folder", "a link"])
def test_a_target_that_is_there_is_left_alone(there, tmp_path):
    folders.make(tmp_path / "hf", "mixtral")
    target = tmp_path / "run"
    if there == "a file":
        target.write_text("mine")
    elif there == "a link":
        target.symlink_to(tmp_path / "hf")
    else:
        target.mkdir()
        (target / "mine").touch()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="exists already and is not an empty folder; name another"):
        to_workdir(tmp_path / "hf", target)
    assert sorted(tmp_path.rglob("*")) == before


def test_an_empty_target_is_filled(tmp_path):
    folders.make(tmp_path / "hf", "mixtral")
    (tmp_path / "run").mkdir()
    to_workdir(tmp_path / "hf", tmp_path / "run")
    assert config_of_run(tmp_path / "run").model.num_experts == 4


# --- checkpoints of weights -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A folder `hf` and its workdir `run`."""
    home = tmp_path_factory.mktemp("converted")
    folders.make(home / "hf", "deepseek_v3")
    to_workdir(home / "hf", home / "run")
    return home


def equal(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y) and x.dtype == y.dtype, a, b))


def test_a_converted_checkpoint_has_the_models_weights(converted):
    model, config = load_hf(converted / "hf"), config_of_run(converted / "run")
    assert config.model == model.config
    read, extra = restore_weights(converted / "run" / "checkpoints", abstract_weights(config.model), verify="full")
    assert extra["weights_only"] is True and validate(extra["config"]) == config
    assert equal(read, {"params": model.params, "bias": model.bias})


def test_weights_may_be_cast_when_that_is_asked_for(converted):
    target = abstract_weights(config_of_run(converted / "run").model)
    halved = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), target["params"])
    narrow = target | {"params": halved}
    with pytest.raises(ValueError, match=r"params/embedding: saved float32\[264, 16\], wanted bfloat16\[264, 16\]"):
        restore_weights(converted / "run" / "checkpoints", narrow)
    read, _ = restore_weights(converted / "run" / "checkpoints", narrow, cast=True)
    whole, _ = restore_weights(converted / "run" / "checkpoints", target)
    assert equal(read, whole | {"params": jax.tree.map(lambda a: a.astype(jnp.bfloat16), whole["params"])})


def test_weights_of_another_shape_are_refused(converted):
    target = abstract_weights(config_of_run(converted / "run").model)
    target["params"]["embedding"] = jax.ShapeDtypeStruct((265, 16), jnp.float32)
    try:
        with pytest.raises(ValueError, match=r"saved float32\[264, 16\], wanted float32\[265, 16\]"):
            restore_weights(converted / "run" / "checkpoints", target, cast=True)
    finally:
        target["params"]["embedding"] = jax.ShapeDtypeStruct((264, 16), jnp.float32)


def test_no_run_goes_on_from_weights_only_and_is_told_how_to_start(converted):
    config = config_of_run(converted / "run")
    with pytest.raises(ValueError, match=r"holds weights only, .* --config\.init_from="):
        restore(converted / "run" / "checkpoints", abstract_state(config))


def test_a_run_gives_its_weights_like_a_converted_checkpoint(tmp_path):
    # with a layout on disk of its own, and more than weights
    config = tiny_config(balance=dict(bias_sign={}))
    draw, target = np.random.default_rng(0), abstract_state(config)
    state = jax.tree.map(lambda leaf: jnp.asarray(draw.integers(0, 99, leaf.shape), leaf.dtype), target)
    checkpoints = Checkpointer(tmp_path, 1)
    checkpoints.save(3, state, {})
    checkpoints.close()
    wanted = {name: getattr(target, name) for name in ("params", "bias", "balance")}
    read, _ = restore_weights(tmp_path, wanted)
    assert equal(read, {name: getattr(state, name) for name in wanted})
    step, arrays = open_newest(tmp_path, abstract_weights(config.model))
    assert step == 3
    ffw = state.params["stacks"][1]["blocks"][0]["ffw"]
    np.testing.assert_array_equal(arrays["params/stacks/1/blocks/0/ffw/gate"].read((1, 2)), ffw["gate"][1, 2])


def test_a_damaged_converted_checkpoint_is_not_exported(converted, tmp_path):
    shutil.copytree(converted / "run", tmp_path / "run")
    file = next(f for f in (tmp_path / "run" / "checkpoints").rglob("*") if f.name == "0.0" and "embedding" in str(f))
    os.truncate(file, 10)
    with pytest.raises(ValueError, match=r"embedding/0\.0 has 10 bytes, the manifest says"):
        to_folder(tmp_path / "run", tmp_path / "out")


def test_nothing_is_written_among_the_checkpoints_that_are_read(converted):
    target = converted / "run" / "checkpoints" / "00000000" / "hf"
    with pytest.raises(ValueError, match="is inside the checkpoints that are read"):
        to_folder(converted / "run", target)
    assert not target.exists()


def test_json_that_is_nested_too_deeply_is_told_in_a_sentence(tmp_path):
    (tmp_path / "config.json").write_text("[" * 100_000)
    (tmp_path / "model.safetensors").write_bytes(b"\x02" + bytes(7) + b"{}")
    with pytest.raises(ValueError, match="is not valid JSON"):
        run(tmp_path, tmp_path / "out", None, "")


def test_the_direction_is_told_by_the_input(converted, tmp_path, capsys):
    run(converted / "run", tmp_path / "back", None, "")
    assert stored(tmp_path / "back") == stored(converted / "hf")
    with pytest.raises(ValueError, match="--architecture=mixtral is for conversion to Hugging Face"):
        run(converted / "hf", tmp_path / "no", None, "mixtral")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        run(tmp_path, tmp_path / "no", None, "")
    assert "the model after 0 steps" in capsys.readouterr().out


# --- a model to call ------------------------------------------------------------------------------------------


def test_positions_count_from_each_documents_first_token():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [0, 0, 1, 1, 3, 3]], jnp.int32)
    np.testing.assert_array_equal(positions_in(segments), [[0, 1, 0, 1, 2, 0], [0, 1, 0, 1, 0, 1]])


def test_the_bias_imported_is_the_bias_used(converted):
    # with 9 on experts 0 and 1 of each of two groups out of four, all tokens choose among them
    model = load_hf(converted / "hf")
    tokens = np.arange(24, dtype=np.int32).reshape(2, 12)
    bias = np.asarray(read_bias(model.bias)) + np.float32([9, 9, 0, 0, 9, 9, 0, 0])
    folders_bias = {"model.layers.1.mlp.gate.e_score_correction_bias": bias[0]}
    values = {name: shards.read(entry) for name, entry in open_folder(converted / "hf").items()}
    forced = converted / "forced"
    folders.write(forced, folders.config_of("deepseek_v3"), values | folders_bias)
    chosen, free = (np.asarray(m.expert_ids(tokens)) for m in (load_hf(forced), model))
    assert set(chosen.ravel().tolist()) <= {0, 1, 4, 5}
    assert not set(free.ravel().tolist()) <= {0, 1, 4, 5}


def test_a_model_that_predicts_nothing_ahead_says_so(converted):
    with pytest.raises(ValueError, match="mtp_depth=0"):
        load_hf(converted / "hf").ahead(np.zeros((1, 4), np.int32))


def test_evaluation_of_a_converted_workdir_is_that_of_the_model(converted, tmp_path):
    config, model = config_of_run(converted / "run"), load_hf(converted / "hf")
    config = replace(config, batch_size=8, sequence_length=16, data=replace(config.data, eval_sequences=4))
    evaluate.run(config, converted / "run")
    written = json.loads((converted / "run" / "evaluation.json").read_text())
    state = TrainState(*[jnp.int32(0)] * 3, model.params, {}, model.bias, initial_balance(config))
    assert written == {"step": 0, **evaluation.evaluate(config, state, open_corpus())}
    assert read_bias(state.bias).any()


# --- training on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bias_sign", "aux_loss", "hash"])
def test_training_goes_on_from_converted_weights_with_the_imported_bias(method, converted, tmp_path):
    corpus, model = open_corpus(), load_hf(converted / "hf")
    config = from_checkpoint.get_config(str(converted / "run"))
    config.update(dict(batch_size=8, sequence_length=16, num_steps=4, mesh=dict(data=1)))
    config.optimizer.update(dict(warmup_steps=1))
    config.model.update(dict(num_groups=1, top_groups=1))  # `hash` knows no groups
    config = validate(config.to_dict() | {"balance": {method: {}}})
    state = start(config, make_mesh(config.mesh), tmp_path, corpus).state
    np.testing.assert_array_equal(read_bias(state.bias), read_bias(model.bias))
    batch = training_batches(corpus, seed=0, batch_size=8, sequence_length=16)(0)
    free = LanguageModel(config.model, model.params, model.bias)
    ids = np.asarray(free.expert_ids(batch.tokens, batch.segment_ids, batch.positions))
    loads = np.bincount(ids.ravel(), minlength=9)[:8]
    before = jax.tree.map(np.asarray, state.params)
    state, values = make_train_step(config)(state, batch, jax.random.key(0))
    same = np.isclose(float(values["moe/max_violation"]), loads.max() / loads.mean() - 1, rtol=1e-5)
    assert bool(same) is (method != "hash")  # whose table picks, not the bias
    assert np.isfinite(values["loss"]) and not equal(before, state.params)


def test_a_config_without_a_workdir_says_which_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"configs/from_checkpoint\.py: must name a workdir"):
        from_checkpoint.get_config()
    with pytest.raises(ValueError, match="must name a workdir with config"):
        from_checkpoint.get_config(str(tmp_path))


def test_the_command_tells_a_mistake_in_one_sentence(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    arguments = f"--input={tmp_path / 'hf'}", f"--output={tmp_path / 'run'}"
    command = rig.Command("moe_jax.convert", tmp_path / "log", *arguments)
    assert command.wait() == 2
    first, *rest = command.text.splitlines()
    assert re.match(r"error: .* has neither model\.safetensors nor", first)
    assert not any("Traceback" in line for line in rest)
