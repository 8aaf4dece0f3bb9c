"""Weights and inputs of the golden data (tests/testdata/README.md); random weights alike for any projector."""

import json
import zlib
from pathlib import Path

import jax
import numpy as np

from deltallava_jax.config import ProjectorConfig
from deltallava_jax.models import systems
from deltallava_jax.models.vision import VisionFeatures

DATA = Path(__file__).parent / "testdata"


def draw(name: str, shape) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)


def inputs(name: str, shape) -> np.ndarray:
    return draw(name, shape).astype(np.float32)


def param(name: str, shape) -> np.ndarray:
    """The weight of that torch name."""
    r, leaf = draw(name, shape), name.split(".")[-1]
    if len(shape) == 1:
        return (1 + 0.1 * r if leaf == "weight" else 0.1 * r).astype(np.float32)
    fan_in = shape[0] if leaf in ("U", "V") else np.prod(shape[1:])
    return (r / np.sqrt(fan_in)).astype(np.float32)


def read_json(name: str):
    return json.loads((DATA / f"{name}.json").read_text())


def state_dict(name: str) -> dict[str, np.ndarray]:
    """The weights of a golden item."""
    return {key: param(key, shape) for key, shape in read_json(f"{name}_state_dict").items()}


def outputs(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as arrays:
        return dict(arrays)


def projector_shapes(cfg: ProjectorConfig):
    """The parameters of a projector as shapes, without drawing any."""
    return jax.eval_shape(lambda: systems.init_params(cfg, jax.random.key(0)))


def projector_state(cfg: ProjectorConfig) -> dict[str, np.ndarray]:
    """Weights by the formula under the torch names of any projector."""
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, bool), projector_shapes(cfg))
    return {key: param(key, value.shape) for key, value in systems.to_torch(empty, cfg).items()}


def features(cfg: ProjectorConfig, n: int = 2) -> VisionFeatures:
    """Standard normal features of n images; for the release's sizes they are the golden inputs."""
    patches = cfg.grid**2
    attention = np.exp(inputs("cls_attention", (n, patches + 1)))
    return VisionFeatures(
        last=inputs("x_single", (n, patches, cfg.in_width)),
        levels=inputs("x_multi", (n, patches, getattr(cfg, "level_count", 4) * cfg.in_width)),
        cls_attention=(attention / attention.sum(1, keepdims=True))[:, 1:],
        keys=inputs("keys", (n, patches, cfg.in_width)),
        grid=(cfg.grid, cfg.grid),
    )
