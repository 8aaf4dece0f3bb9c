"""Tiny checkpoints written by hand in the layouts of other projects, to be broken; and the command, in this process."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from deltallava_jax.__main__ import parse
from deltallava_jax.data import tokens
from deltallava_jax.errors import CheckpointError, ConfigError, ConversionError, WeightMismatch

# What the command line turns into one message.
KNOWN = (ConfigError, ConversionError, tokens.TokenizerError, WeightMismatch, CheckpointError)

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=320, hidden_size=32, intermediate_size=48,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_act="silu", rms_norm_eps=1e-5,
    rope_theta=10000.0, tie_word_embeddings=False, eos_token_id=2,
)  # fmt: skip
CLIP = dict(
    architectures=["CLIPVisionModel"], model_type="clip_vision_model", image_size=32, patch_size=8, hidden_size=64,
    intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, hidden_act="quick_gelu", layer_norm_eps=1e-5,
)  # fmt: skip
LLAVA_HF = dict(
    architectures=["LlavaForConditionalGeneration"], model_type="llava", text_config=LLAMA, vision_config=CLIP,
    vision_feature_layer=-2, vision_feature_select_strategy="default", projector_hidden_act="gelu",
)  # fmt: skip
LLAVA = {
    **LLAMA, "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava_llama", "mm_vision_tower": "some/tower",
    "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_projector_type": "mlp2x_gelu",
}  # fmt: skip


# ------------------------------------------------------------------ weights


def llama_weights(model="model.", head="", *, vocab_size=320, biases=False, seed=1) -> dict[str, np.ndarray]:
    """LLAMA's tensors under the names of a LlamaForCausalLM; ``biases``: those that a Qwen2ForCausalLM adds."""
    shapes = {"embed_tokens.weight": (vocab_size, 32), "norm.weight": (32,)}
    for i in range(2):
        kernels = dict(q=(32, 32), k=(16, 32), v=(16, 32), o=(32, 32))
        shapes |= {f"layers.{i}.self_attn.{name}_proj.weight": shape for name, shape in kernels.items()}
        if biases:
            shapes |= {f"layers.{i}.self_attn.{name}_proj.bias": kernels[name][:1] for name in "qkv"}
        shapes |= {f"layers.{i}.mlp.{name}_proj.weight": (48, 32) for name in ("gate", "up")}
        shapes |= {f"layers.{i}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"layers.{i}.{name}_layernorm.weight": (32,) for name in ("input", "post_attention")}
    return random({**{model + name: shape for name, shape in shapes.items()}, f"{head}lm_head.weight": (320, 32)}, seed)


def clip_weights(model="vision_model.", seed=2) -> dict[str, np.ndarray]:
    """CLIP's tensors under the names of a CLIPVisionModel."""
    shapes = {
        "embeddings.class_embedding": (64,),
        "embeddings.patch_embedding.weight": (64, 3, 8, 8),
        "embeddings.position_embedding.weight": (17, 64),
    }
    for name in (
        "pre_layrnorm",
        "post_layernorm",
        *(f"encoder.layers.{i}.layer_norm{n}" for i in (0, 1) for n in (1, 2)),
    ):
        shapes |= {f"{name}.weight": (64,), f"{name}.bias": (64,)}
    for i in range(2):
        for name in ("q", "k", "v", "out"):
            attention = f"encoder.layers.{i}.self_attn.{name}_proj"
            shapes |= {f"{attention}.weight": (64, 64), f"{attention}.bias": (64,)}
        for name, (rows, columns) in {"fc1": (96, 64), "fc2": (64, 96)}.items():
            shapes |= {f"encoder.layers.{i}.mlp.{name}.weight": (rows, columns)}
            shapes |= {f"encoder.layers.{i}.mlp.{name}.bias": (rows,)}
    return random({model + name: shape for name, shape in shapes.items()}, seed)


def mlp_weights(prefix="", names=("0", "2"), width=64, seed=3) -> dict[str, np.ndarray]:
    up, down = names
    shapes = {f"{up}.weight": (32, width), f"{up}.bias": (32,), f"{down}.weight": (32, 32), f"{down}.bias": (32,)}
    return random({prefix + name: shape for name, shape in shapes.items()}, seed)


def random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Matrices by their fan-in, scales of norms around 1, everything else around 0: answers depend on the image."""
    rng, state = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            state[name] = value / np.float32(np.sqrt(np.prod(shape[1:])))
        else:
            state[name] = (1 if name.endswith("weight") else 0) + np.float32(0.1) * value
    return state


# ------------------------------------------------------------------ folders


def llama(folder: Path, **changes) -> Path:
    biases = changes.get("model_type") == "qwen2"
    return save(folder, LLAMA | changes, llama_weights(biases=biases), tokenizer=True)


def clip(folder: Path, **changes) -> Path:
    return save(folder, CLIP | changes, clip_weights())


def llava_hf(folder: Path, **changes) -> Path:
    """A LlavaForConditionalGeneration."""
    state = llama_weights("language_model.model.", "language_model.") | clip_weights("vision_tower.vision_model.")
    state |= mlp_weights("multi_modal_projector.", ("linear_1", "linear_2"))
    return save(folder, LLAVA_HF | changes, state, tokenizer=True)


def llava(folder: Path, tower: str = "model.vision_tower.vision_tower.vision_model.", **changes) -> Path:
    """The original layout; without a ``tower`` the tower is only named. One that it holds has its config beside it."""
    state = llama_weights() | mlp_weights("model.mm_projector.") | (clip_weights(tower) if tower else {})
    save(folder, LLAVA | changes, state, tokenizer=True)
    if tower:
        (folder / "some" / "tower").mkdir(parents=True)
        (folder / "some" / "tower" / "config.json").write_text(json.dumps(CLIP))
    return folder


def save(folder: Path, config: dict | None, state: dict[str, np.ndarray], shards: int = 1, tokenizer=False) -> Path:
    """config.json and the weights, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        names, where = sorted(state), {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            save_file({name: state[name] for name in names[i::shards]}, folder / file, {"format": "pt"})
            where |= {name: file for name in names[i::shards]}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    if tokenizer:
        tokens.train(["what color is the shape? red", "is there a circle? yes"], 300).save(folder / "tokenizer.json")
    return folder


def edit(folder: Path, **changes) -> Path:
    """Changes values of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


# ------------------------------------------------------------------ the command


def convert(*arguments) -> None:
    options = parse(["convert", *map(str, arguments)])
    options.main(options)


def refused(target: Path, *arguments, lines: int | None = 1) -> str:
    """The message with which a conversion to ``target`` is refused, one that the command line shows without a
    traceback. Nothing may be left where the target would have been."""
    target.parent.mkdir(parents=True, exist_ok=True)
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(KNOWN) as caught:
        convert(*arguments, target)
    assert sorted(target.parent.rglob("*")) == before, "something was left behind"
    message = str(caught.value)
    assert lines is None or len(message.splitlines()) == lines, message
    return message


def assert_has(message: str, *words) -> None:
    for word in words:
        assert str(word) in message, message


def assert_same_params(ours, theirs) -> None:
    ours, theirs = (dict(jax.tree_util.tree_leaves_with_path(tree)) for tree in (ours, theirs))
    assert set(ours) == set(theirs)
    for path, leaf in theirs.items():
        assert ours[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(ours[path]), np.asarray(leaf), err_msg=str(path))
