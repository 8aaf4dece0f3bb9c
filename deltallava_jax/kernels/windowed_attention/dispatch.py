"""The choice of windowed attention's implementation: XLA, or the kernel of the target platform."""

from __future__ import annotations

import math
import re

import jax
from einops import rearrange
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.registry import Call, Operation, Trial
from deltallava_jax.kernels.windowed_attention import reference
from deltallava_jax.kernels.windowed_attention.vjp import attend
from deltallava_jax.products import contract, matmul

MEASURED_IMAGES = 64  # most images of a measured call


def _refusal_of_all(q, k, window: int, source: int | None = None) -> str | None:
    if q.dtype != k.dtype or q.shape[3] != k.shape[3]:
        return "takes queries and keys of one dtype and with as many heads"
    return devices.indivisible(q.shape[0])


def _call(q, k, window: int, source: int | None = None) -> Call:
    rows = min(max(q.shape[0] // devices.shards()[0], 1), MEASURED_IMAGES)
    kind = f"window {window}" + (f", keys projected from {source}" if source else "")
    return Call("windowed_attention", ((rows, *q.shape[1:]), (rows, *k.shape[1:])), str(q.dtype), kind)


def _trial(call: Call) -> Trial:
    """Random arrays; where keys are projected, their source and the matrices."""
    (q, k), numbers = call.shapes, re.findall(r"\d+", call.kind)
    window, *source = map(int, numbers)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
    given = [jax.ShapeDtypeStruct(shape, call.dtype) for shape in (q, k)]
    if not source:
        run = lambda name, q, k, v: windowed_attention(q, k, v, window=window, implementation=name)
        return Trial((*given, window), (draw(0, *q), draw(1, *k), draw(2, *k)), run)
    (width,), inner = source, math.prod(q[3:])
    matrices = [draw(seed, width, inner) * width**-0.5 for seed in (3, 4)]
    arrays = draw(0, *q[:3], inner), draw(1, *k[:3], width), draw(2, *k[:3], width), *matrices
    run = lambda name, *arrays: local_attention(*arrays, head_dim=q[4], window=window, implementation=name)
    return Trial((*given, window, width), arrays, run)


OPERATION = Operation(
    name="windowed attention",
    setting="windowed_attention",
    package=__package__,
    kernels={"pallas": {"tpu": ".tpu", "gpu": ".gpu"}},
    refusal_of_all=_refusal_of_all,
    is_forced=lambda *arguments: True,
    default=lambda *arguments: None,  # our own kernels have to be measured
    call=_call,
    trial=_trial,
)


def windowed_attention(
    q: Float[Array, "B gq gq H D"],
    k: Float[Array, "B g g G D"],
    v: Float[Array, "B g g G D"],
    *,
    window: int = 1,
    implementation: str | None = None,
) -> Float[Array, "B gq gq H D"]:
    """Each window x window block of queries attends to its own region of keys and values (see reference.py).

    implementation: "xla", "pallas" (the kernel for a TPU or a GPU from Hopper on), or None: the choice of registry.py.
    The platform is that of the mesh in use, which may be that of another machine, or of jax's first device. Under a
    mesh the kernel runs on each device's own rows.

    Raises ValueError where the shapes do not fit, and where "pallas" cannot run."""
    reference.validate(q, k, v, window)
    name = OPERATION.select(implementation, q, k, window)
    if name == "xla":
        return reference.windowed_attention(q, k, v, window=window)
    module = OPERATION.kernel(name)

    def kernel(q, k, v):
        return attend(module, q, k, v, window)

    return devices.per_device(kernel, devices.rows_spec(), devices.rows_spec())(q, k, v)


def local_attention(
    q: Float[Array, "n Q Q E"],
    k: Float[Array, "n g g C"],
    v: Float[Array, "n g g C"],
    k_kernel: Float[Array, "C E"],
    v_kernel: Float[Array, "C E"],
    *,
    head_dim: int,
    window: int = 1,
    implementation: str | None = None,
) -> Float[Array, "n Q Q E"]:
    """Windowed attention of q to the keys k @ k_kernel and values v @ v_kernel, by heads of head_dim.

    There are fewer queries than patches, so the matrices move to the queries' side, exactly: q . (W k) = (W^T q) . k
    and sum_j a_j (W v_j) = W sum_j a_j v_j, head by head. Not where a kernel takes keys by heads; and a single key's
    weight is one, whatever the query. implementation: as of ``windowed_attention``."""
    split = lambda t: rearrange(t, "... (a d) -> ... a d", d=head_dim)
    merge = lambda t: rearrange(t, "... a d -> ... (a d)")
    s = k.shape[1] // q.shape[1]
    q = split(q)
    if s * window == 1:
        return matmul(v, v_kernel)
    keys = jax.eval_shape(lambda: split(matmul(k, k_kernel)))
    name = OPERATION.select(implementation, q, keys, window, k.shape[-1])
    if s == 1 or name != "xla":
        heads = split(matmul(k, k_kernel)), split(matmul(v, v_kernel))
        return merge(windowed_attention(q, *heads, window=window, implementation=name))
    scale = (k.shape[-1] / head_dim) ** 0.5  # windowed_attention divides by the root of its own width
    q = contract("nhwad,cad->nhwac", q, split(k_kernel) * scale)
    y = windowed_attention(q, k[..., None, :], v[..., None, :], window=window, implementation="xla")
    return merge(contract("nhwac,cad->nhwad", y, split(v_kernel)))
