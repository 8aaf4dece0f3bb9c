"""The attention kernels on the device at hand: windowed attention by every implementation at every budget of a 24x24
grid with 8 heads of 128, and the dense attention of towers and decoders.

    python -m benchmarks.measure.kernels                              # one result file a device; runs again go on in it
    python -m benchmarks.measure.kernels --batches 8 --budgets 144,64
    python -m benchmarks.measure.kernels --compile-for h100:1         # without the device: compiles the kernels

Each row is a batch and a budget, forward or forward and backward ("both"): seconds of XLA, of the Pallas kernel where
the device has one, and of torch's scaled_dot_product_attention on the same windows where torch is installed, all in one
run and alternating. "share" is bytes that must move over seconds, against the bandwidth of a copy measured before;
dense attention, where products count, has operations a second instead. Float32 and two threads on a CPU, else bfloat16.
A run begins no row after --seconds; the same command goes on."""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time

from benchmarks.measure import dense_attention
from benchmarks.measure.timing import LIBRARIES, best, device, two_threads
from benchmarks.program import RESULTS, argument_parser, cores, numbers, origin, write_result

FOLDER = RESULTS / "kernels"
GRID, HEADS, WIDTH = 24, 8, 128
BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
CALLS = r'custom_call_target="([^"]*(?:tpu_custom_call|mosaic|cudnn)[^"]*)"'
CHAIN = 20  # calls in one program on a TPU or GPU, each with the outputs of the one before


def copy_bandwidth() -> float:
    """Bytes a second of reading and writing 512 MiB."""
    import jax
    import jax.numpy as jnp

    x = jnp.zeros((2**27,), jnp.float32)
    copies = jax.jit(lambda x: jax.lax.fori_loop(0, CHAIN, lambda _, x: x + 1, x))
    seconds = best({"copies": lambda: copies(x).block_until_ready()}, 5)["copies"]
    return 2 * x.nbytes * CHAIN / seconds


def bytes_moved(batch: int, budget: int, mode: str, itemsize: int) -> int:
    """What any implementation has to read and write: q, k, v, out; backward those but out, its gradient, and three."""
    queries, keys = (batch * n * HEADS * WIDTH * itemsize for n in (budget, GRID**2))
    return 2 * queries + 2 * keys + (mode == "both") * (3 * queries + 4 * keys)


def jax_calls(batch: int, budget: int, mode: str) -> tuple[dict, dict]:
    """(the implementations that run here, why the others do not)."""
    import jax
    import jax.numpy as jnp

    from deltallava_jax.kernels.windowed_attention import windowed_attention

    platform, side = device()[0], round(budget**0.5)
    dtype, repeats = (jnp.float32, 1) if platform == "cpu" else (jnp.bfloat16, CHAIN)
    draw = lambda seed, n: jax.random.normal(jax.random.key(seed), (batch, n, n, HEADS * WIDTH), dtype)
    arrays = draw(0, side), draw(1, GRID), draw(2, GRID), draw(3, side)
    heads = lambda x: x.reshape(*x.shape[:3], HEADS, WIDTH)

    def call(implementation):
        attention = lambda *qkv: windowed_attention(*map(heads, qkv), implementation=implementation).reshape(
            arrays[0].shape
        )

        def step(_, state):
            q, k, v, do = state
            if mode == "forward":
                return attention(q, k, v), k, v, do
            out, pull = jax.vjp(attention, q, k, v)
            return *pull(do), out

        run = jax.jit(lambda *state: jax.lax.fori_loop(0, repeats, step, state) if repeats > 1 else step(0, state))
        run.lower(*arrays)  # raises ValueError where the implementation does not run here
        return lambda: jax.block_until_ready(run(*arrays))

    try:
        return {"xla": call("xla"), "pallas": call("pallas")}, {}
    except ValueError as error:
        return {"xla": call("xla")}, {"pallas": str(error)}


def torch_device() -> str | None:
    """Where torch computes beside us; None without torch on this device."""
    try:
        import torch
    except ImportError:
        return None
    if device()[0] == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        return "cpu"
    return "cuda" if device()[0] == "gpu" and torch.cuda.is_available() else None


