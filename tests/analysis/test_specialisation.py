"""Laws of specialisation: counts become the documented numbers and picture, and stored routing is comparable."""

import numpy as np
import pytest

from conftest import tiny_config
from moe_jax.analysis.specialisation import (
    Survey,
    as_json,
    draw,
    make_choices_step,
    saturation,
    store_ids,
    stored_steps,
)
from moe_jax.balance import measures
from moe_jax.data import evaluation_batches, open_corpus
from moe_jax.training.state import init_state

LOADS = np.asarray([[[6, 2]], [[0, 2]]])  # two domains, one layer, two experts
PAIRS = np.asarray([[[6, 3], [3, 4]]])


def test_a_survey_is_written_with_layers_first():
    # domain 0 has 4 copies an expert at balance, domain 1 one; 3 of the 6 tokens of expert 0 chose expert 1
    written = as_json(Survey(("prose", "code"), LOADS, PAIRS))
    assert written["domains"] == ["prose", "code"]
    assert written["relative_load"] == [[[1.5, 0.0], [0.5, 2.0]]]
    assert written["coactivation"] == [[[1.0, 0.5], [0.75, 1.0]]]
    assert written["domain_information"] == [float(measures.mutual_information(LOADS[:, 0]))]


def test_the_heat_map_has_domains_down_and_experts_across():
    figure = draw(Survey(("prose", "code"), LOADS, PAIRS))
    panel = figure.axes[0]
    np.testing.assert_allclose(panel.images[0].get_array(), [[1.5, 0.5], [0.0, 2.0]])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["prose", "code"]


def test_a_deep_models_heat_map_shows_the_first_and_the_last_layer():
    figure = draw(Survey(("prose", "code"), LOADS.repeat(40, 1), PAIRS.repeat(40, 0)))
    titles = [axis.get_title(loc="left") for axis in figure.axes[:-1]]
    assert len(titles) == 12
    assert titles[0].startswith("MoE layer 0:") and titles[-1].startswith("MoE layer 39:")


def test_the_choices_of_a_batch_agree_with_one_another():
    config = tiny_config(batch_size=4)
    batch = next(iter(evaluation_batches(open_corpus(), batch_size=4, sequence_length=16)))
    chosen = make_choices_step(config)(init_state(config), batch)
    counted = [
        [np.bincount(row.ravel(), minlength=5)[:4] for row in layer.reshape(4, -1)] for layer in chosen.expert_ids
    ]
    np.testing.assert_array_equal(chosen.row_loads.swapaxes(0, 1), counted)
    diagonal = np.diagonal(chosen.pairs, axis1=1, axis2=2)
    np.testing.assert_array_equal(diagonal, chosen.row_loads.sum(0))
    np.testing.assert_array_equal(chosen.pairs.sum(2), 2 * diagonal)  # each of a token's two experts has one partner
    np.testing.assert_array_equal(chosen.domain, batch.domain)


def test_zero_computation_experts_are_left_out_of_the_choices_but_not_of_the_ids():
    config = tiny_config(model=dict(num_zero_experts=2, num_shared_experts=0), batch_size=4)
    batch = next(iter(evaluation_batches(open_corpus(), batch_size=4, sequence_length=16)))
    chosen = make_choices_step(config)(init_state(config), batch)
    assert chosen.row_loads.shape == (4, 2, 4) and chosen.pairs.shape == (2, 4, 4)
    real = (chosen.expert_ids < 4).sum((1, 2))
    assert (real < 4 * 16 * 2).all()  # some copies went to the other two
    np.testing.assert_array_equal(chosen.row_loads.sum((0, 2)), real)


def test_saturation_compares_every_stored_step_with_the_last(tmp_path):
    # one layer, two tokens: half, then three quarters, then all of the last choices
    for step, ids in {20: [[0, 1], [2, 3]], 5: [[0, 2], [2, 0]], 100: [[1, 0], [2, 1]]}.items():
        store_ids(tmp_path, step, np.asarray([ids]), "same")
    assert stored_steps(tmp_path) == [5, 20, 100]
    assert saturation(tmp_path, 4) == {"steps": [5, 20, 100], "saturation": [[0.5], [0.75], [1.0]]}
    assert np.load(tmp_path / "routing" / "5.npy").dtype == np.uint16


def test_saturation_of_a_single_stored_step_is_refused(tmp_path):
    store_ids(tmp_path, 5, np.zeros((1, 2, 2), int), "same")
    with pytest.raises(ValueError, match=r"stored the routing of 1 evaluations.*measure_every > 0 and an eval_every"):
        saturation(tmp_path, 4)


def test_stored_routing_that_is_damaged_or_of_other_tokens_is_refused(tmp_path):
    store_ids(tmp_path, 5, np.zeros((1, 2, 2), int), "same")
    store_ids(tmp_path, 6, np.zeros((1, 3, 2), int), "same")
    with pytest.raises(
        ValueError, match=r"other tokens at step 5 \(1, 2, 2\) than at the last one \(1, 3, 2\); delete"
    ):
        saturation(tmp_path, 4)
    (tmp_path / "routing" / "6.npy").write_bytes(b"not an array")
    with pytest.raises(ValueError, match=r"6\.npy is damaged .*; delete it"):
        saturation(tmp_path, 4)


def test_routing_of_other_tokens_is_moved_aside_and_not_compared(tmp_path, capsys):
    store_ids(tmp_path, 5, np.zeros((1, 2, 2), int), "few")
    store_ids(tmp_path, 6, np.ones((1, 2, 2), int), "many")
    assert stored_steps(tmp_path) == [6]
    assert np.load(tmp_path / "routing" / "few" / "5.npy").shape == (1, 2, 2)
    assert "the held-out tokens have changed" in capsys.readouterr().out
