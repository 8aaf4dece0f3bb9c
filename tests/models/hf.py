"""State dicts of Hugging Face models as our nested dicts, written out by hand; and models with random parameters.

A state dict maps torch names to numpy arrays; gradients by name work as well as parameters. Needs no torch itself,
except for ``arrays``, ``gradients`` and ``randomise``, which take torch models."""

import numpy as np


def llama(state: dict, model: str = "model.", head: str = "lm_head") -> dict:
    """LlamaForCausalLM or Qwen2ForCausalLM; without ``head``.weight in the state the head is tied."""

    def layer(name):
        attention = {ours: _dense(state, f"{name}.self_attn.{ours}_proj") for ours in "qkvo"}
        mlp = {ours: _dense(state, f"{name}.mlp.{ours}_proj") for ours in ("gate", "up", "down")}
        norms = {
            "attention_norm": {"scale": state[f"{name}.input_layernorm.weight"]},
            "mlp_norm": {"scale": state[f"{name}.post_attention_layernorm.weight"]},
        }
        return {**attention, **mlp, **norms}

    out = {"out": _dense(state, head)} if f"{head}.weight" in state else {}
    return {
        "embed": {"embedding": state[f"{model}embed_tokens.weight"]},
        "layers": _stacked(state, f"{model}layers", layer),
        "head": {"norm": {"scale": state[f"{model}norm.weight"]}, **out},
    }


def tower(state: dict, model: str = "") -> dict:
    """CLIPVisionModel, or SiglipVisionModel without its pooling head."""

    def layer(name):
        attention = {
            o: _dense(state, f"{name}.self_attn.{t}_proj") for o, t in zip("qkvo", ("q", "k", "v", "out"), strict=True)
        }
        mlp = {"up": _dense(state, f"{name}.mlp.fc1"), "down": _dense(state, f"{name}.mlp.fc2")}
        norms = {
            "attention_norm": _norm(state, f"{name}.layer_norm1"),
            "mlp_norm": _norm(state, f"{name}.layer_norm2"),
        }
        return {**attention, **mlp, **norms}

    convolution = state[f"{model}embeddings.patch_embedding.weight"]  # [width, 3, p, q]
    patch = {"kernel": convolution.transpose(2, 3, 1, 0).reshape(-1, convolution.shape[0])}
    embeddings = {"patch": patch, "position": state[f"{model}embeddings.position_embedding.weight"]}
    if f"{model}embeddings.class_embedding" in state:
        embeddings["cls"] = state[f"{model}embeddings.class_embedding"]
        embeddings["pre_norm"] = _norm(state, f"{model}pre_layrnorm")
    else:
        patch["bias"] = state[f"{model}embeddings.patch_embedding.bias"]
    return {
        "embeddings": embeddings,
        "layers": _stacked(state, f"{model}encoder.layers", layer),
        "final": {"norm": _norm(state, f"{model}post_layernorm")},
    }


def randomise(model, seed: int):
    """The model with every parameter redrawn: vectors around 1 (norm scales) or 0, matrices by their fan-in."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            r = rng.standard_normal(tuple(parameter.shape))
            if parameter.ndim == 1:
                r = 1 + 0.3 * r if name.endswith("weight") else 0.3 * r
            else:
                r = r / np.sqrt(np.prod(parameter.shape[1:]))
            parameter.copy_(torch.from_numpy(r))
    return model.eval()


def arrays(model) -> dict[str, np.ndarray]:
    return {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}


def gradients(model) -> dict[str, np.ndarray]:
    """Gradients by name after a backward pass; zeros for parameters that the loss does not reach."""
    return {
        name: np.zeros(tuple(p.shape), np.float32) if p.grad is None else p.grad.numpy()
        for name, p in model.named_parameters()
    }


def _dense(state, name):
    dense = {"kernel": state[f"{name}.weight"].T}
    return {**dense, "bias": state[f"{name}.bias"]} if f"{name}.bias" in state else dense


def _norm(state, name):
    return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}


def _stacked(state, name, layer):
    """The layers name.0, name.1, ... as one nested dict, stacked on axis 0."""
    count = len({key[len(name) + 1 :].split(".")[0] for key in state if key.startswith(f"{name}.")})
    return _zip_stack([layer(f"{name}.{i}") for i in range(count)])


def _zip_stack(trees):
    if isinstance(trees[0], dict):
        return {key: _zip_stack([tree[key] for tree in trees]) for key in trees[0]}
    return np.stack(trees)
