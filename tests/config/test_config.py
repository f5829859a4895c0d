"""The schema: complete, typed, hashable, and every key of it can be overridden. (Mistakes: test_bad_input.py.)"""

import dataclasses
import importlib.util
import json
import operator
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from moe_jax.config import (
    Config,
    as_dict,
    at_defaults,
    balance_entries,
    complete,
    default,
    differences,
    flatten,
    resolve,
    validate,
)
from moe_jax.config.rule import Rule
from moe_jax.config.rules import RULES

MOE = dict(num_experts=4)


def test_the_default_config_is_the_schema_with_its_defaults():
    assert validate(default()) == Config()


def test_a_config_survives_json():
    config = validate(default(model=MOE, balance=dict(bias_sign=dict(rate=0.01)), data=dict(weights=dict(a=1.0))))
    assert json.loads(json.dumps(as_dict(config))) == as_dict(config)
    assert validate(as_dict(config)) == config


def test_a_config_at_defaults_keeps_the_keys_of_other_effects():
    changed = dict(seed=3, save_every=7, data=dict(weights=dict(a=1.0)), checkpoint=dict(keep=5), init_from="there")
    kept = dict(
        batch_size=16, model=MOE | dict(remat="full"), optimizer=dict(milestones=(0.5,)), balance=dict(bias_sign={})
    )
    assert at_defaults(validate(default(**changed, **kept)), "data", "nothing") == validate(default(**kept))


def test_equal_configs_hash_equally_and_are_frozen():
    a, b = validate(default(seed=3)), validate(dict(seed=3))
    assert a == b
    assert hash(a) == hash(b)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.seed = 4


def test_the_order_of_balance_entries_does_not_matter():
    a = balance_entries({"z_loss": {}, "aux_loss": {}})
    b = balance_entries({"aux_loss": {}, "z_loss": {}})
    assert a == b


def test_an_integer_is_taken_where_a_number_is_meant():
    assert validate(dict(optimizer=dict(learning_rate=1))).optimizer.learning_rate == 1.0


def test_named_balance_methods_have_all_their_options_for_overriding():
    config = default(model=MOE, balance=dict(bias_sign=dict(rate=0.01)))
    assert config.balance.bias_sign.zero_mean is False
    config.balance.bias_sign.freeze_step = 7  # None until then: a placeholder
    assert validate(config).balance[0].options.freeze_step == 7


def test_a_file_with_few_keys_is_completed_in_place():
    config = ConfigDict(dict(num_steps=3, model=MOE, balance=dict(bias_sign=dict(rate=0.5))))
    filled = complete(config)
    assert filled is config
    assert filled.optimizer.learning_rate == Config().optimizer.learning_rate
    assert filled.balance.bias_sign.rate == 0.5
    assert filled.balance.bias_sign.warmup_steps == 0
    assert validate(filled).num_steps == 3


def test_differences_name_dotted_keys():
    a, b = as_dict(validate(default())), as_dict(validate(default(model=dict(top_k=3))))
    assert differences(a, b) == ["model.top_k: 2 -> 3"]
    assert flatten({"a": {"b": 1, "c": {}}}) == {"a.b": 1}


