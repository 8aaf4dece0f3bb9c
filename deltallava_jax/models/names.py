"""Name tables: which PyTorch tensor is which of our parameters, read in both directions.

A table is a list of Entry. The transforms only move axes, so a round trip is exact to the bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from einops import rearrange

from deltallava_jax.errors import WeightMismatch
from deltallava_jax.models.layers import Params


def _to_patch(kernel):
    side = round((kernel.shape[0] // 3) ** 0.5)
    return rearrange(kernel, "(p q c) o -> o c p q", p=side, q=side)


# kind -> (torch array -> ours, ours -> torch)
TRANSFORMS = {
    "same": (lambda x: x, lambda x: x),
    "linear": (lambda x: x.T, lambda x: x.T),
    "conv1x1": (lambda x: x[:, :, 0, 0].T, lambda x: x.T[:, :, None, None]),
    "conv": (lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1)),
    "patch": (lambda x: rearrange(x, "o c p q -> (p q c) o"), _to_patch),
}


@dataclass(frozen=True)
class Entry:
    """torch: name in the state dict; path: ours, "block/mlp/up/kernel"; kind: a key of TRANSFORMS.

    ``{}`` in the torch name stands for the layer number of parameters that are stacked on axis 0 here."""

    torch: str
    path: str
    kind: str = "same"

    @property
    def stacked(self) -> bool:
        return "{}" in self.torch

    def torch_names(self, shape: tuple[int, ...]) -> list[str]:
        """The tensors that our array of that shape is made of."""
        return [self.torch.format(layer) for layer in range(shape[0])] if self.stacked else [self.torch]

    def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each of those tensors."""
        return TRANSFORMS[self.kind][1](np.broadcast_to(False, shape[1:] if self.stacked else shape)).shape


def linear(torch: str, path: str, *, bias: bool = True, kind: str = "linear") -> list[Entry]:
    """Entries of a Linear (or a 1x1 convolution, kind="conv1x1"): weight and bias."""
    entries = [Entry(f"{torch}.weight", f"{path}/kernel", kind)]
    return entries + [Entry(f"{torch}.bias", f"{path}/bias")] if bias else entries


def norm(torch: str, path: str, *, bias: bool = True) -> list[Entry]:
    entries = [Entry(f"{torch}.weight", f"{path}/scale")]
    return entries + [Entry(f"{torch}.bias", f"{path}/bias")] if bias else entries


def prefixed(table: list[Entry], torch: str, path: str = "") -> list[Entry]:
    """The table with prefixes before its torch names and its paths."""
    return [dataclasses.replace(entry, torch=torch + entry.torch, path=path + entry.path) for entry in table]


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


def require_match(
    table: list[Entry],
    theirs: Mapping[str, tuple[int, ...]],
    ours: Mapping[str, tuple[int, ...]],
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Raises WeightMismatch listing every missing, unexpected and wrongly shaped name.

    theirs: {torch name: shape}; ours: {path: shape}; names that ``ignore`` accepts may be there or not."""
    problems, known = [], set()
    for entry in table:
        shape, want = ours[entry.path], entry.torch_shape(ours[entry.path])
        for name in entry.torch_names(shape):
            known.add(name)
            if name not in theirs:
                problems.append(f"  missing     {name}  {want} (for {entry.path} {shape})")
            elif theirs[name] != want:
                problems.append(f"  shape       {name}  is {theirs[name]}, expected {want} (for {entry.path} {shape})")
    problems += [
        f"  unexpected  {name}  {shape}" for name, shape in theirs.items() if name not in known and not ignore(name)
    ]
    if problems:
        shown = problems[:40] + ([f"  and {len(problems) - 40} more"] if len(problems) > 40 else [])
        raise WeightMismatch("the weights do not fit the model:\n" + "\n".join(shown))


def from_torch(state: Mapping[str, np.ndarray], table: list[Entry], expected: Params, ignore=lambda name: False):
    """A torch state dict as our nested dict, float32; expected: the model's parameters or their shapes.

    Raises WeightMismatch as ``require_match`` does."""
    ours = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
    require_match(table, {name: np.shape(value) for name, value in state.items()}, ours, ignore)
    flat = {}
    for entry in table:
        parts = [TRANSFORMS[entry.kind][0](np.asarray(state[name])) for name in entry.torch_names(ours[entry.path])]
        flat[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0], jnp.float32)
    return unflatten(flat)


def to_torch(params: Params, table: list[Entry]) -> dict[str, np.ndarray]:
    """Our nested dict as {torch name: numpy array}."""
    flat, state = flatten(params), {}
    for entry in table:
        value = np.asarray(flat[entry.path])
        for name, part in zip(entry.torch_names(value.shape), value if entry.stacked else [value], strict=True):
            state[name] = np.ascontiguousarray(TRANSFORMS[entry.kind][1](part))
    return state
