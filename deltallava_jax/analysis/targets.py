"""The machines that a step can be compiled for without having one: their properties, and devices for a mesh."""

from __future__ import annotations

import difflib
import importlib.util
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from deltallava_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """The properties of one device.

    capacity: bytes of memory that a program can use. peak_flops: operations per second of dense bfloat16 products.
    link: bytes per second that a device receives from others; ``network``: across hosts, in groups of more than
    ``per_host`` devices."""

    name: str
    capacity: int
    capacity_note: str
    peak_flops: float
    link: float
    per_host: int = 0
    network: float = 0.0
    source: str = ""


TPU_NOTE = "the limit that the TPU compiler is known to report; not verified here"
TPU_SOURCE = "cloud.google.com/tpu/docs/{}: half of the bidirectional interconnect bandwidth, all links of a chip busy"
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), TPU_NOTE, 197e12, 200e9, source=TPU_SOURCE.format("v5e")),
        Chip("v5p", int(95.74 * GIB), TPU_NOTE, 459e12, 600e9, source=TPU_SOURCE.format("v5p")),
        Chip("v6e", int(31.25 * GIB), TPU_NOTE, 918e12, 400e9, source=TPU_SOURCE.format("v6e")),
        Chip(
            "h100", int(0.95 * 84_929_347_584), "95 % of the memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95",
            989.4e12, 450e9, per_host=8, network=50e9,
            source="NVIDIA H100 SXM data sheet: half of NVLink's 900 GB/s; DGX H100: 400 Gb/s a GPU between hosts",
        ),
    )
}  # fmt: skip
# jax's device kinds.
_KINDS = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100": "h100", "NVIDIA H200": "h100"}


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of dense bfloat16 products of a jax device's kind; None for one that is not in CHIPS."""
    known = [kind for kind in _KINDS if device_kind.startswith(kind)]
    return CHIPS[_KINDS[max(known, key=len)]].peak_flops if known else None


# The GPU compiler measures the fastest tiling of each product on a GPU; without one it uses cuBLAS for all.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
EXAMPLES = "cpu:8, v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8, h100:2x8 (hosts x GPUs)"


@dataclass(frozen=True)
class Target:
    """``kind``: cpu or a name in CHIPS. ``shape``: of the slice, or (hosts, GPUs a host)."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind}:{'x'.join(map(str, self.shape))}"

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def chip(self) -> Chip | None:
        """None for a CPU."""
        return CHIPS.get(self.kind)

    @property
    def capacity(self) -> int:
        """Bytes of memory that a program can use of one device; CPU devices share the machine's."""
        if self.chip:
            return self.chip.capacity
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count

    def larger(self) -> Target:
        """The next larger slice: twice the devices, or hosts."""
        shape = list(self.shape)
        if self.kind == "h100" and len(shape) == 1:
            return Target(self.kind, (2 * shape[0],) if shape[0] < 8 else (2, shape[0]))
        smallest = 0 if self.kind == "h100" else shape.index(min(shape))
        shape[smallest] *= 2
        return Target(self.kind, tuple(shape if self.kind in ("h100", "cpu") else sorted(shape)))


def parse_target(text: str) -> Target:
    """ "v5e:4x4" -> Target. Raises ConfigError naming the known ones."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    known = ("cpu", *CHIPS)
    if not match or match.group(1) not in known:
        close = difflib.get_close_matches(text.split(":")[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and match else ""
        raise ConfigError(f"--target is {text!r}{hint}; expected one like {EXAMPLES}")
    target = Target(match.group(1), tuple(map(int, match.group(2).split("x"))))
    dims = {"cpu": (1,), "h100": (1, 2), "v5p": (3,)}.get(target.kind, (2,))
    if len(target.shape) not in dims or 0 in target.shape:
        raise ConfigError(f"--target {text}: expected {' or '.join(map(str, dims))} numbers, as in {EXAMPLES}")
    return target


def prepare(target: Target) -> None:
    """Makes this process compute on the CPU and compile for the target. To be called before JAX initializes its
    devices."""
    import jax

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # for libtpu: not a TPU machine
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several processes may compile
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if target.kind == "h100":
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {GPU_FLAGS}".strip()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # for actual compile times and warnings
    if target.kind == "cpu" and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", target.count)


def devices(target: Target) -> list:
    """Devices of the target to compile for. Raises ConfigError where its compiler is not installed or has no such
    slice."""
    import jax
    from jax.experimental import topologies

    if target.kind == "cpu":
        found = jax.devices("cpu")
        if len(found) < target.count:
            raise ConfigError(f"--target {target}: this process has {len(found)} CPU devices")
        return found[: target.count]
    if not installed(target):
        needed = f"'jax[cuda13]=={jax.__version__}'" if target.kind == "h100" else "-r requirements-plan.txt"
        raise ConfigError(f"--target {target}: its compiler is not installed; pip install {needed}")
    try:
        if target.kind == "h100":
            shape = "x".join(map(str, (1,) * (3 - len(target.shape)) + target.shape))
            description = Path(__file__).with_name("h100.txtpb").read_text()
            topology = topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=description)
        else:
            topology = topologies.get_topology_desc(str(target), "tpu")
    except RuntimeError as error:
        raise ConfigError(f"--target {target}: {str(error).splitlines()[0]}") from error
    return list(topology.devices)


def installed(target: Target) -> bool:
    """Whether the target's compiler is installed: libtpu, or JAX's CUDA plugin."""
    plugins = {"cpu": ("jaxlib",), "h100": ("jax_cuda13_plugin", "jax_cuda12_plugin")}.get(target.kind, ("libtpu",))
    return any(importlib.util.find_spec(name) for name in plugins)
