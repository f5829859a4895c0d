"""Bad input is refused early, with a sentence that has the key, the value, the rule and a fix."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
from drills import rig

from conftest import HANG_SECONDS
from moe_jax.config import MeshConfig, as_dict, default, resolve, validate
from moe_jax.data import prepare
from moe_jax.training.loop import run

CONFIG = rig.drill_config()
EXPERTS = dict(num_experts=8, top_k=2)
LONG = dict(short_factor=(1.0, 2.0))
WINDOW = dict(window=4, window_pattern="LG")

# --- through validate -----------------------------------------------------------------------------------------

BAD = [
    # overrides, what the sentence names, a word of the fix
    (dict(num_step=3), "num_step", "did you mean 'num_steps'"),
    (dict(model=dict(topk=2)), "model.topk", "did you mean 'top_k'"),
    (dict(model=dict(hidden=2)), "model.hidden", "the keys of model are"),
    (dict(optimiser={}), "optimiser", "did you mean 'optimizer'"),
    (dict(balance=dict(bias_sgn={})), "bias_sgn", "did you mean 'bias_sign'"),
    (dict(balance=dict(bias_sign=dict(rat=1.0))), "balance.bias_sign.rat", "did you mean 'rate'"),
    (dict(num_steps="many"), "num_steps='many'", "write it as int"),
    (dict(num_steps=1.5), "num_steps=1.5", "an integer"),
    (dict(num_steps=True), "num_steps=True", "an integer"),
    (dict(num_steps=None), "num_steps=None", "an integer"),
    (dict(optimizer=dict(learning_rate="1e-3")), "optimizer.learning_rate='1e-3'", "write it as float"),
    (dict(optimizer=dict(learning_rate=float("nan"))), "optimizer.learning_rate=nan", "finite"),
    (dict(optimizer=dict(learning_rate=float("inf"))), "optimizer.learning_rate=inf", "finite"),
    (dict(optimizer=dict(learning_rate=-1.0)), "optimizer.learning_rate=-1.0", "raise it"),
    (dict(optimizer=dict(b1=1.0)), "optimizer.b1=1.0", "try 0.95"),
    (dict(optimizer=dict(eps=0.0)), "optimizer.eps=0.0 must be above 0", "try 1e-8"),
    (dict(optimizer=dict(eps=1e-46)), "optimizer.eps=1e-46 must be above 0 in float32", "try 1e-8"),  # it would be 0
    (dict(optimizer=dict(rounding="stochastic")), "optimizer.rounding='stochastic'", "set one of them to 'bfloat16'"),
    (dict(optimizer=dict(warmup_steps=2000)), "optimizer.warmup_steps=2000", "try 100"),
    (dict(optimizer=dict(schedule="cosin")), "optimizer.schedule='cosin'", "did you mean 'cosine'"),
    (dict(optimizer=dict(milestones=0.5)), "optimizer.milestones=0.5", "write (0.5,)"),
    (dict(optimizer=dict(schedule="multistep", milestones=(0.9, 0.8))), "optimizer.milestones", "try (0.8, 0.9)"),
    (dict(optimizer=dict(schedule="wsd", warmup_steps=900)), "optimizer.decay_fraction=0.2", "lower one"),
    (dict(optimizer=dict(moment_dtype="float16")), "optimizer.moment_dtype='float16'", "bfloat16"),
    (dict(model=dict(qk_norm=1)), "model.qk_norm=1", "'head'"),
    (dict(model=dict(partial_rotary_factor=0.1)), "model.partial_rotary_factor=0.1 of model.head_dim=32", "try 0.0625"),
    (dict(model=dict(partial_rotary_factor=0.3)), "model.partial_rotary_factor=0.3 of model.head_dim=32", "try 0.25"),
    (dict(model=dict(attention="mla", qkv_bias=True)), "model.qkv_bias=True", "set model.qkv_bias=False"),
    (dict(model=dict(attention="mla", attention_multiplier=0.5)), "model.attention_multiplier=0.5", "multiplier=0.0"),
    (dict(model=dict(num_experts=4, shared_gate=True)), "model.shared_gate=True", "set model.num_shared_experts=1"),
    (dict(model=dict(num_experts=4, shared_ffw_dim=8)), "model.shared_ffw_dim=8", "set model.num_shared_experts=1"),
    (dict(model=dict(activation="relu2", activation_limit=7.0)), "model.activation_limit=7.0", "activation_limit=0.0"),
    (dict(model=dict(attention="mla", index_topk=64)), "sequence_length=128", "model.index_topk=64"),
    (
        dict(model=dict(EXPERTS, select_by="logits"), balance=dict(quantile={})),
        "balance.quantile works with model.select_by='scores' only, but it is 'logits'",
        "another method",
    ),
    (
        dict(model=dict(EXPERTS, router_bias=True), balance=dict(frozen_router={})),
        "balance.frozen_router works with model.router_bias=False only",
        "another method",
    ),
    (dict(model=3), "model=3", "dict"),
    (dict(model=None), "model=None", "dict"),
    (dict(balance="bias_sign"), "balance='bias_sign'", "write balance=dict("),
    (dict(balance=dict(bias_sign=1e-3)), "balance.bias_sign=0.001", "bias_sign=dict()"),
    (dict(balance=dict(bias_sign={}, second=dict(method="bias_sign"))), "bias_sign and second", "remove"),
    (dict(balance=dict(bias=dict(method="bias_sign"))), "balance.bias", "choose another"),
    (dict(balance={"a.b": dict(method="aux_loss")}), "balance.a.b", "one word"),
    (dict(balance=dict(bias_sign=dict(schedule="linear"))), "balance.bias_sign.schedule='linear'", "freeze_step"),
    (dict(balance=dict(bias_sign=dict(warmup_steps=9, freeze_step=3))), "warmup_steps=9", "lower"),
    (dict(balance=dict(aux_loss=dict(weight=-1.0))), "balance.aux_loss.weight=-1.0", "raise it"),
    (dict(balance=dict(aux_loss=dict(scope="batch"))), "balance.aux_loss.scope='batch'", "microbatch"),
    (dict(balance=dict(z_loss={}), model=dict(num_experts=0)), "model.num_experts=0", "set balance={}"),
    (dict(batch_size=0), "batch_size=0", "raise it"),
    (dict(batch_size=8, micro_batches=3), "micro_batches=3", "try 6 or 9"),
    (dict(log_every=0), "log_every=0", "raise it"),
    (dict(save_every=-1), "save_every=-1", "raise it"),
    (dict(sequence_length=0), "sequence_length=0", "raise it"),
    (dict(seed=-1), "seed=-1", "raise it"),
    (dict(branch_from="trunk"), "branch_from='trunk' must be WORKDIR@STEP", "'runs/trunk@1000'"),
    (dict(branch_from="trunk@last"), "branch_from='trunk@last' must be WORKDIR@STEP", "'runs/trunk@1000'"),
    (dict(branch_from="@5"), "branch_from='@5' must be WORKDIR@STEP", "'runs/trunk@1000'"),
    (dict(branch_from="a@5@", num_steps=9), "branch_from='a@5@' must be WORKDIR@STEP", "'runs/trunk@1000'"),
    (dict(branch_from="trunk@-1"), "branch_from='trunk@-1' must be WORKDIR@STEP", "'runs/trunk@1000'"),
    (dict(branch_from="trunk@9", num_steps=9), "num_steps=9 must be above the step of branch_from='trunk@9'", "raise"),
    (dict(branch_from="trunk@5", init_from="other"), "branch_from='trunk@5' and init_from='other'", "leave one of"),
    (dict(seed=2**31), "seed=2147483648", "lower it"),
    (dict(model=dict(num_heads=4, num_kv_heads=3)), "model.num_kv_heads=3", "try 3 or 6"),
    (dict(model=dict(head_dim=7)), "model.head_dim=7", "try 8"),
    (dict(model=dict(window=-1)), "model.window=-1", "raise it"),
    (dict(model=dict(window=4, window_pattern="LS")), "model.window_pattern='LS'", "write 'L', or 'LLLG'"),
    (dict(model=dict(window=4, window_pattern="G")), "model.window_pattern='G'", "write 'L', or 'LLLG'"),
    (dict(model=dict(window=4, window_pattern="")), "model.window_pattern=''", "write 'L', or 'LLLG'"),
    (dict(model=dict(window_pattern="LG")), "model.window=0 makes all of them global", "set model.window, or"),
    (dict(model=dict(rope_layers="local")), "model.rope_layers='local'", "set model.window, or"),
    (dict(model=dict(WINDOW, local_rope=dict(theta=0.5))), "model.local_rope.theta=0.5", "a base such as 10000.0"),
    (
        dict(model=dict(WINDOW, local_rope=dict(partial_rotary_factor=0.5))),
        "model.local_rope.theta=0.0 gives them that of the others",
        "set model.local_rope.theta, or",
    ),
    (
        dict(model=dict(WINDOW, local_rope=dict(theta=10.0, partial_rotary_factor=0.1))),
        "model.local_rope.partial_rotary_factor=0.1 of model.head_dim=32",
        "try 1.0",
    ),
    (
        dict(model=dict(WINDOW, rope_layers="local", local_rope=dict(theta=10.0))),
        "model.local_rope.theta=10.0 is another RoPE",
        "set model.local_rope.theta=0.0",
    ),
    (dict(model=dict(gate_activation="softplus")), "model.attention_gate='none'", "set model.attention_gate='element'"),
    (dict(model=dict(attention="mla", attention_sinks=True)), "model.attention_sinks=True", "attention_sinks=False"),
    (dict(model=dict(attention="mla", attention_gate="head")), "model.attention_gate='head'", "attention_gate='none'"),
    (dict(model=dict(attention="mla", out_bias=True)), "model.out_bias=True", "model.out_bias=False"),
    (dict(model=dict(WINDOW, attention="mla", rope_layers="local")), "model.rope_layers='local'", "rope_layers='all'"),
    (dict(model=dict(norm_after=True, sandwich_norm=True)), "model.sandwich_norm=True", "set one of them to False"),
    (dict(model=dict(norm="batch")), "model.norm='batch'", "'rms', 'layer'"),
    (dict(model=dict(head_dim=8, longrope=LONG)), "model.longrope.short_factor=(1.0, 2.0)", "give 4 numbers, or ()"),
    (
        dict(model=dict(head_dim=4, longrope=dict(short_factor=(1.0, 0.0)))),
        "model.longrope.short_factor=(1.0, 0.0) must have a number above 0",
        "give 2 numbers",
    ),
    (
        dict(model=dict(head_dim=4, longrope=dict(LONG, long_factor=(1.0,)))),
        "model.longrope.long_factor=(1.0,)",
        "give 2 numbers, or ()",
    ),
    (
        dict(model=dict(longrope=dict(short_mscale=2.0))),
        "model.longrope.short_mscale=2.0",
        "set model.longrope.short_factor, or model.longrope=dict()",
    ),
    (
        dict(model=dict(head_dim=4, longrope=LONG, yarn=dict(factor=2.0))),
        "model.yarn.factor=2.0",
        "set model.longrope.short_factor=() or model.yarn.factor=1.0",
    ),
    (
        dict(model=dict(head_dim=4, longrope=LONG), sequence_length=5000),
        "sequence_length=5000 must be at most model.longrope.original_length=4096",
        "lower it",
    ),
    (dict(model=dict(EXPERTS, sparsemixer=0.01)), "model.sparsemixer=0.01", "set model.normalize_gates=False"),
    (dict(model=dict(num_experts=8, top_k=9)), "model.top_k=9", "lower top_k"),
    (dict(model=dict(EXPERTS, num_groups=3)), "model.num_groups=3", "try 6 or 9"),
    (dict(model=dict(EXPERTS, num_groups=2, top_groups=3)), "model.top_groups=3", "lower top_groups"),
    (dict(model=dict(num_experts=8, top_k=4, num_groups=4)), "model.top_k=4", "raise top_groups"),
    (dict(model=dict(EXPERTS, num_groups=8, top_groups=2)), "model.group_top=2", "fewer groups"),
    (dict(model=dict(EXPERTS, num_layers=2, first_dense=2)), "model.first_dense=2", "lower them"),
    (dict(model=dict(EXPERTS, top_k=1)), "model.normalize_gates=True", "set model.normalize_gates=False"),
    (dict(model=dict(num_experts=8, top_k=3, random_second=True)), "model.random_second=True", "set top_k=2"),
    (dict(model=dict(EXPERTS, router_jitter=1.0)), "model.router_jitter=1.0", "lower it"),
    (dict(anticipation=dict(delay=1)), "model.num_experts=0", "set anticipation.delay=0"),
    (dict(model=EXPERTS, anticipation=dict(spike=3.0)), "anticipation.spike=3.0", "anticipation.delay to 1"),
    (
        dict(model=EXPERTS, anticipation=dict(delay=2), balance=dict(random={})),
        "anticipation.delay=2",
        "set anticipation.delay=0",
    ),
    (dict(model=dict(EXPERTS, capacity_factor=0.0)), "model.capacity_factor=0.0", "raise it"),
    (dict(model=dict(EXPERTS, score="relu")), "model.score='relu'", "sigmoid"),
    (dict(model=dict(remat_keep=("rows",))), "model.remat_keep=('rows',)", "set model.remat='names'"),
    (dict(model=dict(remat_offload=("rows",))), "model.remat_offload=('rows',)", "set model.remat='names'"),
    (dict(model=dict(remat="names", remat_keep=())), "model.remat_keep=()", "set model.remat='full'"),
    (dict(model=dict(remat="names", remat_keep=("rows",) * 2)), "model.remat_keep=('rows', 'rows')", "write one"),
    (dict(model=dict(remat="names", remat_keep=("row",))), "model.remat_keep='row'", "did you mean 'rows'"),
    (dict(model=dict(remat="names", remat_offload=("hidden",))), "model.remat_offload=('hidden',)", "add them"),
    (dict(model=dict(dispatch="locl")), "model.dispatch='locl'", "did you mean 'local'"),
    (dict(model=dict(param_dtype="float64")), "model.param_dtype='float64'", "float32"),
    (dict(mesh=dict(data=0)), "mesh.data=0", "set mesh.data=1"),
    (dict(mesh=dict(expert=-2)), "mesh.expert=-2", "raise it"),
    (dict(mesh=dict(data=-1, expert=-1)), "mesh.data and mesh.expert are -1", "give the others"),
    (dict(batch_size=6, model=EXPERTS, mesh=dict(expert=3)), "model.num_experts=8", "try model.num_experts=6 or 9"),
    (dict(mesh=dict(tensor=3)), "model.num_heads=4", "or another mesh.tensor"),
    (dict(model=dict(num_heads=4, num_kv_heads=1), mesh=dict(tensor=2)), "model.num_kv_heads=1", "mesh.tensor"),
    (
        dict(model=dict(num_heads=4), mesh=dict(tensor=2, sequence=4)),
        "model.num_heads=4 must be divisible by mesh.tensor=2 x mesh.sequence=4",
        "try model.num_heads=8, or another mesh.tensor or mesh.sequence",
    ),
    (
        dict(sequence_length=130, mesh=dict(sequence=4)),
        "sequence_length=130 must be divisible by mesh.sequence=4",
        "try sequence_length=128 or 132",
    ),
    (
        dict(model=dict(EXPERTS, embed_dim=132), batch_size=8, mesh=dict(data=8, sequence=4)),
        "model.embed_dim=132 must be divisible by mesh.data=8 x mesh.sequence=4",
        "try model.embed_dim=128 or 160",
    ),
    (
        dict(model=dict(EXPERTS, dispatch="capacity"), mesh=dict(sequence=2)),
        "model.dispatch='capacity' needs whole sequences on a device, but mesh.sequence=2 splits them",
        "'auto'",
    ),
    (dict(model=dict(ffw_dim=511), mesh=dict(tensor=2)), "model.ffw_dim=511", "try model.ffw_dim=510 or 512"),
    (dict(model=dict(EXPERTS, expert_ffw_dim=5), mesh=dict(tensor=2)), "model.expert_ffw_dim=5", "4 or 6"),
    (
        dict(model=dict(EXPERTS, latent_dim=12), mesh=dict(data=8)),
        "model.latent_dim=12",
        "try model.latent_dim=8 or 16",
    ),
    (dict(batch_size=24, model=EXPERTS, mesh=dict(data=24)), "model.embed_dim=128", "or another mesh.data"),
    (dict(batch_size=12, mesh=dict(data=8)), "12 rows at a time", "try batch_size=8 or 16"),
    (dict(batch_size=8, micro_batches=2, mesh=dict(replica=8)), "4 rows at a time", "try batch_size=16"),
    (dict(model=dict(EXPERTS, dispatch="local"), mesh=dict(expert=2)), "model.dispatch='local'", "'auto'"),
    (dict(checkpoint=dict(keep=0)), "checkpoint.keep=0", "raise it"),
    (dict(checkpoint=dict(verify="no")), "checkpoint.verify='no'", "full"),
    (dict(data=dict(path=3)), "data.path=3", "a string"),
    (dict(model=dict(scaling=dict(base_width=-1))), "model.scaling.base_width=-1", "raise it"),
    (dict(model=dict(scaling=dict(base_head_dim=16))), "model.scaling.base_width=0 is none", "or base_head_dim=0"),
    (
        dict(model=dict(scaling=dict(base_width=32, base_expert_ffw_dim=16))),
        "model.scaling.base_expert_ffw_dim=16",
        "set it to 0",
    ),
    (
        dict(model=dict(scaling=dict(base_width=32, base_kv_lora_rank=16))),
        "model.scaling.base_kv_lora_rank=16",
        "set it to 0",
    ),
    (dict(model=dict(scaling=dict(depth_exponent=0.5))), "model.scaling.base_depth=0", "or depth_exponent=1.0"),
    (dict(model=dict(scaling=dict(base_depth=2, depth_exponent=0.4))), "depth_exponent=0.4", "raise it"),
    (
        dict(model=dict(attention_multiplier=0.1, scaling=dict(base_width=32, base_head_dim=16))),
        "model.attention_multiplier=0.1",
        "set one of them to 0",
    ),
    (
        dict(
            model=dict(scaling=dict(base_width=32)), optimizer=dict(method="muon", muon=dict(parts=("head", "dense")))
        ),
        "model.scaling.base_width=32",
        "leave them to AdamW",
    ),
    (dict(data=dict(weights=dict(austen="much"))), "data.weights.austen='much'", "a number"),
    (dict(data=dict(weights=[1, 2])), "data.weights=[1, 2]", "dict"),
    (dict(data=dict(eval_sequences=-1)), "data.eval_sequences=-1", "raise it"),
]


@pytest.mark.parametrize(("overrides", "names", "fix"), BAD, ids=[f"{n}:{b[1]}" for n, b in enumerate(BAD)])
def test_a_bad_config_is_refused_with_key_value_and_fix(overrides, names, fix):
    overrides = dict(overrides)
    if "balance" in overrides and "model" not in overrides:
        overrides["model"] = dict(EXPERTS)
    with pytest.raises(ValueError, match=r".") as caught:
        validate(overrides)
    message = str(caught.value)
    assert names in message
    assert fix in message
    assert message.endswith((".", "?"))
    assert "\n" not in message


BAD_DEVICES = [  # overrides, devices, platform, what the sentence names, its fix
    (dict(batch_size=16, mesh=dict(data=16)), 8, "cpu", "needs 16 devices, but there are 8", "change the sizes"),
    (dict(mesh=dict(expert=3)), 8, "cpu", "a multiple of 3 devices", "change the sizes"),
    (dict(model=EXPERTS), 3, "cpu", "model.embed_dim=128", "or another mesh.data"),
    (dict(mesh=dict(data=1, sequence=-1)), 3, "cpu", "model.num_heads=4", "or another mesh.sequence"),
    (dict(), 3, "cpu", "8 rows at a time", "try batch_size=6 or 9, or a mesh of at most 8 of these"),
    (dict(batch_size=4), 8, "cpu", "4 rows at a time", "try batch_size=8"),
    (dict(model=dict(EXPERTS, dispatch="ragged")), 8, "cpu", "model.dispatch='ragged'", "'rounds'"),
]


@pytest.mark.parametrize(("overrides", "devices", "platform", "names", "fix"), BAD_DEVICES)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(overrides, devices, platform, names, fix):
    if overrides.get("mesh", {}).get("expert") == 3:
        overrides = dict(overrides, batch_size=9)
    with pytest.raises(ValueError, match=r"\.$") as caught:
        resolve(validate(overrides), devices, platform)
    assert names in str(caught.value)
    assert fix in str(caught.value)


def test_resolve_fills_in_the_remaining_devices():
    config = resolve(validate(dict(model=EXPERTS, mesh=dict(expert=2))), 8, "tpu")
    assert config.mesh == MeshConfig(replica=1, data=4, expert=2, tensor=1)


@pytest.mark.parametrize("config", [None, 3, "text", [1], [("num_steps", 3)]])
def test_a_value_that_is_not_a_config_is_refused(config):
    with pytest.raises(ValueError, match="config"):
        validate(config)


def test_a_config_survives_its_own_dict():
    assert validate(as_dict(CONFIG)) == CONFIG
    assert validate(default(**as_dict(CONFIG))) == CONFIG
    dotted = validate(default(data=dict(weights={"c4.en": 1.0})))
    assert validate(default(**as_dict(dotted))) == dotted


# --- through the command line ---------------------------------------------------------------------------------

COMMAND = """
import runpy, sys
status, name = 0, sys.argv.pop(1)
try:
    runpy.run_module(name, run_name="__main__", alter_sys=True)
