"""The schema: complete, typed, hashable, and every key of it can be overridden. (Mistakes: test_bad_input.py.)"""

import dataclasses
import importlib.util
import json
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from moe_jax.config import (
    Config,
    as_dict,
    balance_entries,
    complete,
    default,
    differences,
    flatten,
    resolve,
    validate,
)

MOE = dict(num_experts=4)


def test_the_default_config_is_the_schema_with_its_defaults():
    assert validate(default()) == Config()


def test_a_config_survives_json():
    config = validate(default(model=MOE, balance=dict(bias_sign=dict(rate=0.01)), data=dict(weights=dict(a=1.0))))
    assert validate(json.loads(json.dumps(as_dict(config)))) == config


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


@pytest.mark.parametrize("devices", [32, 64])
def test_the_recipes_of_the_readme_fit_their_machines(repo, devices):
    text = (repo / "README.md").read_text()
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
