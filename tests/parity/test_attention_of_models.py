"""Laws of attention layers against the code of their models in transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from conftest import tiny_config
from moe_jax.model.attention import Attention

torch = pytest.importorskip("torch", reason="needs torch and transformers: pip install 'moe_jax[peers]'")
transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'moe_jax[peers]'")
gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
ROWS, LENGTH, WINDOW = 2, 12, 4
YARN = dict(factor=8.0, original_length=32, beta_fast=16.0, beta_slow=1.0, truncate=False)  # bounds between two pairs


@pytest.mark.parametrize("local", [True, False])
def test_gpt_oss(local):
    # biases of all projections, sinks, YaRN whose bounds are not rounded, and a window in every other layer
    model = dict(head_dim=16, qkv_bias=True, out_bias=True, attention_sinks=True, rope_theta=150000.0, yarn=YARN)
    config = tiny_config(model=model | dict(window=WINDOW, window_pattern="LG")).model
    rope = dict(rope_type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=16.0, beta_slow=1.0)
    sizes = dict(hidden_size=config.embed_dim, num_attention_heads=config.num_heads, head_dim=config.head_dim)
    sizes |= dict(num_key_value_heads=config.num_kv_heads, num_hidden_layers=2, sliding_window=WINDOW)
    theirs = transformers.GptOssConfig(
        **sizes, rope_parameters=rope | dict(rope_theta=150000.0, truncate=False), attn_implementation="eager"
    )
    torch.manual_seed(0)
    layer = gpt_oss.GptOssAttention(theirs, 0 if local else 1).eval()
    with torch.no_grad():
        for value in layer.parameters():
            value.normal_(0.0, 0.5)
    place = np.arange(LENGTH)
    seen = (place[:, None] >= place) & (place[:, None] - place < (WINDOW if local else LENGTH))
    mask = torch.where(torch.tensor(seen)[None, None], 0.0, torch.finfo(torch.float32).min)
    x = np.random.default_rng(0).normal(size=(ROWS, LENGTH, config.embed_dim)).astype(np.float32)
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    with torch.no_grad():
        cos_sin = gpt_oss.GptOssRotaryEmbedding(theirs)(torch.tensor(x), positions)
        expected = layer(torch.tensor(x), cos_sin, mask)[0].numpy()

    ours = Attention(config, nnx.Rngs(0))
    value = {name: parameter.detach().numpy() for name, parameter in layer.named_parameters()}
    for name, heads in (("q", "query"), ("k", "key"), ("v", "value")):
        weight = getattr(ours, heads)
        weight[...] = value[f"{name}_proj.weight"].T.reshape(weight.shape)
        getattr(ours, f"{heads}_bias")[...] = value[f"{name}_proj.bias"]
    ours.out[...] = value["o_proj.weight"].T.reshape(ours.out.shape)
    ours.out_bias[...], ours.sinks[...] = value["o_proj.bias"], value["sinks"]
    found = ours(
        jnp.asarray(x), jnp.asarray(positions.numpy(), jnp.int32), jnp.ones((ROWS, LENGTH), jnp.int32), None, local
    )
    assert np.abs(expected).max() > 1.0
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