except SystemExit as exit:
    status = exit.code
print("jax" in sys.modules, flush=True)
sys.exit(status)
"""


class Refusal:
    """The outcome of a command that should refuse its input."""

    def __init__(self, name, *flags):
        arguments = [sys.executable, "-c", COMMAND, name, *map(str, flags)]
        done = subprocess.run(
            arguments, cwd=rig.REPO, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
        )
        self.status = done.returncode
        self.err = done.stderr
        self.out = done.stdout
        self.loaded_jax = done.stdout.split()[-1] == "True" if done.stdout.strip() else None


def assert_refused(refusal, *words):
    """Status 2 and one line that begins with error:, without a traceback, and before jax is loaded."""
    assert refusal.status == 2, refusal.err
    assert "Traceback" not in refusal.err
    first, *more = refusal.err.splitlines()
    assert first.startswith("error: ")
    assert all(line.startswith("  ") for line in more)  # a list of differences, if anything
    for word in words:
        assert word in refusal.err
    assert refusal.loaded_jax is False


@pytest.fixture
def good(tmp_path):
    """A valid config file."""
    return rig.write_config(tmp_path / "config.py", CONFIG)


FLAGS = [
    (["--config.model.topk=2"], "top_k"),
    (["--config.num_steps=many"], "num_steps"),
    (["--config.model=3"], "--config.model=3 must be a dict"),
    (["--config.num_steps=a:b=c{"], "--config.num_steps=a:b=c{ must be an integer; it is 20 in the config"),
    (["--config.num_steps", "a: b"], "--config.num_steps=a: b must be an integer; it is 20 in the config"),
    (["--config.data.weights={'a': 1.0"], "--config.data.weights={'a': 1.0 must be a dict"),
    (["--config.num_steps=None"], "num_steps=None must be an integer"),
    (["--config.model.top_k=9"], "model.top_k=9 must be at most model.num_experts=4"),
    (["--config.model.num_groups=3"], "must be divisible by model.num_groups=3"),
    (["--config.micro_batches=3"], "batch_size=8 must be divisible by micro_batches=3; try 6 or 9"),
    (
        ["--config.mesh.expert=3"],
        "model.num_experts=4 must be divisible by mesh.expert=3; try model.num_experts=3 or 6",
    ),
    (["--config.balance.bias_sgn.rate=1"], "bias_sign"),
    (["--config.data.path=/no/such/folder"], "/no/such/folder"),
    (
        ["--config.data.weights=(('c4.en', 1.0),)"],
        "--config.data.weights=(('c4.en', 1.0),) must be a dict; write it as",
    ),
    (["--config.data.weights={'a: b': 1.0, 3: 1.0}"], "--config.data.weights={'a: b': 1.0, 3: 1.0} must be a dict"),
    (["--config.data.weights={'c4.en': 1.0"], "--config.data.weights={'c4.en': 1.0 must be a dict"),
    (["--config.data.weights={'c4.en': '1'}"], "data.weights.c4.en='1' must be a number"),
    (["--bogus=1"], "bogus"),
    (["--stop_at=-1"], "stop_at"),
    (["--stop_at=soon"], "stop_at"),
    (["--profile=-1"], "profile"),
    (["stray"], "stray"),
]


@pytest.mark.parametrize(("flags", "words"), FLAGS, ids=[f[0][0] for f in FLAGS])
def test_a_wrong_flag_is_refused_before_jax_is_loaded(good, tmp_path, flags, words):
    refusal = Refusal("moe_jax.train", f"--config={good}", f"--workdir={tmp_path / 'run'}", *flags)
    assert_refused(refusal, words)
    assert "\\n" not in refusal.err
    assert not (tmp_path / "run").exists()


def test_a_missing_workdir_is_refused(good):
    assert_refused(Refusal("moe_jax.train", f"--config={good}"), "--workdir")


def test_an_empty_workdir_is_refused(good):
    # with another bad flag, so that a command that accepts the workdir ends before it writes anything
    refusal = Refusal("moe_jax.train", f"--config={good}", "--workdir=", "--config.data.path=/no/such/folder")
    assert_refused(refusal, "--workdir")


def test_a_missing_config_is_refused(tmp_path):
    assert_refused(Refusal("moe_jax.train", f"--workdir={tmp_path / 'run'}"), "--config")
    assert not (tmp_path / "run").exists()


CONFIG_FILES = {
    "syntax error": ("def get_config(arg='')\n    pass\n", "config.py"),
    "without get_config": ("x = 1\n", "get_config"),
    "returns nothing": ("def get_config(arg=''):\n    pass\n", "config"),
    "returns a list": ("def get_config(arg=''):\n    return [1]\n", "config"),
    "a name that is not there": ("def get_config(arg=''):\n    return defualt()\n", "defualt"),
    "a typo in a key": (
        "from moe_jax.config import default\ndef get_config(arg=''):\n    return default(model=dict(topk=3))\n",
        "model.topk is not a configuration key; did you mean 'top_k'?",
    ),
    "weights for a name with a dot": (
        "from moe_jax.config import default\ndef get_config():\n"
        "    c = default()\n    c.data.weights = {'c4.en': 1.0}\n    return c\n",
        "the name 'c4.en' has a dot; put its dict into moe_jax.config.named({...}).",
    ),
    "an import that is not there": ("import no_such_module\ndef get_config(arg=''):\n    pass\n", "no_such_module"),
    "an error of its own": ("def get_config(arg=''):\n    return 1 / 0\n", "config.py, line 2: ZeroDivisionError"),
    "a variable that is not set": ("import os\nX = os.environ['NO_SUCH']\n", "config.py, line 2: KeyError: 'NO_SUCH'"),
    "a typo in what it changes": (
        "from moe_jax.config import default\ndef get_config(arg=''):\n    c = default()\n    c.modle.top_k = 2\n",
        "config.py, line 4: AttributeError: ''modle' Did you mean",
    ),
    "a helper that fails": (
        "def helper():\n    raise RuntimeError('no node')\ndef get_config(arg=''):\n    helper()\n",
        "config.py, line 2: RuntimeError: no node",
    ),
}


@pytest.mark.parametrize("overrides", [[], ["--config.num_steps=3"]], ids=["alone", "overridden"])
@pytest.mark.parametrize("kind", CONFIG_FILES)
def test_a_wrong_config_file_is_refused(tmp_path, kind, overrides):
    text, words = CONFIG_FILES[kind]
    file = tmp_path / "config.py"
    file.write_text(text)
    refusal = Refusal("moe_jax.train", f"--config={file}", f"--workdir={tmp_path / 'run'}", *overrides)
    assert refusal.status == 2, refusal.err
    assert "Traceback" not in refusal.err
    (line,) = [line for line in refusal.err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert refusal.loaded_jax is False
    assert not (tmp_path / "run").exists()


def test_an_error_in_get_hyper_is_refused_with_its_line(good, tmp_path):
    good.write_text(good.read_text() + "\n\ndef get_hyper(h):\n    return h.arms({'a': 1})\n")
    line = len(good.read_text().splitlines())
    refusal = Refusal("experiments.ablate", f"--config={good}", f"--workdir={tmp_path / 'sweep'}")
    assert_refused(refusal, f"config.py, line {line}: TypeError: arms() takes 0 positional arguments")


def test_a_config_file_that_does_not_exist_is_refused(tmp_path):
    refusal = Refusal("moe_jax.train", f"--config={tmp_path / 'no.py'}", f"--workdir={tmp_path / 'run'}")
    assert_refused(refusal, "no.py")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["tinny", "tiny.py", "configs/tinny.py", "configs/tinny.py:arg"])
def test_a_config_that_is_not_there_is_refused_with_a_close_name_of_ours(tmp_path, name):
    refusal = Refusal("moe_jax.train", f"--config={name}", f"--workdir={tmp_path / 'run'}")
    assert_refused(refusal, f"--config={name.removesuffix(':arg')} does not exist; did you mean 'tiny'?")


def test_a_workdir_that_is_a_file_is_refused(good, tmp_path):
    (tmp_path / "run").write_text("mine")
    refusal = Refusal("moe_jax.train", f"--config={good}", f"--workdir={tmp_path / 'run'}")
    assert_refused(refusal, "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_workdir_of_another_config_is_refused_by_the_command(good, tmp_path):
    (tmp_path / "run").mkdir()
    there = as_dict(rig.drill_config(seed=7))
    (tmp_path / "run" / "config.json").write_text(json.dumps(there))
    refusal = Refusal("moe_jax.train", f"--config={good}", f"--workdir={tmp_path / 'run'}")
    assert_refused(refusal, "another config", "seed: 7 -> 0", "use another workdir")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == there
    assert [f.name for f in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_checkpoint_of_another_state_ends_the_command_with_a_sentence(good, tmp_path):
    run(rig.drill_config(), tmp_path / "run", stop_at=1, quiet=True)
    (tmp_path / "run" / "config.json").unlink()
    flags = [f"--config={good}", f"--workdir={tmp_path / 'run'}", "--config.model.num_experts=8"]
    refusal = Refusal("moe_jax.train", *flags)
    assert refusal.status == 2
    assert "Traceback" not in refusal.err
    assert "holds another state than this config creates" in refusal.err
    assert "router: saved float32" in refusal.err
    assert "wanted float32" in refusal.err


@pytest.fixture
def prepared(tmp_path):
    """A corpus folder."""
    (tmp_path / "texts" / "prose").mkdir(parents=True)
    for n in range(40):
        (tmp_path / "texts" / "prose" / f"{n}.txt").write_text(f"This is document number {n}. " * 5)
    prepare.prepare(prepare.Options(tmp_path / "texts", tmp_path / "corpus"))
    return tmp_path / "corpus"


DOTTED = """
from moe_jax.config import default, named
def get_config(how=""):
    if how == "default":
        return default(data=dict(weights={"c4.en": 1.0, "code": 3.0}))
    config = default()
    if how == "named":
        config.data.weights = named({"c4.en": 1.0, "code": 3.0})
    if how == "item":
        config.data.weights["c4.en"], config.data.weights["code"] = 1.0, 3.0
    return config