def test_a_key_that_a_users_file_leaves_out_can_be_overridden(repo, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n\n"
        "def get_config():\n"
        "    return ConfigDict(dict(model=dict(num_experts=4), balance=dict(bias_sign=dict())))\n"
    )
    command = [sys.executable, "-m", "moe_jax.describe", f"--config={file}"]
    overrides = ["--config.model.num_layers=2", "--config.balance.bias_sign.rate=1e-2"]
    result = subprocess.run([*command, *overrides], cwd=repo, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "2 layers" in result.stdout


READ = """
import json, sys
from absl import flags
from moe_jax.config import as_dict, command, validate

command.define_config_flag("")
command.parse_flags(sys.argv)
print(json.dumps(as_dict(validate(flags.FLAGS.config))))
"""


def read(folder, *arguments):
    """The config that a command reads from these arguments in a folder."""
    result = subprocess.run(
        [sys.executable, "-c", READ, *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def write(file, returned, before=""):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"from moe_jax.config import default\n{before}\ndef get_config(arg=''):\n    return {returned}\n")
    return file


def test_a_key_that_may_be_open_can_be_opened_again(tmp_path):
    # github.com/google/ml_collections: a field of type int takes no None
    write(tmp_path / "c.py", "default(model=dict(num_experts=4), balance=dict(bias_sign=dict(freeze_step=10)))")
    key = "--config.balance.bias_sign.freeze_step"
    assert read(tmp_path, "--config=c.py")["balance"]["bias_sign"]["freeze_step"] == 10
    for arguments in ([f"{key}=None"], [key, "None"], [f"{key}=3", f"{key}=None"]):
        assert read(tmp_path, "--config=c.py", *arguments)["balance"]["bias_sign"]["freeze_step"] is None
    assert read(tmp_path, "--config=c.py", f"{key}=None", f"{key}=3")["balance"]["bias_sign"]["freeze_step"] == 3


def test_a_frozen_config_can_be_returned_and_overridden(tmp_path):
    before = "from ml_collections import FrozenConfigDict\n"
    write(tmp_path / "c.py", "FrozenConfigDict(default(num_steps=7, data=dict(weights={})))", before)
    config = read(tmp_path, "--config=c.py", "--config.seed=3")
    assert (config["num_steps"], config["seed"]) == (7, 3)


def test_a_config_file_runs_once(tmp_path):
    write(tmp_path / "c.py", "default()", "open('count', 'a').write('x')\n")
    read(tmp_path, "--config=c.py", "--config.seed=3")
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.parametrize("name", ["a b", "ü", "[x]", "a%20b", "#1", "a.b", "a:b", "tests", "configs", "~"])
def test_a_config_file_may_be_in_a_folder_of_any_name(tmp_path, name):
    write(tmp_path / name / "c.py", "default(num_steps=int(arg or 1))")
    assert read(tmp_path, f"--config=./{name}/c.py")["num_steps"] == 1
    assert read(tmp_path, f"--config=./{name}/c.py:5")["num_steps"] == 5
    assert read(tmp_path, f"--config={tmp_path}/{name}/c.py:5", "--config.seed=1")["num_steps"] == 5


def test_a_shipped_config_is_found_by_its_name_and_a_file_that_is_there_wins(tmp_path):
    tiny = read(tmp_path, "--config=tiny")
    assert (tiny["num_steps"], tiny["model"]["num_experts"]) == (20, 8)
    assert read(tmp_path, "--config=ablation/demo")["num_steps"] == 200
    (tmp_path / "tiny").mkdir()  # a folder is no config
    assert read(tmp_path, "--config=tiny") == tiny
    write(tmp_path / "ablation" / "demo", "default(num_steps=3)")
    assert read(tmp_path, "--config=ablation/demo")["num_steps"] == 3


@pytest.mark.parametrize("devices", [32, 64])
def test_the_recipes_of_the_docs_fit_their_machines(repo, devices):
    text = (repo / "docs/devices.md").read_text()
    assert text.count("--config.batch_size=64 --config.mesh.expert=8") == 3  # TPU slice, GKE, Slurm with 4 x 8 GPUs
    spec = importlib.util.spec_from_file_location("mini", repo / "configs/deepseek_v3_mini.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.batch_size, config.mesh.expert = 64, 8
    assert resolve(validate(config), devices).mesh.data == devices // 8


def test_a_workdir_of_when_qk_norm_was_a_boolean_is_understood():
    for former, now in ((False, "none"), (True, "head")):
        assert validate(dict(model=dict(qk_norm=former))).model.qk_norm == now


def test_every_key_that_a_rule_names_is_a_key():
    texts = [
        text for rule in RULES if isinstance(rule, Rule) for text in (rule.must, rule.fix) if isinstance(text, str)
    ]
    named = {key for text in texts for key in re.findall(r"\{([\w.]+)\}", text)}
    assert len(named) > 20
    for key in named:
        operator.attrgetter(key)(Config())
