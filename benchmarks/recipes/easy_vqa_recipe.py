"""What configs/easy_vqa.py is worth: five seeds of it, and what each of its choices does.

    python -m benchmarks.recipes.easy_vqa_recipe                          # five seeds with both controls, and chance
    python -m benchmarks.recipes.easy_vqa_recipe --trials adamw,rate_1    # short runs with one choice changed

A run is train.py and eval.py as a user starts them; its result is one file in benchmarks/results/easy_vqa_recipe/, so
that an interrupted set of runs goes on where it stopped. Seconds of CPU count training, its data worker and compiling;
on idle cores a run takes at least their number divided by that of the cores."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

from benchmarks.program import RESULTS, ROOT, argument_parser, cores, numbers, origin, write_result

FOLDER = RESULTS / "easy_vqa_recipe"
SEEDS = (0, 1, 2, 3, 4)
FEW = {"training.steps": 300, "training.eval_every": 0}  # enough to tell most choices apart
TRIALS = {
    "as_it_is": FEW,
    "adamw": FEW | {"optimizer.name": "adamw", "optimizer.lr": 4e-4},
    "rate_1": FEW | {"optimizer.muon_rate": 1.0},
    "rate_10": FEW | {"optimizer.muon_rate": 10.0},
    "iterations_3": FEW | {"optimizer.muon_iterations": 3},
    "rows_4": FEW | {"data.rows": 4, "training.steps": 600},
}


def run(name: str, settings: dict, controls: tuple[str, ...], folder: Path, note: str) -> None:
    """Trains and evaluates one run unless its result is there; writes it."""
    out, workdir = FOLDER / f"{name}.json", folder / name
    if out.exists():
        print(f"{name}: kept")
        return
    changes = [f"--config.{key}={value}" for key, value in settings.items()]
    train = measure("train.py", "--config", "configs/easy_vqa.py", "--workdir", str(workdir), *changes)
    asked, accuracy = {"eval_seconds": 0.0, "eval_cpu_seconds": 0.0}, {}
    for images in ("real", *controls):
        used = measure("eval.py", "--workdir", str(workdir), *(["--control", images] if images != "real" else []))
        (file,) = (workdir / "eval").glob(f"easy_vqa_*_{images}.json" if images != "real" else "easy_vqa.json")
        report = json.loads(file.read_text())
        kinds = {kind: round(score["accuracy"], 4) for kind, score in report["by_type"].items()}
        accuracy[images] = {"all": round(report["accuracy"], 4), **kinds, "n": report["n"]}
        if images == "real":
            asked = {"eval_seconds": used["seconds"], "eval_cpu_seconds": used["cpu_seconds"]}
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    result = {
        "name": name,
        "settings": settings,
        "steps": max(line["step"] for line in lines),
        "train_seconds": train["seconds"],
        "train_cpu_seconds": train["cpu_seconds"],
        "train_peak_gib": train["peak_gib"],
        **asked,
        "accuracy": accuracy,
        **origin(__spec__.name, [] if controls else ["--trials", name], f"{cores()} ({processor()})", ("jax", "optax")),
        "note": note,
    }
    write_result(out, result)
    print(
        f"{name}: {accuracy} in {train['seconds'] / 60:.1f} min, {train['cpu_seconds'] / 60:.1f} min of CPU", flush=True
    )


def measure(*arguments: str) -> dict:
    """Runs a command of the repository; its seconds, its seconds of CPU, and the memory of its largest process."""
    began = time.monotonic()
    with subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(arguments)} ended with {process.returncode}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }


def chance() -> dict:
    """What is right on the test without its images, in all and by type: the most frequent answer to the same question
    in the training set; and, on average, the right answer for another image's picture."""
    from deltallava_jax.data import easy_vqa

    train, test = easy_vqa.questions("train"), easy_vqa.questions("test")
    seen, every = defaultdict(Counter), defaultdict(Counter)
    for question in train:
        seen[question.question][question.answer] += 1
    for question in train + test:
        every[question.question][question.answer] += 1
    alone, other = defaultdict(list), defaultdict(list)
    for question in test:
        alone[question.type].append(seen[question.question].most_common(1)[0][0] == question.answer)
        answers = every[question.question]
        share = {"color": 1 / 8, "shape": 1 / 3, "yes/no": answers[question.answer] / answers.total()}
        other[question.type].append(share[question.type])
    mean = lambda values: round(sum(values) / len(values), 4)
    table = lambda by: {"all": mean(sum(by.values(), [])), **{kind: mean(values) for kind, values in by.items()}}
    return {"question_alone": table(alone), "another_picture": table(other)}


def summary() -> None:
    """The seeds that are there as rows of a table: least to greatest."""
    runs = [json.loads(file.read_text()) for file in sorted(FOLDER.glob("seed-*.json"))]
    between = lambda values, digits: " to ".join(f"{end(values):.{digits}f}" for end in (min, max))
    for images in ("real", "shuffled", "noise") if runs else ():
        scores = [run["accuracy"][images] for run in runs]
        columns = [between([score[kind] for score in scores], 3) for kind in ("all", "color", "shape", "yes/no")]
        print(f"| {images} | {' | '.join(columns)} |")
    write_result(FOLDER / "chance.json", chance())
    for key in ("train_seconds", "train_cpu_seconds", "eval_seconds", "train_peak_gib") if runs else ():
        print(f"{key}: {between([run[key] for run in runs], 2)} in {len(runs)} runs")


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--seeds", type=numbers, default=",".join(map(str, SEEDS)), help="comma-separated")
    parser.add_argument("--trials", default="", help=f"comma-separated, instead of the seeds: {', '.join(TRIALS)}")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "easy_vqa_recipe", help="the workdirs")
    parser.add_argument("--note", default="", help="kept with the results, e.g. what else the machine was doing")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if unknown := [name for name in options.trials.split(",") if name and name not in TRIALS]:
        sys.exit(f"unknown trial {unknown[0]!r}; known: {', '.join(TRIALS)}")
    if options.trials:
        for name in options.trials.split(","):
            run(name, TRIALS[name], (), options.runs, options.note)
        return
    for seed in options.seeds:
        run(f"seed-{seed}", {"seed": seed}, ("shuffled", "noise"), options.runs, options.note)
    summary()


if __name__ == "__main__":
    main()
