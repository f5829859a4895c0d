"""Laws of the families: a config means the same here and there, and what has no meaning here is refused by name."""

import dataclasses
import math

import numpy as np
import pytest
from drills.folders import CASES, LATENT, LONGROPE, OWN_ROPE, SHARPENED, YARN, config_of, model_of

from moe_jax.config import LongRopeConfig, ModelConfig, YarnConfig, default, validate
from moe_jax.huggingface.config_in import from_hf
from moe_jax.huggingface.config_out import choose, to_hf
from moe_jax.huggingface.families import FAMILIES
from moe_jax.huggingface.family import without
from moe_jax.huggingface.tensors import copies, tensors
from moe_jax.model.abstract import abstract_weights
from moe_jax.model.block import layout
from moe_jax.runtime.leaves import describe_leaves

KINDS = "full_attention", "sliding_attention"


@pytest.mark.parametrize("case", CASES)
def test_a_config_that_goes_out_and_comes_back_is_the_same(case):
    family, config = model_of(config_of(case))
    hf = to_hf(family, config, "float32", {})
    assert model_of(hf) == (family, config)
    written = next(f for f in FAMILIES if f.architecture == (family.written_as or family.architecture))
    assert choose(config, family.architecture) is choose(config, origin=family.architecture) is written


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_our_parameters_each_slice_once(case):
    # every element of every leaf is in one part of one tensor
    extra = dict(num_nextn_predict_layers=2) if case == "deepseek_v3" else {}
    family, config = model_of(config_of(case, **extra))
    abstract = describe_leaves(abstract_weights(config))
    elements, seen = dict.fromkeys(abstract, 0), set()
    for tensor in tensors(family, config):
        for part in tensor.parts:
            shape = abstract[part.leaf][0][len(part.at) :]
            assert (part.leaf, part.at) not in seen
            seen.add((part.leaf, part.at))
            assert list(np.empty(tensor.view)[part.span].transpose(part.order).shape) == shape
            elements[part.leaf] += int(math.prod(shape))
    for leaf, (shape, _) in abstract.items():
        absent = leaf.startswith("bias/") and not family.has_bias
        assert elements[leaf] == (0 if absent else math.prod(shape)), leaf


def test_a_family_may_have_other_names_for_the_same_tensors():
    family, config = model_of(config_of("qwen3_moe"))
    names = {
        "model.embed_tokens.weight": "wte.weight",
        "self_attn.q_proj.weight": "attn.wq.weight",
        "mlp.gate.weight": "moe.router.weight",
    }
    other = family._replace(renamed=names, experts="moe.expert_{}", expert_names=("w1", "w3", "w2"))
    theirs = {tensor.name: tensor.parts for tensor in tensors(other, config)}
    ours = {tensor.name: tensor.parts for tensor in tensors(family, config)}
    assert list(theirs.values()) == list(ours.values())
    assert {"wte.weight", "model.layers.1.attn.wq.weight", "model.layers.1.moe.router.weight"} <= theirs.keys()
    assert "model.layers.1.moe.expert_3.w2.weight" in theirs
    assert copies(other, config) == {"lm_head.weight": "wte.weight"}  # its embeddings are tied


def test_kimi_k2_is_deepseek_v3():
    keys = dict(model_type="kimi_k2", n_group=1, topk_group=1, rope_parameters=None, rope_theta=50000.0)
    keys["rope_scaling"] = OLD | dict(factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale_all_dim=1.0)  # as published
    family, config = model_of(config_of("deepseek_v3", **keys))
    assert family.architecture == "DeepseekV3ForCausalLM"
    assert (config.score, config.num_groups, config.yarn.beta_fast) == ("sigmoid", 1, 1.0)


@pytest.mark.parametrize(
    ("case", "keys", "rotated"),
    [
        ("glm4_moe", {}, 0.5),  # its default
        ("glm4_moe", dict(rope_parameters=dict(partial_rotary_factor=0.25)), 0.25),
        ("minimax_m2", {}, 0.5),  # 4 dimensions of 8
        ("minimax_m2", dict(rotary_dim=None), 1.0),
        ("solar_open", dict(partial_rotary_factor=0.5), 0.5),
    ],
)
def test_the_part_of_a_head_that_rotates_is_read_by_all_its_names(case, keys, rotated):
    family, config = model_of(config_of(case, **keys))
    assert config.partial_rotary_factor == rotated
    assert model_of(to_hf(family, config, "float32", {}))[1] == config


