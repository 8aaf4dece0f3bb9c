"""A run that is killed again and again must end as one that is left alone, bit for bit; its memory must not grow:

    python -m benchmarks.load.soak                       # 2,000 steps, saves every 50, ten kills
    python -m benchmarks.load.soak --steps 60 --every 6 --kills 2 --out soak.json

The tiny model of tests/tiny.py, one process. Kills are SIGKILL, at steps and moments that --seed draws. Memory is the
lowest of each tenth of the steps, as a save that is being written holds more for a while; of the undisturbed run, and
of one that saves at its end alone. What saves leave without any training is measured too: tensorstore (0.1.86) never
frees the JSON that it gives to orbax."""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.program import RESULTS, ROOT, argument_parser, cores, origin, write_result

PACKAGES = ("jax", "orbax-checkpoint", "tensorstore")


def start(workdir: Path, options: argparse.Namespace, every: int | None = None) -> subprocess.Popen:
    every = every or options.every
    settings = [f"--config.training.steps={options.steps}", f"--config.training.checkpoint_every={every}"]
    command = [sys.executable, "train.py", "--config", "tests/tiny.py", "--workdir", str(workdir), *settings]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}  # with more of them their gaps hide what grows
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def records(workdir: Path) -> list[dict]:
    """The steps of metrics.jsonl; the last line may still be written."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def killed(workdir: Path, options: argparse.Namespace) -> list[int]:
    """Trains to the end with kills between; the last step that each of them left in metrics.jsonl."""
    draw, left = random.Random(options.seed), []
    for step in sorted(draw.sample(range(1, options.steps), options.kills)):
        process = start(workdir, options)
        while len(records(workdir)) < step and process.poll() is None:
            time.sleep(0.02)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is not None:
            break  # it reached the end before this kill
        process.send_signal(signal.SIGKILL)
        process.wait()
        left.append(records(workdir)[-1]["step"])
        print(f"killed after step {left[-1]}", file=sys.stderr, flush=True)
    assert start(workdir, options).wait() == 0
    return left


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    from deltallava_jax.config import workdir_config
    from deltallava_jax.models.names import flatten
    from deltallava_jax.training.checkpoints import Checkpoints

    checkpoints = Checkpoints(workdir)
    params = checkpoints.restore_params(checkpoints.latest(), workdir_config(workdir).model)
    return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}


def lowest_memory(workdir: Path) -> list[float]:
    """MiB, in each tenth of the steps."""
    tenths = np.array_split([line["host_memory"] * 1024 for line in records(workdir)], 10)
    return [round(float(tenth.min()), 1) for tenth in tenths]


def left_by_a_save(params: dict[str, np.ndarray], folder: Path, saves: int) -> float:
    """Bytes that a save of a train state leaves in memory, once the first third of them has warmed up."""
    import jax

    from deltallava_jax.models.names import unflatten
    from deltallava_jax.training.checkpoints import Checkpoints
    from deltallava_jax.training.metrics import host_memory
    from deltallava_jax.training.step import TrainState

    params = jax.tree.map(jax.numpy.asarray, unflatten(params))
    checkpoints = Checkpoints(folder, create=True)
    memory = []
    for step in range(1, saves + 1):
        state = TrainState(jax.numpy.int32(step), params, {}, {"mu": params, "nu": params})
        checkpoints.save(step, state, {})
        checkpoints.wait()
        memory.append(host_memory())
    checkpoints.close()
    return float(np.polyfit(range(saves - saves // 3), memory[saves // 3 :], 1)[0])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--saves-alone", type=int, default=300, help="saves without training, for their memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "soak.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        alone, disturbed = Path(folder) / "alone", Path(folder) / "killed"
        assert start(alone, options).wait() == 0
        left = killed(disturbed, options)
        expected, got = arrays(alone), arrays(disturbed)
        unsaved = Path(folder) / "unsaved"
        assert start(unsaved, options, every=options.steps).wait() == 0
        left_behind = left_by_a_save(expected, Path(folder) / "saves", options.saves_alone)
        result = {
            **origin(__spec__.name, sys.argv[1:], f"{len(os.sched_getaffinity(0))} of {cores()}", PACKAGES),
            "steps": options.steps,
            "checkpoint_every": options.every,
            "killed_after_steps": left,
            "parameters": sum(leaf.size for leaf in expected.values()),
            "parameters_equal_to_the_bit": expected.keys() == got.keys()
            and all(np.array_equal(leaf, got[path]) for path, leaf in expected.items()),
            "losses_equal_to_the_bit": [line["loss"] for line in records(alone)]
            == [line["loss"] for line in records(disturbed)],
            "lowest_memory_mib_by_tenth": lowest_memory(alone),
            "lowest_memory_mib_by_tenth_without_saves": lowest_memory(unsaved),
            "memory_kib_left_by_a_save_alone": round(left_behind / 1024, 1),
        }
    write_result(options.out, result)
    print(json.dumps(result, indent=2))
    if not (result["parameters_equal_to_the_bit"] and result["losses_equal_to_the_bit"]):
        sys.exit("the killed run is not the undisturbed one")


if __name__ == "__main__":
    main()
