"""Which implementation of dense attention runs: XLA's, cuDNN's, or splash attention, and what they are told to see."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices

KERNELS = {"splash": "tpu", "cudnn": "gpu"}
IMPLEMENTATIONS = ("xla", *KERNELS)
# Platform -> the kernel that is taken by itself, from so many keys on: {"tpu": ("splash", 1024)} once it has run on one
# (benchmarks/kernels.py). XLA's form keeps the scores of all heads in memory, the kernels none.
AUTOMATIC: dict[str, tuple[str, int]] = {}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Seen:
    """Which keys a query sees. mask: True where it does. segments: where the mask is ``causal(segments)``, and so a
    kernel can do without; an array that the program does not use is never made."""

    mask: Bool[Array, "B 1 Q K"]
    segments: Int[Array, "B S"] | None = None


def causal(segments: Int[Array, "B S"]) -> Seen:
    """Rows that attend to themselves: a slot sees those up to its own of its own segment. Slots of segment 0, which
    hold nothing, are so seen by nobody else."""
    places = jnp.arange(segments.shape[1])
    mask = (segments[:, :, None] == segments[:, None, :]) & (places[None, :] <= places[:, None])
    return Seen(mask[:, None], segments)


def attention(
    q: Float[Array, "B Q H D"],
    k: Float[Array, "B K G D"],
    v: Float[Array, "B K G D"],
    seen: Seen | None = None,
    *,
    implementation: str | None = None,
) -> Float[Array, "B Q H D"]:
    """Attention with scale D**-0.5, softmax in float32; H may be a multiple of the key heads G. seen: None for all.

    implementation: "xla"; "splash" on a TPU, for rows that attend to themselves, whole or by segments; "cudnn" on an
    NVIDIA GPU, in half precision; None: the platform's kernel of AUTOMATIC for long rows where it can run, else XLA,
    which is said once. The platform is that of the mesh in use, so that of a machine compiled for. Under a mesh the
    kernels run on each device's own rows and heads.

    Raises ValueError where a kernel that is asked for by name cannot run."""
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"implementation={implementation!r}; expected {', '.join(IMPLEMENTATIONS)} or None")
    name = implementation or choose(q, k, seen)
    if name == "xla":
        return jax.nn.dot_product_attention(q, k, v, mask=None if seen is None else seen.mask, implementation="xla")
    if reason := refusal(name, q, k, seen):
        raise ValueError(f'implementation="{name}": {reason}')
    heads, rows = devices.rows_spec(4, heads_at=2), devices.rows_spec()
    return devices.per_device(_backend(name).attend, (heads, heads, heads, rows), heads)(q, k, v, seen)


def refusal(name: str, q, k, seen: Seen | None) -> str | None:
    """Why a kernel cannot run on the devices compiled for and on such arrays; None where it can."""
    here = devices.device()[0]
    if here != KERNELS[name]:
        return f"runs on a {KERNELS[name]}, not on a {here}"
    if reason := devices.indivisible(q.shape[0], q.shape[2], k.shape[2]):
        return reason
    return _backend(name).refusal(q, k, seen)


def choose(q, k, seen: Seen | None) -> str:
    """The automatic choice for arrays of these shapes and dtypes; what it gives up is said once."""
    name, least = AUTOMATIC.get(devices.device()[0], ("xla", 0))
    if name == "xla" or q.shape[1] != k.shape[1] or k.shape[1] < least:
        return "xla"
    if reason := refusal(name, q, k, seen):
        devices.log_once(f"attention over {q.shape[1]} tokens runs in XLA: {name} {reason}")
        return "xla"
    return name


def _backend(name: str):
    return importlib.import_module(f"deltallava_jax.kernels.attention.{name}")
