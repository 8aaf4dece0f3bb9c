"""Name tables: which PyTorch tensor is which of our parameters, read in both directions.

A table is a list of Entry; ``from_torch`` and ``to_torch`` walk it. The transforms only move axes, so a round trip
is exact to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from deltallava_jax.models.layers import Params

# kind -> (torch array -> ours, ours -> torch)
TRANSFORMS = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),
    "conv1x1": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
}
_RANK = {"linear": 2, "conv1x1": 4, "conv": 4}


class WeightMismatch(ValueError):
    """Weights whose names or shapes are not those of the model; the message lists both sides."""


@dataclass(frozen=True)
class Entry:
    """torch: name in the state dict; path: ours, "block/mlp/up/kernel"; kind: a key of TRANSFORMS."""

    torch: str
    path: str
    kind: str = "same"


def linear(torch: str, path: str, *, bias: bool = True, kind: str = "linear") -> list[Entry]:
    """Entries of a Linear (or a 1x1 convolution, kind="conv1x1"): weight and bias."""
    entries = [Entry(f"{torch}.weight", f"{path}/kernel", kind)]
    return entries + [Entry(f"{torch}.bias", f"{path}/bias")] if bias else entries


def norm(torch: str, path: str) -> list[Entry]:
    return [Entry(f"{torch}.weight", f"{path}/scale"), Entry(f"{torch}.bias", f"{path}/bias")]


def flatten(tree: Params, prefix: str = "") -> dict:
    """{"a/b/c": leaf} of a nested dict."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def unflatten(flat: Mapping) -> Params:
    tree: Params = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = value
    return tree


def from_torch(state: Mapping[str, np.ndarray], table: list[Entry], expected: Params, ignore=frozenset()) -> Params:
    """A torch state dict as our nested dict, float32.

    expected: the model's parameters or their shapes. Raises WeightMismatch listing every missing, unexpected and
    wrongly shaped name; names in ``ignore`` may be there or not."""
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    problems, flat = [], {}
    for entry in table:
        if entry.torch not in state:
            problems.append(f"  missing     {entry.torch}  (for {entry.path} {shapes[entry.path]})")
            continue
        value = np.asarray(state[entry.torch])
        ours = TRANSFORMS[entry.kind][0](value) if value.ndim == _RANK.get(entry.kind, value.ndim) else value
        if ours.shape != shapes[entry.path]:
            want = TRANSFORMS[entry.kind][1](np.empty(shapes[entry.path], bool)).shape
            problems.append(f"  shape       {entry.torch}  is {value.shape}, expected {want}")
        flat[entry.path] = ours
    known = {entry.torch for entry in table} | set(ignore)
    problems += [f"  unexpected  {name}  {np.shape(value)}" for name, value in state.items() if name not in known]
    if problems:
        raise WeightMismatch("the weights do not fit the model:\n" + "\n".join(problems))
    return unflatten({path: jnp.asarray(value, jnp.float32) for path, value in flat.items()})


def to_torch(params: Params, table: list[Entry]) -> dict[str, np.ndarray]:
    """Our nested dict as {torch name: numpy array}."""
    flat = flatten(params)
    return {e.torch: np.ascontiguousarray(TRANSFORMS[e.kind][1](np.asarray(flat[e.path]))) for e in table}