def test_windows_that_no_layer_uses_are_no_obstacle():
    # as transformers writes dots1 and Qwen2-MoE
    full = dict(layer_types=["full_attention"] * 2)
    assert model_of(config_of("dots1", sliding_window=8, **full))[1] == model_of(config_of("dots1"))[1]
    assert from_hf(config_of("dots1", sliding_window=8, max_window_layers=2)) == from_hf(config_of("dots1"))
    assert from_hf(config_of("qwen2_moe", **full)) == from_hf(config_of("qwen2_moe"))


def test_a_shared_expert_as_wide_as_a_routed_one_has_no_width_of_its_own():
    family, config = model_of(config_of("qwen2_moe", shared_expert_intermediate_size=8))  # as wide as the others
    plain = dataclasses.replace(config, shared_ffw_dim=0)
    assert choose(plain, "qwen2_moe") is family
    assert to_hf(family, plain, "float32", {}) == to_hf(family, config, "float32", {})


@pytest.mark.parametrize(
    ("case", "keys", "kinds"),
    [
        ("hy_v3", {}, "dmmmmm"),
        ("glm4_moe_lite", dict(first_k_dense_replace=2), "ddmmmm"),
        ("hy_v3", dict(mlp_layer_types=["dense", "sparse"] * 3), "dmdmdm"),
        ("ernie4_5_moe", dict(moe_layer_start_index=2), "ddmmmm"),
        ("ernie4_5_moe", dict(moe_layer_start_index=2, moe_layer_interval=2, moe_layer_end_index=-1), "dddmdm"),
        ("ernie4_5_moe", dict(moe_layer_start_index=0, moe_layer_interval=3), "ddmddm"),
    ],
)
def test_which_layers_of_other_families_have_experts(case, keys, kinds):
    family, config = model_of(config_of(case, num_hidden_layers=6, **keys))
    assert "".join(kind[0] for run in layout(config) for kind in run.kinds * run.repeats) == kinds
    assert model_of(to_hf(family, config, "float32", {}))[1] == config


@pytest.mark.parametrize(
    ("case", "keys", "pattern"),
    [
        ("exaone_moe", dict(sliding_window_pattern=4), "LLLG"),
        ("exaone_moe", dict(sliding_window_pattern="LLG"), "LLG"),
        ("exaone_moe", dict(layer_types=["sliding_attention"] * 6), "L"),
        ("afmoe", dict(layer_types=None, global_attn_every_n_layers=3), "LLG"),
        ("mellum", dict(layer_types=None), ""),  # no layer has a window
        ("mellum", dict(layer_types=["full_attention", *["sliding_attention"] * 4, "full_attention"]), "GLLLL"),
        ("granitemoe_swa", dict(layer_types=None, layer_rope_theta=None), "GLLL"),
        ("flint", dict(layer_types=None), "GGLLL"),  # GGLLLG
    ],
)
def test_which_layers_have_a_window(case, keys, pattern):
    dense = dict(mlp_layer_types=["sparse"] * 6) if case == "mellum" else {}
    family, config = model_of(config_of(case, num_hidden_layers=6, **dense, **keys))
    assert (config.window, config.window_pattern) == ((3, pattern) if pattern else (0, "L"))
    assert model_of(to_hf(family, config, "float32", {}))[1] == config


@pytest.mark.parametrize(
    ("case", "keys", "rope"),
    [
        ("exaone_moe", {}, ("local", 10000.0, 0.0)),
        ("mellum", {}, ("all", 50000.0, 1000.0)),
        ("mellum", dict(rope_parameters=dict.fromkeys(KINDS, YARN)), ("all", 50000.0, 0.0)),
        ("granitemoe_swa", {}, ("local", 100.0, 0.0)),
        ("granitemoe_swa", dict(layer_rope_theta=[100.0, 50.0] * 2), ("all", 50.0, 100.0)),
        ("granitemoe_swa", dict(layer_rope_theta=[100.0] * 4), ("all", 100.0, 0.0)),
    ],
)
def test_which_rope_layers_have(case, keys, rope):
    family, config = model_of(config_of(case, **keys))
    assert (config.rope_layers, config.rope_theta, config.local_rope.theta) == rope
    assert model_of(to_hf(family, config, "float32", {}))[1] == config


