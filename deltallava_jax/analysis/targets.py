"""The machines that a step can be compiled for without having one: their properties, and devices for a mesh."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
import re
import string
from dataclasses import dataclass
from pathlib import Path

from deltallava_jax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """What XLA's compiler asks of a GPU (the target_config of a topology); sizes in bytes, of one multiprocessor
    (core) or of a block."""

    name: str
    memory: int
    capability: tuple[int, int]
    cores: int
    clock: float
    cache: int
    fpus: int = 128
    threads: int = 2048
    shared: int = 233472
    shared_block: int = 232448


@dataclass(frozen=True)
class Chip:
    """The properties of one device.

    capacity: bytes of memory that a program can use. peak_flops: operations per second of dense bfloat16 products;
    float32_flops: of float32 products at XLA's default precision there, TF32 on GPUs and one bfloat16 pass on TPUs.
    bandwidth: bytes per second of the main memory. link: bytes per second that a device receives from others;
    ``network``: across hosts, in groups of more than ``per_host`` devices."""

    name: str
    capacity: int
    capacity_note: str
    peak_flops: float
    float32_flops: float
    bandwidth: float
    link: float
    per_host: int = 0
    network: float = 0.0
    source: str = ""
    gpu: Gpu | None = None


def _tpu(name: str, gib: float, peak: float, bandwidth: float, link: float) -> Chip:
    return Chip(
        name, int(gib * GIB), "the limit that the TPU compiler is known to report; not verified here", peak, peak,
        bandwidth, link,
        source=f"cloud.google.com/tpu/docs/{name}: half of the bidirectional interconnect bandwidth, all links of a "
        "chip busy",
    )  # fmt: skip


def _gpu(name: str, gpu: Gpu, peak: float, tf32: float, bandwidth: float, link: float, network: float, source: str):
    return Chip(
        name, int(0.95 * gpu.memory), "95 % of the memory, with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95", peak, tf32,
        bandwidth, link, 8, network, source, gpu,
    )  # fmt: skip


# Peaks are those of NVIDIA's data sheets without sparsity, for the SXM modules where there are several.
CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v5e", 15.75, 197e12, 819e9, 200e9),
        _tpu("v5p", 95.74, 459e12, 2765e9, 600e9),
        _tpu("v6e", 31.25, 918e12, 1640e9, 400e9),
        _gpu(
            "h100",
            Gpu("NVIDIA H100 80GB HBM3", 84_929_347_584, (9, 0), 132, 1.98, 52_428_800),
            989.4e12, 494.7e12, 3352e9, 450e9, 50e9,
            "NVIDIA H100 SXM data sheet: half of NVLink's 900 GB/s; DGX H100: 400 Gb/s a GPU between hosts",
        ),
        _gpu(
            "h200",
            Gpu("NVIDIA H200", 150_119_546_880, (9, 0), 132, 1.98, 52_428_800),
            989.4e12, 494.7e12, 4800e9, 450e9, 50e9,
            "NVIDIA H200 SXM data sheet: half of NVLink's 900 GB/s; DGX H200: 400 Gb/s a GPU between hosts",
        ),
        _gpu(
            "b200",
            Gpu("NVIDIA B200", 191_500_000_000, (10, 0), 148, 1.965, 132_644_864),
            2250e12, 1125e12, 8000e9, 900e9, 50e9,
            "NVIDIA DGX B200 data sheet: half of NVLink's 1,800 GB/s; 400 Gb/s a GPU between hosts",
        ),
        _gpu(
            "a100",
            Gpu("NVIDIA A100-SXM4-80GB", 84_987_740_160, (8, 0), 108, 1.41, 41_943_040, 64, 2048, 167_936, 166_912),
            312e12, 156e12, 2039e9, 300e9, 25e9,
            "NVIDIA A100 80GB SXM data sheet: half of NVLink's 600 GB/s; DGX A100: 200 Gb/s a GPU between hosts",
        ),
        _gpu(
            "l40s",
            Gpu("NVIDIA L40S", 47_576_711_168, (8, 9), 142, 2.52, 100_663_296, 128, 1536, 102_400, 101_376),
            362e12, 183e12, 864e9, 32e9, 25e9,
            "NVIDIA L40S data sheet: half of PCIe 4's 64 GB/s; 200 Gb/s a GPU between hosts are assumed",
        ),
        _gpu(
            "rtx4090",
            Gpu("NVIDIA GeForce RTX 4090", 25_250_627_584, (8, 9), 128, 2.52, 75_497_472, 128, 1536, 102_400, 101_376),
            165.2e12, 82.6e12, 1008e9, 32e9, 12.5e9,
            "NVIDIA Ada architecture white paper: products that add up in float32; half of PCIe 4's 64 GB/s; 100 Gb/s "
            "a GPU between hosts are assumed",
        ),
    )
}  # fmt: skip
# jax's device kinds, and the modules of a kind whose peak is another.
_KINDS = {
    "TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "NVIDIA H100": "h100", "NVIDIA H200": "h200",
    "NVIDIA B200": "b200", "NVIDIA A100": "a100", "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx4090",
}  # fmt: skip
_OTHER_PEAKS = {
    "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835.5e12, "NVIDIA H200 NVL": 835.5e12,
    "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop": None, "NVIDIA A100X": None,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Operations per second of dense bfloat16 products of a jax device's kind; None for one that is not in CHIPS."""
    peaks = {kind: CHIPS[name].peak_flops for kind, name in _KINDS.items()} | _OTHER_PEAKS
    known = [kind for kind in peaks if device_kind.startswith(kind)]
    return peaks[max(known, key=len)] if known else None


