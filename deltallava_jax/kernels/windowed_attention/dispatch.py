"""The choice of windowed attention's implementation: XLA, or the kernel of the target platform."""

from __future__ import annotations

from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.registry import Operation
from deltallava_jax.kernels.windowed_attention import reference
from deltallava_jax.kernels.windowed_attention.vjp import attend


def _refusal_of_all(q, k, window: int) -> str | None:
    if q.dtype != k.dtype or q.shape[3] != k.shape[3]:
        return "takes queries and keys of one dtype and with as many heads"
    return devices.indivisible(q.shape[0])


OPERATION = Operation(
    name="windowed attention",
    package=__package__,
    kernels={"pallas": {"tpu": "tpu", "gpu": "gpu"}},
    refusal_of_all=_refusal_of_all,
)
choose = OPERATION.choose


def windowed_attention(
    q: Float[Array, "B gq gq H D"],
    k: Float[Array, "B g g G D"],
    v: Float[Array, "B g g G D"],
    *,
    window: int = 1,
    implementation: str | None = None,
) -> Float[Array, "B gq gq H D"]:
    """Each window x window block of queries attends to its own region of keys and values (see reference.py).

    implementation: "xla", "pallas" (the kernel for a TPU or a GPU from Hopper on), or None: the kernel where it was
    measured to be faster, else XLA, logged once. The platform is that of the mesh in use, which may be that of another
    machine, or of jax's first device. Under a mesh the kernel runs on each device's own rows.

    Raises ValueError where the shapes do not fit, and where "pallas" cannot run."""
    reference.validate(q, k, v, window)
    name = OPERATION.select(implementation, q, k, window)
    if name == "xla":
        return reference.windowed_attention(q, k, v, window=window)
    module = OPERATION.kernel(name)

    def kernel(q, k, v):
        return attend(module, q, k, v, window)

    return devices.per_device(kernel, devices.rows_spec(), devices.rows_spec())(q, k, v)
