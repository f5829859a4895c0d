"""Laws of activations against the code of their models in transformers."""

from types import SimpleNamespace

import numpy as np
import pytest

from moe_jax.config import ModelConfig
from moe_jax.kernels.activation import Activation

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
GATE, UP = np.random.default_rng(0).normal(0, 6, (2, 3, 50)).astype(np.float32)  # many beyond the limits


def ours(form, limit):
    return Activation.of(ModelConfig(activation=form, activation_limit=limit))(GATE, UP)


def test_gpt_oss():
    both = torch.from_numpy(np.stack([GATE, UP], -1).reshape(3, 100))  # it interleaves them
    theirs = gpt_oss.GptOssExperts._apply_gate(SimpleNamespace(alpha=1.702, limit=7.0), both)
    np.testing.assert_allclose(ours("swiglu_oai", 7.0), theirs, rtol=1e-5, atol=1e-5)


def test_deepseek_v4():
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    layer = SimpleNamespace(act_fn=torch.nn.functional.silu, limit=10.0)
    both = torch.from_numpy(np.concatenate([GATE, UP], -1))
    theirs = v4.DeepseekV4Experts._apply_gate(layer, both)
    np.testing.assert_allclose(ours("swiglu", 10.0), theirs, rtol=1e-5, atol=1e-5)