# The GPU compiler measures the fastest tiling of each product on a GPU; without one it uses cuBLAS for all.
GPU_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
EXAMPLES = "cpu:8, v5e:4x4, v5p:2x2x2, v6e:4x4, h100:8, h100:2x8 (hosts x GPUs), a100, h200, b200, l40s, rtx4090"


@dataclass(frozen=True)
class Target:
    """``kind``: cpu or a name in CHIPS. ``shape``: of the slice, or (hosts, GPUs a host). ``memory``: bytes of a
    device's memory that a program can use, where they are not those of the chip."""

    kind: str
    shape: tuple[int, ...]
    memory: int = 0

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
    def is_gpu(self) -> bool:
        return self.chip is not None and self.chip.gpu is not None

    @property
    def capacity(self) -> int:
        """Bytes of memory that a program can use of one device; CPU devices share the machine's."""
        if self.memory:
            return self.memory
        if self.chip:
            return self.chip.capacity
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // self.count

    def larger(self) -> Target:
        """The next larger slice: twice the devices, or hosts."""
        shape = list(self.shape)
        if self.is_gpu and len(shape) == 1:
            shape = [2 * shape[0]] if shape[0] < self.chip.per_host else [2, shape[0]]
        else:
            shape[0 if self.is_gpu else shape.index(min(shape))] *= 2
        return dataclasses.replace(self, shape=tuple(shape if self.is_gpu or not self.chip else sorted(shape)))


def parse_target(text: str, memory: float = 0) -> Target:
    """ "v5e:4x4" -> Target. memory: GiB of a device, where they are not those of the chip. Raises ConfigError naming
    the known ones."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", text)
    known = ("cpu", *CHIPS)
    if not match or match.group(1) not in known:
        close = difflib.get_close_matches(text.split(":")[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close and match else ""
        raise ConfigError(f"--target is {text!r}{hint}; expected one like {EXAMPLES}")
    if not 0 <= memory < math.inf:
        raise ConfigError(f"--memory {memory:g}: expected GiB of a device's memory")
    target = Target(match.group(1), tuple(map(int, match.group(2).split("x"))), int(memory * GIB))
    dims = (1, 2) if target.is_gpu else {"cpu": (1,), "v5p": (3,)}.get(target.kind, (2,))
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
    if target.is_gpu:
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
        needed = f"'jax[cuda13]=={jax.__version__}'" if target.is_gpu else "-r requirements-plan.txt"
        raise ConfigError(f"--target {target}: its compiler is not installed; pip install {needed}")
    try:
        if target.is_gpu:
            shape = "x".join(map(str, (1,) * (3 - len(target.shape)) + target.shape))
            text = description(target.chip)
            topology = topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=text)
        else:
            topology = topologies.get_topology_desc(str(target), "tpu")
    except RuntimeError as error:
        raise ConfigError(f"--target {target}: {str(error).splitlines()[0]}") from error
    return list(topology.devices)


def description(chip: Chip) -> str:
    """A GPU as XLA's compiler reads it (GpuTargetConfigProto)."""
    template = string.Template(Path(__file__).with_name("gpu.txtpb").read_text())
    (major, minor), gpu = chip.gpu.capability, dataclasses.asdict(chip.gpu)
    return template.substitute(gpu, major=major, minor=minor, bandwidth=int(chip.bandwidth))


def installed(target: Target) -> bool:
    """Whether the target's compiler is installed: libtpu, or JAX's CUDA plugin."""
    cuda = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    plugins = cuda if target.is_gpu else ("libtpu",) if target.chip else ("jaxlib",)
    return any(importlib.util.find_spec(name) for name in plugins)