def test_deepseek_v2_ranks_groups_by_their_best_expert_and_v3_by_two():
    assert model_of(config_of("deepseek_v2"))[1].group_top == 1
    assert model_of(config_of("deepseek_v3"))[1].group_top == 2
    assert model_of(config_of("deepseek_v2_lite"))[1].num_groups == 1  # greedy knows no groups


OLD = dict(type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=0.7)


def test_rope_is_read_by_its_old_and_its_new_keys():
    new = model_of(config_of("deepseek_v3"))[1]
    old = model_of(config_of("deepseek_v3", rope_parameters=None, rope_scaling=OLD, rope_theta=50000.0))[1]
    assert new == old
    assert (old.rope_theta, old.yarn) == (50000.0, YarnConfig(4.0, 16, 32.0, 1.0, 1.0, 0.7))
    family, plain = model_of(config_of("deepseek_v3", rope_parameters=SHARPENED | dict(truncate=False)))
    assert not plain.yarn.truncate and model_of(to_hf(family, plain, "float32", {}))[1] == plain


def test_rope_is_written_by_its_old_and_its_new_keys():
    family, config = model_of(config_of("deepseek_v3"))
    hf = to_hf(family, config, "float32", {})
    for key in ("rope_scaling", "rope_parameters"):
        assert hf[key].items() >= SHARPENED.items()
    assert hf["rope_theta"] == 50000.0 and hf["rope_scaling"]["type"] == "yarn"


def test_longrope_is_read_and_written_by_its_old_and_its_new_keys():
    family, config = model_of(config_of("phimoe"))
    old = {"type": "longrope"} | without(LONGROPE, "rope_type", "rope_theta")  # as published
    keys = dict(rope_parameters=None, rope_scaling=old, rope_theta=1000.0, original_max_position_embeddings=128)
    assert model_of(config_of("phimoe", **keys, architectures=["PhiMoEForCausalLM"])) == (family, config)
    assert config.longrope.short_factor == (1.0, 1.25, 1.5, 3.0) and config.longrope.original_length == 128
    hf = to_hf(family, config, "float32", {})
    for key in ("rope_scaling", "rope_parameters"):
        assert hf[key].items() >= LONGROPE.items()
    assert hf["rope_scaling"]["type"] == "longrope"


def test_a_window_of_every_layer_is_no_list_of_layers():
    family, config = model_of(config_of("phimoe", sliding_window=3))
    assert (config.window, config.window_pattern) == (3, "L")
    written = to_hf(family, config, "float32", {})
    assert written["sliding_window"] == 3 and "layer_types" not in written
    assert model_of(config_of("phimoe", sliding_window=None))[1].window == 0


def test_without_a_theta_it_is_that_of_the_family():
    assert from_hf(config_of("mixtral"))[1]["rope_theta"] == 1e6
    assert from_hf(config_of("olmoe"))[1]["rope_theta"] == 1e4


@pytest.mark.parametrize(
    ("keys", "kinds"),
    [
        (dict(mlp_only_layers=[0, 1]), "ddmmmm"),
        (dict(mlp_only_layers=[], decoder_sparse_step=2), "dmdmdm"),
        (dict(mlp_only_layers=[0], decoder_sparse_step=1), "dmmmmm"),
        (dict(mlp_only_layers=[0, 1, 3, 4]), "ddmddm"),
        (dict(mlp_only_layers=[1], decoder_sparse_step=2), "dddmdm"),
    ],
)
def test_which_layers_of_qwen3_have_experts(keys, kinds):
    family, config = model_of(config_of("qwen3_moe", num_hidden_layers=6, **keys))
    assert "".join(kind[0] for run in layout(config) for kind in run.kinds * run.repeats) == kinds
    written = to_hf(family, config, "float32", {})
    assert model_of(written)[1] == config
    assert written["mlp_only_layers"] == [i for i, kind in enumerate(kinds) if kind == "d"]


