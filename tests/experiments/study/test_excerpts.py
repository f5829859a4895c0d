"""Laws of the excerpts: the text is the held-out one, and the page has each token in the colour of its expert."""

import json
import re
from html import unescape

import numpy as np
import pytest
from drills import rig
from studies import Arm, main_sweep

from experiments.report import read_branched
from experiments.study.domains_part import domains_section
from experiments.study.excerpts import FILE, NUM_TOKENS, QUOTED, read_excerpts, write_excerpts
from moe_jax.data import documents, open_corpus
from moe_jax.text import model as text_model
from moe_jax.text.colours import NOBODY, palette
from moe_jax.training.state import init_state


@pytest.fixture
def restored(monkeypatch):
    """The config of a model that every workdir seems to hold, untrained, and its step 20."""
    config = rig.drill_config()
    state = init_state(config)
    model = text_model.Model(config, state.params, state.bias, state.balance, None)
    monkeypatch.setattr(text_model, "restore", lambda workdir: (model, 20))
    return config


def test_excerpts_are_the_beginning_of_the_held_out_text(restored, tmp_path):
    write_excerpts(tmp_path)
    corpus = open_corpus()
    found = read_excerpts(tmp_path)
    assert list(found.domains) == [name for name in QUOTED if name in corpus.domains]
    assert found.num_experts == restored.model.num_experts
    used = set()
    for name, one in found.domains.items():
        text = next(documents(corpus, "validation", name)).encode()[: NUM_TOKENS - 1].decode(errors="replace")
        assert "".join(one.letters).replace("\N{LEFT ONE EIGHTH BLOCK}", "") == text
        assert {len(layer) for layer in one.experts} == {len(one.letters)}
        used |= {expert for layer in one.experts for expert in layer}
    assert used == set(range(found.num_experts))  # an untrained router takes every expert somewhere


def test_a_corpus_of_other_domains_is_not_quoted(restored, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("experiments.study.excerpts.QUOTED", ("mine",))
    write_excerpts(tmp_path)
    assert f"the corpus of {tmp_path} has none of the domains that may be quoted: mine" in capsys.readouterr().out
    assert read_excerpts(tmp_path).domains == {}


def test_a_damaged_file_is_named(tmp_path):
    assert read_excerpts(tmp_path) is None
    (tmp_path / FILE).write_text("[")
    with pytest.raises(ValueError, match=rf"{FILE}.*delete it and run the study again"):
        read_excerpts(tmp_path)


def test_the_page_shows_the_first_trunk_of_each_method_in_the_colours_of_its_experts(tmp_path):
    folder = main_sweep(tmp_path, {"bias": Arm(), "none": Arm(0.1)})
    tables = {"arms": read_branched(folder)}
    assert "has not been measured on a finished trunk yet" in domains_section(tables).parts[0].html
    texts = {"milton": {"licence": "public domain", "letters": [*"a<b", "c"], "experts": [[0] * 4, [2, 2, -1, 1]]}}
    for seed in (0, 1):
        content = {"step": 3, "num_experts": 3, "domains": texts if seed else {"austen": texts["milton"]}}
        (folder / f"trunks/bias/seed{seed}" / FILE).write_text(json.dumps(content))
    _, licences, *shown, runs = domains_section({"arms": read_branched(folder)}).parts
    assert "austen: public domain" in licences.html and "arms/trunks/bias/seed0" in runs.html
    assert "seed1" not in runs.html and "arms/trunks/aux_1e-2/seed0" in runs.html  # the first trunk of each method
    titles = [re.search(r"<details( open)?><summary>(.*?)</summary>", part.html).groups() for part in shown]
    assert titles == [(" open", "Trunk bias, seed 0, MoE layer 1 (from 0) of 2"), (None, titles[1][1])]
    assert "layer 0" in titles[1][1]
    spans = re.findall(r'<span style="background:(#\w+)">(.*?)</span>', shown[0].html)
    colors = palette(3)
    assert [(color, unescape(text)) for color, text in spans] == [
        (colors[2], "a<"),
        (NOBODY, "b"),
        (colors[1], "c"),
    ]
    assert np.all([part.markdown.endswith("coloured text in report.html.") for part in shown])