"""


@pytest.mark.parametrize("how", ["default", "named", "item", "flag"])
def test_a_domain_with_a_dot_can_be_weighted(tmp_path, how):
    for name in ("c4.en", "code"):
        (tmp_path / "texts" / name).mkdir(parents=True)
        (tmp_path / "texts" / name / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    prepare.prepare(prepare.Options(tmp_path / "texts", tmp_path / "corpus"))
    (tmp_path / "config.py").write_text(DOTTED)
    read = "from absl import app, flags; from moe_jax import config; from moe_jax.config import command; "
    read += "from moe_jax.training.opening import open_data; "
    read += "command.define_config_flag(''); app.run(lambda _: print(open_data(config.validate("
    read += "flags.FLAGS.config)).domains, dict(config.validate(flags.FLAGS.config).data.weights)), "
    read += "flags_parser=command.parse_flags)"
    given = [f"--config={tmp_path / 'config.py'}:{how}", f"--config.data.path={tmp_path / 'corpus'}"]
    given += ["--config.data.weights={'c4.en': 1.0, 'code': 3.0}"] * (how == "flag")
    done = subprocess.run(
        [sys.executable, "-c", read, *given], cwd=rig.REPO, capture_output=True, text=True, check=False
    )
    assert done.stdout == "('c4.en', 'code') {'c4.en': 1.0, 'code': 3.0}\n", done.stderr


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_corpus_is_refused_and_its_file_named(good, prepared, tmp_path, damage):
    file = prepared / ("manifest.json" if damage == "manifest" else "prose.train.bin")
    if damage == "flip":
        rig.flip_bit(file, 1234)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-2])
    elif damage == "remove":
        file.unlink()
    else:
        file.write_text("{")
    flags = [f"--config={good}", f"--workdir={tmp_path / 'run'}", f"--config.data.path={prepared}"]
    assert_refused(Refusal("moe_jax.train", *flags), file.name)
    assert not (tmp_path / "run").exists()


AWAY = "s3://bucket/folder"
ADDRESSES = [
    ("moe_jax.train", "--config=configs/tiny.py", f"--workdir={AWAY}"),
    ("moe_jax.train", "--config=configs/tiny.py", "--workdir=runs/none", f"--config.data.path={AWAY}"),
    ("moe_jax.train", "--config=configs/tiny.py", "--workdir=runs/none", f"--config.init_from={AWAY}"),
    ("moe_jax.train", "--config=configs/tiny.py", "--workdir=runs/none", f"--config.branch_from={AWAY}@10"),
    ("moe_jax.train", f"--config=configs/from_checkpoint.py:{AWAY}", "--workdir=runs/none"),
    ("moe_jax.evaluate", f"--workdir={AWAY}"),
    ("moe_jax.generate", f"--workdir={AWAY}", "--prompt=x"),
    ("moe_jax.convert", f"--input={AWAY}", "--output=runs/none"),
    ("moe_jax.convert", "--input=configs", f"--output={AWAY}"),
    ("moe_jax.data.prepare", f"--input={AWAY}", "--output=runs/none"),
    ("moe_jax.data.prepare", "--input=configs", f"--output={AWAY}"),
    ("moe_jax.data.prepare", "--input=configs", "--output=runs/none", f"--tokenizer={AWAY}"),
    ("experiments.ablate", "--config=configs/ablation/demo.py", f"--workdir={AWAY}"),
    ("experiments.report", AWAY),
]


@pytest.mark.parametrize("command", ADDRESSES, ids=[" ".join(c[::2]) for c in ADDRESSES])
def test_an_address_where_a_path_must_be_is_refused_by_every_command(command):
    refusal = Refusal(*command)
    assert_refused(refusal, AWAY, "is an address and must be a path of this machine")
    assert not (rig.REPO / "s3:").exists()
    assert not (rig.REPO / "runs" / "none").exists()


def test_the_evaluation_of_an_empty_folder_is_refused(tmp_path):
    assert_refused(Refusal("moe_jax.evaluate", f"--workdir={tmp_path}"), "holds no config.json")


def test_a_config_without_a_sweep_is_refused(good, tmp_path):
    refusal = Refusal("experiments.ablate", f"--config={good}", f"--workdir={tmp_path / 'sweep'}")
    assert_refused(refusal, "defines no get_hyper")
    assert not (tmp_path / "sweep").exists()


# --- no data that is read is executed -------------------------------------------------------------------------

SOURCES = sorted(f for folder in ("moe_jax", "experiments") for f in (rig.REPO / folder).rglob("*.py"))
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(Path(f).relative_to(rig.REPO)))
def test_no_file_can_run_what_it_reads(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            assert not {a.name.split(".")[0] for a in node.names} & UNSAFE_MODULES
        if isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in UNSAFE_MODULES
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                assert node.func.id not in UNSAFE_CALLS
            assert not (isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in ("os.system", "os.popen"))
            unsafe = {k.arg for k in node.keywords if isinstance(k.value, ast.Constant) and k.value.value is True}
            assert not unsafe & {"allow_pickle", "shell"}