@pytest.mark.parametrize("dense", [[2], [0, 2, 3], list(range(6))])
def test_layers_that_we_cannot_arrange_are_refused(dense):
    with pytest.raises(ValueError, match=r"mlp_only_layers=\["):
        from_hf(config_of("qwen3_moe", num_hidden_layers=6, mlp_only_layers=dense))


REFUSED = [
    ("mixtral", dict(hidden_act="gelu"), "hidden_act='gelu'"),
    ("mixtral", dict(sliding_window=4096), "sliding_window=4096"),
    ("qwen3_moe", dict(use_sliding_window=True, sliding_window=10), "sliding_window=10"),
    ("qwen3_moe", dict(attention_bias=True), "attention_bias=True"),
    ("qwen3_moe", dict(layer_types=["sliding_attention"]), "layer_types="),
    ("olmoe", dict(clip_qkv=8.0), "clip_qkv=8.0"),
    ("deepseek_v2", dict(norm_topk_prob=True), "norm_topk_prob=True"),
    ("deepseek_v2", dict(topk_method="noaux_tc"), "topk_method='noaux_tc'"),
    ("deepseek_v2", dict(mlp_bias=True), "mlp_bias=True"),
    ("deepseek_v3", dict(scoring_func="softmax"), "scoring_func='softmax'"),
    ("deepseek_v3", dict(topk_method="greedy"), "topk_method='greedy'"),
    ("deepseek_v3", dict(moe_layer_freq=2), "moe_layer_freq=2"),
    ("deepseek_v3", dict(rope_interleave=False), "rope_interleave=False"),
    ("deepseek_v3", dict(num_key_value_heads=1), "num_key_value_heads=1"),
    ("deepseek_v3", dict(rope_parameters=dict(rope_type="llama3", factor=8.0)), "type 'llama3'"),
    ("deepseek_v3", dict(rope_parameters=SHARPENED | dict(attention_factor=2.0)), "attention_factor=2.0"),
    ("deepseek_v3", dict(rope_parameters=SHARPENED | dict(mscale=None)), "mscale=None and mscale_all_dim=0.7"),
    ("qwen3_moe", dict(rope_parameters=SHARPENED), "mscale_all_dim=0.7, which Qwen3MoeForCausalLM does not read"),
    ("olmoe", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("olmoe", dict(num_nextn_predict_layers=1), "num_nextn_predict_layers=1, a key that OlmoeForCausalLM"),
    ("qwen2_moe", dict(layer_types=["full_attention", "sliding_attention"]), "layer_types="),
    ("dots1", dict(sliding_window=8, max_window_layers=1), "sliding_window=8"),
    ("glm4_moe", dict(rope_parameters=dict(partial_rotary_factor=0.25), partial_rotary_factor=0.5), "different parts"),
    ("minimax_m2", dict(rotary_dim=4, partial_rotary_factor=1.0), "different parts of a head"),
    ("minimax_m2", dict(partial_rotary_factor="half"), "partial_rotary_factor='half', which must be a number"),
    ("minimax_m2", dict(attn_type_list=[1, 0]), r"attn_type_list=\[1, 0\]"),
    ("glm4_moe", dict(use_qk_norm="yes"), "use_qk_norm='yes', which must be True or False"),
    ("solar_open", dict(first_k_dense_replace=1), "first_k_dense_replace=1"),
    ("hy_v3", dict(mlp_layer_types=["sparse", "dense"]), "mlp_layer_types="),
    ("hy_v3", dict(mlp_layer_types=["dense", "moe"]), "must be a list of 'dense' or 'sparse'"),
    ("glm4_moe_lite", dict(mlp_layer_types=["sparse", "sparse"]), "say different things"),
    ("ernie4_5_moe", dict(moe_layer_end_index=0), "moe_layer_end_index=0"),
    ("ernie4_5_moe", dict(use_bias=True), "use_bias=True"),
    ("flex_olmo", dict(model_type="dbrx"), "nearest that we do have is MixtralForCausalLM, which lacks LayerNorm"),
    ("phimoe", dict(rope_parameters=YARN), "type 'yarn'; known are 'default' and 'longrope'"),
    ("mixtral", dict(rope_parameters=LONGROPE), "type 'longrope'; known are 'default' and 'yarn'"),
    ("phimoe", dict(rope_parameters=without(LONGROPE, "long_mscale")), "LongRoPE without long_mscale"),
    ("phimoe", dict(rope_parameters=LONGROPE | dict(factor=8.0)), "'longrope' with factor=8.0"),
    ("phimoe", dict(original_max_position_embeddings=64), "of which programs read the one or the other"),
    ("phimoe", dict(layer_types=["full_attention"] * 2), "layer_types="),
    ("phimoe", dict(architectures=["PhiForCausalLM"]), r"architectures=\['PhiForCausalLM'\]"),
    ("mixtral", dict(use_strange_norm=True), "use_strange_norm=True, a key that MixtralForCausalLM is not known"),
    ("mixtral", dict(architectures=["LlamaForCausalLM"]), r"architectures=\['LlamaForCausalLM'\]"),
    ("mixtral", dict(model_type="llama"), "model_type='llama'"),
    ("mixtral", dict(hidden_size=None), "has no hidden_size"),
    ("qwen3_moe", dict(use_qk_norm=False), "use_qk_norm=False"),
    ("qwen3_moe", dict(num_hidden_layers=10**9), "num_hidden_layers=1000000000, which must be an integer from 0"),
    ("qwen3_moe", dict(num_hidden_layers="4"), "num_hidden_layers='4', which must be an integer"),
    ("qwen3_moe", dict(decoder_sparse_step=[2]), r"decoder_sparse_step=\[2\], which must be an integer"),
    ("qwen3_moe", dict(mlp_only_layers=3), "mlp_only_layers=3, which must be a list"),
    ("deepseek_v3", dict(num_nextn_predict_layers="1"), "num_nextn_predict_layers='1', which must be an integer"),
    ("deepseek_v3", dict(num_mtp_layers=2, num_nextn_predict_layers=1), "which are one key"),
    ("deepseek_v3", dict(routed_scaling_factor=None), "has no routed_scaling_factor"),
    ("deepseek_v3", dict(n_group=None), "has no n_group"),
    ("deepseek_v3", dict(rope_scaling=SHARPENED | dict(factor=8.0)), "mean different things"),
    ("olmoe", dict(rope_parameters=dict(rope_type="default", factor=8.0)), "'default' with factor=8.0"),
    ("olmoe", dict(rope_scaling=[2.0]), r"rope_scaling=\[2.0\], which must be an object"),
    ("exaone_moe", dict(layer_types=["full_attention"] * 4), "only layers with a sliding window have RoPE"),
    ("exaone_moe", dict(layer_types=["sliding_attention"]), "for each of num_hidden_layers=4"),
    ("exaone_moe", dict(sliding_window=None), "has no sliding_window"),
    ("exaone_moe", dict(sliding_window_pattern="LS"), "sliding_window_pattern='LS'"),
    ("afmoe", dict(layer_types=["chunked_attention"] * 4), "'sliding_attention' or 'full_attention'"),
    ("afmoe", dict(score_func="softmax"), "score_func='softmax'"),
    ("mellum", dict(rope_parameters=dict(full_attention=YARN)), "without rope_theta of 'sliding_attention'"),
    ("mellum", dict(rope_parameters=dict(full_attention=OWN_ROPE, sliding_attention=YARN)), "YaRN in layers with a"),
    ("mellum", dict(rope_parameters=dict.fromkeys(KINDS, YARN | dict(truncate=False))), "truncate=false for a kind"),
    ("laguna", dict(num_attention_heads_per_layer=[2, 4, 2, 4]), r"num_attention_heads_per_layer=\[2, 4, 2, 4\]"),
    ("laguna", dict(moe_router_logit_softcapping=3.0), "moe_router_logit_softcapping=3.0"),
    ("granitemoe_swa", dict(layer_rope_theta=[10.0, 0.0, 20.0, 0.0]), "layer_rope_theta="),
    ("granitemoe_swa", dict(layer_rope_theta=[[10.0], 0.0, 10.0, 0.0]), "must have a number for each layer"),
    ("granitemoe_swa", dict(layer_rope_theta=[0.0, 10.0, 0.0, 10.0]), "RoPE in all layers with a sliding window"),
    ("granitemoe_swa", dict(shared_intermediate_size=8), "shared_intermediate_size=8"),
]


@pytest.mark.parametrize(("case", "keys", "words"), REFUSED, ids=lambda v: v if isinstance(v, str) else "")
def test_what_our_model_does_not_have_is_refused_by_name(case, keys, words):
    with pytest.raises(ValueError, match=words):
        from_hf(config_of(case, **keys))


@pytest.mark.parametrize(
    "keys",
    [
        dict(auto_map={"AutoModel": "modeling.Evil"}),  # code that comes along is never run
        dict(router_aux_loss_coef=0.1, output_router_logits=True, use_cache=True, attention_dropout=0.1),
        dict(a_future_flag=False, another=None),
    ],
)
def test_keys_that_change_no_logit_change_nothing(keys):
    assert from_hf(config_of("mixtral", **keys)) == from_hf(config_of("mixtral"))


def v3(**keys):
    """Our config of the V3 case with keys changed."""
    return dataclasses.replace(model_of(config_of("deepseek_v3"))[1], **keys)


def phimoe(**keys):
    """Our config of the Phi-3.5-MoE case with keys changed."""
    return dataclasses.replace(model_of(config_of("phimoe"))[1], **keys)


OUT = [
    (v3(score="sqrt_softplus"), "score='sqrt_softplus'"),
    (v3(num_zero_experts=2), "num_zero_experts=2"),
    (v3(class_starts=(5,)), r"class_starts=\(5,\)"),
    (v3(latent_dim=16), "latent_dim=16"),
    (v3(activation="geglu"), "activation='geglu'"),
    (v3(norm="layer"), "norm='layer'"),
    (v3(head_bias=True), "head_bias=True"),
    (v3(normalize_gates=False, sparsemixer=0.1), "sparsemixer=0.1"),
    (v3(longrope=LongRopeConfig(short_factor=(1.0, 2.0))), "longrope="),
    (phimoe(sparsemixer=0.0), "sparsemixer=0.0"),
    (phimoe(top_k=3), "top_k=3"),
    (phimoe(norm="rms"), "norm='rms'"),
    (phimoe(window=3, window_pattern="LG"), "window_pattern='LG'"),
    (phimoe(longrope=LongRopeConfig(short_factor=(1.0,) * 4)), "longrope.long_factor"),
    (v3(activation_limit=10.0), "activation_limit=10.0"),
    (v3(num_shared_experts=0), "num_shared_experts=0"),
    (v3(group_top=1), "group_top=1"),
    (v3(moe_every=2, num_layers=3), "moe_every=2"),
    (ModelConfig(), "num_experts=0"),
    (validate(default(model=dict(num_experts=4, qk_norm="projection", num_shared_experts=1))).model, "and no other"),
]


@pytest.mark.parametrize(("config", "words"), OUT, ids=lambda v: v if isinstance(v, str) else "")
def test_what_no_family_holds_is_refused_by_name(config, words):
    with pytest.raises(ValueError, match=words):
        choose(config)


def test_a_named_family_that_does_not_hold_the_model_says_why():
    with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot hold a model with .*attention='mla'"):
        choose(v3(), "mixtral")
    with pytest.raises(ValueError, match="'LlamaForCausalLM' is not a known family"):
        choose(v3(), "LlamaForCausalLM")


def test_a_model_without_windows_goes_to_a_family_without_any_where_there_is_one():
    qwen = model_of(config_of("qwen3_moe"))[1]
    assert choose(qwen).architecture == "Qwen3MoeForCausalLM"
    assert choose(qwen, "mellum").architecture == "MellumForCausalLM"
    assert choose(dataclasses.replace(qwen, window=4)).architecture == "MellumForCausalLM"


def test_a_model_that_several_families_hold_is_not_guessed():
    # the same model under other keys and names of tensors
    lite = model_of(config_of("glm4_moe_lite"))[1]
    with pytest.raises(ValueError, match="DeepseekV3ForCausalLM, Glm4MoeLiteForCausalLM can all hold this model"):
        choose(lite)
    assert choose(lite, origin="Glm4MoeLiteForCausalLM").architecture == "Glm4MoeLiteForCausalLM"
    assert choose(lite, "deepseek_v3", origin="Glm4MoeLiteForCausalLM").architecture == "DeepseekV3ForCausalLM"
    with pytest.raises(
        ValueError, match=r"Glm4MoeLiteForCausalLM cannot .* score='softmax', though it came from there"
    ):
        choose(dataclasses.replace(lite, score="softmax"), origin="Glm4MoeLiteForCausalLM")


# keys of which the weights know nothing, those of training alone or of zero experts, and one that exported weights have
# in them (tests/model/test_folding.py)
APART = {field.name for field in dataclasses.fields(ModelConfig) if field.metadata.get("changes")}
APART |= {"quantization", "router_jitter", "random_second", "zero_share", "scaling"}
OF_ATTENTION = {
    "gqa": {"num_kv_heads", "head_dim", "qk_norm", "qkv_bias", "partial_rotary_factor"},
    "mla": {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"},
}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.architecture)
def test_every_key_of_our_model_is_written_or_the_only_one_that_the_family_holds(family):
    # a key in none of these could be anything, and would be lost
    read = {key.ours for key in family.keys} | family.holds.keys() | {"rope_theta", "yarn"}
    read |= {"first_dense", "moe_every"} if family.layers is not None else set()
    read |= {"partial_rotary_factor"} if family.partial is not None else set()
    read |= {"mtp_depth"} if family.predicts else set()
    read |= {"group_top"} if family.holds.get("num_groups") == (1,) else set()
    read |= {"ffw_dim"} if family.holds.get("first_dense") == (0,) and family.holds.get("moe_every") == (1,) else set()
    read |= {"top_groups"} if family.holds.get("num_groups") == (1,) else set()
    without_windows = family.holds.get("window") == (0,)  # then a rule allows only the defaults of these
    read |= {"window_pattern", "rope_layers", "local_rope"} if family.windows is not None or without_windows else set()
    read |= {"longrope"} if "longrope" in family.rope_types else set()
    read |= {"embedding_multiplier"} if family.scales_by_width else set()
    read |= {"gate_activation"} if family.holds.get("attention_gate") == ("none",) else set()
    other = OF_ATTENTION["mla" if family.fixed["attention"] == "gqa" else "gqa"]
    ours = {field.name for field in dataclasses.fields(ModelConfig)}
    assert ours - APART - other - read == set()


def test_groups_that_limit_nothing_are_no_obstacle():
    config = dataclasses.replace(model_of(config_of("mixtral"))[1], num_groups=2, top_groups=2, group_top=1)
    assert choose(config, "mixtral").architecture == "MixtralForCausalLM"


def test_published_configs_are_understood():
    # DeepSeek-V3's own keys, as published; 61 layers, of which 3 are dense, and one module ahead
    hf = dict(LATENT, architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", hidden_act="silu")
    hf |= dict(num_hidden_layers=61, first_k_dense_replace=3, num_nextn_predict_layers=1, moe_layer_freq=1, ep_size=1)
    hf |= dict(scoring_func="sigmoid", topk_method="noaux_tc", norm_topk_prob=True, aux_loss_alpha=0.001, seq_aux=True)
    hf |= dict(quantization_config=dict(quant_method="fp8"), pretraining_tp=1, tie_word_embeddings=False)
    hf |= dict(rope_theta=10000, rope_scaling=OLD | dict(factor=40, beta_fast=32, beta_slow=1, mscale_all_dim=1.0))
    ours = from_hf(hf)[1]
    assert (ours["num_layers"], ours["first_dense"], ours["mtp_depth"]) == (61, 3, 1)
    assert ours["yarn"]["factor"] == 40 and ours["normalize_gates"] is True


def test_every_family_is_one_of_the_cases():
    used = {model_of(config_of(case))[0].architecture for case in CASES}
    assert used == {family.architecture for family in FAMILIES}