def torch_call(batch: int, budget: int, mode: str, on: str):
    """torch's attention with its windows cut from the grids, as a function."""
    import torch

    side = round(budget**0.5)
    dtype, repeats = (torch.float32, 1) if on == "cpu" else (torch.bfloat16, CHAIN)
    draw = lambda n, grad: torch.randn(batch, n, n, HEADS * WIDTH, device=on, dtype=dtype, requires_grad=grad)
    both = mode == "both"
    q, k, v, do = draw(side, both), draw(GRID, both), draw(GRID, both), draw(side, False)

    def windows(x):
        size = x.shape[1] // side
        x = x.view(batch, side, size, side, size, HEADS, WIDTH).permute(0, 1, 3, 5, 2, 4, 6)
        return x.reshape(batch * side * side, HEADS, size * size, WIDTH)

    def step():
        out = torch.nn.functional.scaled_dot_product_attention(*map(windows, (q, k, v)))
        out = out.reshape(batch, side, side, HEADS * WIDTH)
        if both:
            torch.autograd.grad(out, (q, k, v), do)

    def call():
        for _ in range(repeats):
            step()
        if on == "cuda":
            torch.cuda.synchronize()

    return call


def measure(batch: int, budget: int, mode: str, bandwidth: float, rounds: int) -> dict:
    calls, refused = jax_calls(batch, budget, mode)
    if on := torch_device():
        calls["torch"] = torch_call(batch, budget, mode, on)
    cpu = device()[0] == "cpu"
    moved = bytes_moved(batch, budget, mode, 4 if cpu else 2)
    seconds = seconds_each(calls, 1 if cpu else CHAIN, rounds, refused)
    share = {name: round(moved / value / bandwidth, 3) for name, value in seconds.items()}
    return {
        "batch": batch, "tokens": budget, "mode": mode, "bytes": moved, "seconds": seconds,
        "share_of_copy_bandwidth": share, "refused": refused,
    }  # fmt: skip


def measure_dense(name: str, batch: int, mode: str, rounds: int) -> dict:
    case, repeats = dense_attention.CASES[name], 1 if device()[0] == "cpu" else CHAIN
    calls, refused = dense_attention.jax_calls(case, batch, mode, repeats)
    if on := torch_device():
        calls["torch"] = dense_attention.torch_call(case, batch, mode, repeats, on)
    seconds = seconds_each(calls, repeats, rounds, refused)
    operations = case.operations(batch, mode)
    speed = {name: float(f"{operations / value / 1e12:.4g}") for name, value in seconds.items()}
    return {
        "case": name, "batch": batch, "mode": mode, "operations": operations, "seconds": seconds,
        "teraflops": speed, "refused": refused,
    }  # fmt: skip


def seconds_each(calls: dict, repeats: int, rounds: int, refused: dict) -> dict[str, float]:
    """Seconds of one of the ``repeats`` inside each call. What the device has no memory for goes to ``refused``."""
    for name in list(calls):
        try:
            calls[name]()
        except Exception as error:  # jax and torch have an error each
            if not any(sign in str(error) for sign in ("RESOURCE_EXHAUSTED", "out of memory")):
                raise
            refused[name] = "out of memory"
            del calls[name]
    return {name: float(f"{value / repeats:.4g}") for name, value in best(calls, rounds).items()}


def table(result: dict) -> str:
    """Seconds, share of the copy's bandwidth, and times faster than XLA and torch."""
    lines = [
        f"{result['device']}: copies at {result['copy_bandwidth'] / 1e9:.0f} GB/s",
        "batch  tokens or case    mode     implementation  microseconds  share or TFLOPS   faster than XLA  than torch",
    ]
    for row in result["rows"].values():
        for name, seconds in row["seconds"].items():
            times = [
                f"{row['seconds'][other] / seconds:.2f}" if other in row["seconds"] else "-"
                for other in ("xla", "torch")
            ]
            speed = row["teraflops" if "case" in row else "share_of_copy_bandwidth"][name]
            lines.append(
                f"{row['batch']:5}  {row.get('case') or row['tokens']!s:16}  {row['mode']:8} {name:14} "
                f"{seconds * 1e6:13.1f} {speed:16.2f} {times[0]:>17} {times[1]:>11}"
            )
    return "\n".join(lines)


