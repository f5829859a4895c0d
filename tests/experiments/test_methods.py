"""The table of methods: the facts that it reads from the code, and those that it measures."""

import re

import pytest

from experiments import methods
from moe_jax import balance


@pytest.mark.parametrize("name", balance.names())
def test_every_method_has_an_equation_and_a_source(name):
    assert re.fullmatch(r"`[^`]+ [^`]+`(; `[^`]+ [^`]+`)*", methods.equation(name))
    assert methods.source(name)
    assert methods.family(name) in methods.FAMILIES


def test_a_source_is_shortened_to_its_identifiers():
    assert methods.source("bias_sign") == "[2408.15664](https://arxiv.org/abs/2408.15664)"
    assert methods.source("bias_rms") == "[kexue 10757](https://kexue.fm/archives/10757)"


def test_state_and_statistics_are_shown_in_letters():
    assert methods.state_and_statistics("bias_sign") == ("bias float32[E]", "loads int32[E]")
    assert methods.state_and_statistics("quantile") == ("bias float32[E]", "loads int32[E], own int32[E, 1000]")
    assert methods.state_and_statistics("aux_loss") == ("none", "loads int32[E]")


def test_causality_is_found_by_changing_later_tokens():
    # an expert's tokens compete with later ones; the sign moves its bias between steps only
    assert not methods.is_causal("expert_choice")
    assert methods.is_causal("bias_sign")


def test_other_methods_that_a_method_needs_are_added():
    assert set(methods.composition("target_violation")) == {"target_violation", "aux_loss"}
    assert methods.composition("device_capacity") == {"device_capacity": {"num_devices": 8}}
    assert methods.composition("bias_sign") == {"bias_sign": {}}


def test_methods_without_memory_are_run_for_few_steps():
    assert methods.settings_of("expert_choice").steps == methods.FEW_STEPS
    for name in ("bias_sign", "aux_loss", "expert_threshold", "target_violation"):
        assert methods.settings_of(name) == methods.SETTINGS


def test_a_pipe_in_a_cell_does_not_end_it():
    table = methods.markdown_table(["a", "b"], [["`||x||_1`", "|y|"]])
    assert table.splitlines() == ["| a | b |", "| --- | --- |", "| `‖x‖_1` | \N{DIVIDES}y\N{DIVIDES} |"]
