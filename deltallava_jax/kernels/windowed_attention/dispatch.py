"""Which implementation of windowed attention runs: XLA's, or the kernel of the platform that is compiled for."""

from __future__ import annotations

import importlib

from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices
from deltallava_jax.kernels.windowed_attention import reference
from deltallava_jax.kernels.windowed_attention.vjp import attend

# Where the kernel was measured to be faster than XLA, forward and backward: kind of device -> numbers of keys a query.
# benchmarks/kernels.py measures it. The kernels have not run on a TPU or GPU yet, so XLA is the automatic choice.
MEASURED: dict[str, tuple[int, ...]] = {}
HOPPER_ON = ("H100", "H200", "H800", "H20", "GH200", "B100", "B200", "B300")  # GPUs that have what gpu.py uses


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
    measured to be faster, else XLA, which is said once. The platform is that of the mesh in use, so that of a machine
    compiled for, or of jax's first device. Under a mesh the kernel runs per shard of the batch.

    Raises ValueError where the shapes do not fit, and where "pallas" cannot run."""
    reference.validate(q, k, v, window)
    if implementation not in (None, "xla", "pallas"):
        raise ValueError(f'implementation={implementation!r}; expected "xla", "pallas" or None')
    if (implementation or choose(q, k, window)) == "xla":
        return reference.windowed_attention(q, k, v, window=window)
    platform, kind = devices.device()
    if reason := refusal(platform, kind, q, k, window):
        raise ValueError(f'implementation="pallas": {reason}')
    run = lambda q, k, v: attend(_backend(platform), q, k, v, window)
    return devices.per_device(run, devices.rows_spec(), devices.rows_spec())(q, k, v)


def refusal(platform: str, kind: str, q, k, window: int) -> str | None:
    """Why no kernel can run on such a device and such arrays; None where one can."""
    if platform not in ("tpu", "gpu"):
        return f"there is a kernel for TPUs and GPUs, not for {platform}"
    if platform == "gpu" and not any(name in kind for name in HOPPER_ON):
        return f"the GPU kernel needs a GPU from Hopper on, not {kind}"
    if q.dtype != k.dtype or q.shape[3] != k.shape[3]:
        return "the kernels take queries and keys of one dtype and as many heads"
    if reason := devices.indivisible(q.shape[0]):
        return reason
    return _backend(platform).refusal(q, k, window)


def choose(q, k, window: int) -> str:
    """The automatic choice for arrays of these shapes and dtypes, "xla" or "pallas"; what it gives up is said once."""
    platform, kind = devices.device()
    if platform not in ("tpu", "gpu"):
        return "xla"
    if kind not in MEASURED:
        devices.log_once(
            f"windowed attention runs in XLA: its kernel has not been measured on {kind} (benchmarks/kernels.py)"
        )
        return "xla"
    if (window * (k.shape[1] // q.shape[1])) ** 2 not in MEASURED[kind]:
        return "xla"
    if reason := refusal(platform, kind, q, k, window):
        devices.log_once(f"windowed attention runs in XLA: {reason}")
        return "xla"
    return "pallas"


def _backend(platform: str):
    return importlib.import_module(f"deltallava_jax.kernels.windowed_attention.{platform}")
