"""The decoder against Hugging Face's Llama and Qwen2 with eager attention: hidden states, logits, gradients."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from deltallava_jax.config import DecoderConfig  # noqa: E402
from deltallava_jax.models import decoder  # noqa: E402
from tests.models import hf  # noqa: E402
from tests.models.rows import assert_trees_close, text_layout  # noqa: E402

SIZES = dict(vocab_size=50, width=32, layers=3, heads=4, mlp_width=48)
CASES = {
    "llama": DecoderConfig(**SIZES, kv_heads=4, norm_eps=1e-2),
    "llama_grouped_tied": DecoderConfig(**SIZES, kv_heads=2, rope_base=50.0, tied_head=True),
    "qwen2": DecoderConfig(**SIZES, kv_heads=1, rope_base=1e6, norm_eps=1e-6, qkv_bias=True),
}


def hugging_face(cfg: DecoderConfig):
    config, model = (Qwen2Config, Qwen2ForCausalLM) if cfg.qkv_bias else (LlamaConfig, LlamaForCausalLM)
    config = config(
        vocab_size=cfg.vocab_size,
        hidden_size=cfg.width,
        num_hidden_layers=cfg.layers,
        num_attention_heads=cfg.heads,
        num_key_value_heads=cfg.kv_heads,
        intermediate_size=cfg.mlp_width,
        rope_parameters={"rope_type": "default", "rope_theta": cfg.rope_base},
        rms_norm_eps=cfg.norm_eps,
        tie_word_embeddings=cfg.tied_head,
    )
    return hf.randomise(model._from_config(config, attn_implementation="eager"), seed=1)


@pytest.fixture(scope="module", params=CASES)
def both(request):
    """(ours, theirs), each a dict of hidden, logits, gradients; the second row is padded on the right."""
    cfg = CASES[request.param]
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, cfg.vocab_size, (2, 11))
    live = np.arange(11) < np.array([[11], [7]])
    weight = (rng.standard_normal((2, 11, cfg.vocab_size)) * live[..., None] / 11).astype(np.float32)

    model = hugging_face(cfg)
    out = model(torch.tensor(tokens), attention_mask=torch.tensor(live.astype(int)), output_hidden_states=True)
    (out.logits * torch.tensor(weight)).sum().backward()
    theirs = {
        "hidden": [state.detach().numpy()[live] for state in out.hidden_states],
        "logits": out.logits.detach().numpy()[live],
        "gradients": hf.llama(hf.gradients(model)),
    }

    rows = text_layout(live)

    def loss(params):
        first = decoder.embed(params, cfg, tokens)
        hidden = [decoder.forward(params, cfg, first, rows, layers=(0, k))[0] for k in range(cfg.layers + 1)]
        hidden[-1] = decoder.finish(params, cfg, hidden[-1])
        logits = decoder.logits(params, cfg, hidden[-1])
        return (logits * weight).sum(), (hidden, logits)

    (_, (hidden, logits)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(hf.llama(hf.arrays(model)))
    return {"hidden": [np.asarray(h)[live] for h in hidden], "logits": logits[live], "gradients": gradients}, theirs


def test_hidden_states(both):
    """run(0, k) for every k is their hidden state k; their last one is normed."""
    ours, theirs = both
    assert len(ours["hidden"]) == len(theirs["hidden"]) == SIZES["layers"] + 1
    for k, (mine, reference) in enumerate(zip(ours["hidden"], theirs["hidden"], strict=True)):
        np.testing.assert_allclose(mine, reference, atol=1e-5, rtol=1e-5, err_msg=f"hidden state {k}")


def test_logits(both):
    ours, theirs = both
    assert ours["logits"].dtype == np.float32
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=2e-5, rtol=1e-5)


def test_gradients(both):
    ours, theirs = both
    assert_trees_close(ours["gradients"], theirs["gradients"])
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(theirs["gradients"]))