def compiled(target, batch: int) -> dict:
    """The kernels through the compiler of a machine that is not there: windowed attention at every budget, and what
    dense attention needs of memory by each implementation."""
    import re

    import jax
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    from deltallava_jax.analysis import targets
    from deltallava_jax.kernels.windowed_attention import windowed_attention

    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=targets.devices(target)[:1])
    heads = lambda x: x.reshape(*x.shape[:3], HEADS, WIDTH)
    rows = []
    for budget in BUDGETS:
        shapes = [
            jax.ShapeDtypeStruct((batch, n, n, HEADS * WIDTH), "bfloat16", sharding=NamedSharding(mesh, P("data")))
            for n in (round(budget**0.5), GRID)
        ]

        def forward(q, k, v):
            return windowed_attention(*map(heads, (q, k, v)), implementation="pallas").reshape(q.shape)

        def both(q, k, v, do):
            out, pull = jax.vjp(forward, q, k, v)
            return out, *pull(do)

        for mode, function, inputs in (("forward", forward, "qkk"), ("both", both, "qkkq")):
            began = time.perf_counter()
            with jax.set_mesh(mesh):
                program = jax.jit(function).lower(*(shapes["qk".index(x)] for x in inputs)).compile()
            calls = re.findall(CALLS, program.as_text())
            assert len(calls) == {"forward": 1, "both": 2}[mode], calls
            rows.append({
                "tokens": budget, "mode": mode, "calls": calls,
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                "seconds_to_compile": round(time.perf_counter() - began, 1),
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    dense = []
    for name, case in dense_attention.CASES.items():
        for implementation in ("xla", {"tpu": "splash", "gpu": "cudnn"}[mesh.devices.item(0).platform]):
            with jax.set_mesh(mesh):
                program = dense_attention.compiled(
                    case, case.batches[0], NamedSharding(mesh, P("data")), implementation
                )
            dense.append({
                "case": name, "batch": case.batches[0], "mode": "both", "implementation": implementation,
                "calls": sorted(set(re.findall(CALLS, program.as_text()))),
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
                "bytes_accessed": (program.cost_analysis() or {}).get("bytes accessed"),  # GPUs: not without one
            })  # fmt: skip
            print(json.dumps(dense[-1]), flush=True)
    return {
        "target": str(target),
        "batch": batch,
        "dense": dense,
        "rows": rows,
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--batches", type=numbers, help="default 1,8,64,256; on a CPU 1,8")
    parser.add_argument("--budgets", type=numbers, default=BUDGETS)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=480, help="begin no row after so many")
    parser.add_argument("--compile-for", metavar="TARGET", help="as for the plan command, e.g. h100:1 or v5e:2x2")
    return parser.parse_args(arguments)


def main() -> None:
    began = time.monotonic()
    options = parse()
    if options.compile_for:
        from deltallava_jax.analysis.targets import parse_target, prepare

        target = parse_target(options.compile_for)
        prepare(target)
        made = origin(__spec__.name, sys.argv[1:], f"compiled for {target}, not run", LIBRARIES)
        write_result(FOLDER / f"compiled-{target.kind}.json", made | compiled(target, 64))
        return
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        two_threads()
    platform, kind = device()
    file = FOLDER / f"{kind.replace(' ', '-').lower()}.json"
    if file.exists():
        result = json.loads(file.read_text())
    else:
        result = {"device": kind, "copy_bandwidth": copy_bandwidth(), "rows": {}}
    result |= origin(__spec__.name, sys.argv[1:], f"{kind}, {cores()}", LIBRARIES)
    batches = options.batches or ((8, 1) if platform == "cpu" else (64, 8, 256, 1))
    measures = {}
    for mode in ("both", "forward"):
        windows = [(batch, budget, mode) for batch in batches for budget in options.budgets]
        cases = [(name, batch, mode) for name, case in dense_attention.CASES.items() for batch in case.batches]
        measures |= {
            f"{b}-{n}-{m}": functools.partial(measure, b, n, m, result["copy_bandwidth"]) for b, n, m in windows
        }
        measures |= {"-".join(map(str, case)): functools.partial(measure_dense, *case) for case in cases}
    if platform == "cpu":  # a CPU has one implementation of dense attention, and rows that take minutes
        measures = {name: call for name, call in measures.items() if call.func is not measure_dense}
    for name, call in measures.items():
        if name not in result["rows"] and time.monotonic() - began < options.seconds:
            result["rows"][name] = call(rounds=options.rounds)
            write_result(file, result)
    print(table(result))
    if left := [name for name in measures if name not in result["rows"]]:
        print(f"{len(left)} rows are left for the next run: {' '.join(left)}")


if __name__ == "__main__":
    main()
