"""Every system on easy-VQA, trained from scratch on the same data for as many epochs at the same base size.

    python benchmarks/easy_vqa.py                                        # all runs of the table; a finished one is kept
    python benchmarks/easy_vqa.py --systems delta,mlp --tokens 16 --seeds 0,1
    python benchmarks/easy_vqa.py --step-times                           # step time, as a ratio to the MLP's
    python benchmarks/easy_vqa.py --report                               # docs/results.md from the result files

A run is train.py and eval.py on configs/systems/SYSTEM.py; its result is one file in benchmarks/results/easy_vqa/.
Started again, it goes on where it stopped."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "easy_vqa"
GRID = 8  # patches a side

# system -> the number of tokens a run is made for; None: one run, evaluated at every budget
SCALED = lambda tokens: {"model.projector.scale_factor": GRID // round(tokens**0.5)}
QUERIES = lambda tokens: {"model.projector.queries": tokens}
TRAINED = {
    "mlp": None,
    "delta": SCALED,
    "delta_release": SCALED,
    "delta_elastic": None,
    "token_packer": SCALED,
    "m3": None,
    "mqt": None,
    "quecc": SCALED,
    "resampler": QUERIES,
    "honeybee_c": SCALED,
    "honeybee_d": SCALED,
    "delta_no_emhsa": SCALED,
    "delta_no_delta": SCALED,
    "delta_no_tb": SCALED,
}
# Methods without training: the MLP's model, and what eval.py changes in it for a number of tokens.
UNTRAINED = {
    "fastervlm": lambda t: {"model.projector.name": "fastervlm", "model.projector.tokens": f"({t},)"},
    "prumerge": lambda t: {"model.projector.name": "prumerge", "model.projector.keep_ratio": (t - 1) / GRID**2},
    "fastv": lambda t: {"model.fastv.layer": 1, "model.fastv.keep": t},
}
ABLATIONS = ("delta_no_emhsa", "delta_no_delta", "delta_no_tb")


def plan(systems: list[str], tokens: list[int], seeds: list[int]) -> list[tuple[str, int | None, int]]:
    """(system, tokens or None, seed) of every run, those that others need first."""
    runs = []
    for seed in seeds:
        for system in systems:
            scaled = TRAINED.get(system, UNTRAINED.get(system))
            if scaled is None:
                runs.append((system, None, seed))
                continue
            wanted = [16] if system in ABLATIONS else tokens
            runs += [(system, count, seed) for count in wanted]
    return runs


def name_of(system: str, tokens: int | None, seed: int) -> str:
    return f"{system}-{tokens or 'all'}-s{seed}"


def run(system: str, tokens: int | None, seed: int, epochs: float, runs: Path) -> None:
    """Trains and evaluates one run unless its result is there; writes the result."""
    name, changes = name_of(system, tokens, seed), {}
    out = RESULTS / f"{name}.json"
    if out.exists():
        print(f"{name}: kept")
        return
    began = time.monotonic()
    if system in UNTRAINED:
        workdir, evaluated = runs / name_of("mlp", None, seed), UNTRAINED[system](tokens)
        if not (workdir / "checkpoints").is_dir():
            run("mlp", None, seed, epochs, runs)
    else:
        workdir, evaluated = runs / name, {}
        changes = TRAINED[system](tokens) if tokens else {}
    settings = changes | {"seed": seed, "training.epochs": epochs, "training.eval_every": 0}
    config = ROOT / "configs" / "systems" / f"{system}.py"
    if system in TRAINED:
        call("train.py", "--config", config, "--workdir", workdir, settings)
    call("eval.py", "--workdir", workdir, evaluated)
    minutes = (time.monotonic() - began) / 60
    result = {
        "system": system,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracies(workdir, evaluated),
        "minutes": round(minutes, 1),
        "date": str(date.today()),
        "hardware": f"{os.cpu_count()} CPU cores",
        "versions": versions(),
        "command": f"python benchmarks/easy_vqa.py --systems {system} --seeds {seed}"
        + (f" --tokens {tokens}" if tokens else ""),
    }
    if system in TRAINED:
        result |= size(workdir)
    RESULTS.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{name}: {result['accuracy']} in {minutes:.1f} min", flush=True)


def call(script: str, *arguments) -> None:
    line = [sys.executable, str(ROOT / script)]
    for argument in arguments:
        if isinstance(argument, dict):
            line += [f"--config.{key}={value}" for key, value in argument.items()]
        else:
            line.append(str(argument))
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stderr[-2000:]}")


def accuracies(workdir: Path, overrides: dict) -> dict[str, dict]:
    """{tokens: accuracy in all and by type} of the evaluations just made."""
    found = {}
    for file in (workdir / "eval").glob("easy_vqa_*.json"):
        report = json.loads(file.read_text())
        if report["overrides"] == {key: str(value) for key, value in overrides.items()} and not report["blind"]:
            by_type = {kind: round(score["accuracy"], 4) for kind, score in report["by_type"].items()}
            tokens = overrides.get("model.fastv.keep", report["budget"])
            found[str(tokens)] = {"all": round(report["accuracy"], 4), **by_type}
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def size(workdir: Path) -> dict:
    """Parameters in all and of the projector, and the projector's FLOPs for one image at each budget."""
    import jax

    from deltallava_jax.config import workdir_config
    from deltallava_jax.models import projectors, vision, vlm

    cfg = workdir_config(workdir).model
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    shapes = jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0)))
    needs = projectors.needs(cfg.projector, cfg.vision.layers)
    pixels = jax.ShapeDtypeStruct((1, cfg.vision.image_size, cfg.vision.image_size, 3), jax.numpy.float32)
    features = jax.eval_shape(lambda p, x: vision.encode(p, cfg.vision, x, needs), shapes["vision"], pixels)
    text = jax.ShapeDtypeStruct((1, cfg.decoder.width), jax.numpy.float32)
    flops = {}
    for budget in projectors.budgets(cfg.projector):
        project = jax.jit(lambda p, f, t, b=budget: projectors.project(p, cfg.projector, f, t, budget=b))
        flops[str(budget)] = project.lower(shapes["projector"], features, text).compile().cost_analysis()["flops"]
    return {"parameters": count(shapes), "projector_parameters": count(shapes["projector"]), "projector_flops": flops}


def versions() -> dict:
    import jax

    return {"python": platform.python_version(), "jax": jax.__version__}


# ------------------------------------------------------------------ step times


def step_times(systems: list[str], tokens: int, repeats: int = 10) -> None:
    """Seconds a train step, in turns with the MLP's in this process; written with the ratio."""
    import jax

    from deltallava_jax.config import load_config, override
    from deltallava_jax.data import tokens as tokenizers
    from deltallava_jax.data.packing import PackPlan
    from deltallava_jax.data.pipeline import Rows, elements
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.models import projectors
    from deltallava_jax.parallel.mesh import make_mesh, put_rows
    from deltallava_jax.training.step import TrainStep, init_state

    def prepare(system):
        changes = TRAINED[system](tokens) if TRAINED[system] else {}
        cfg = override(
            load_config(ROOT / "configs" / "systems" / f"{system}.py"), {k: str(v) for k, v in changes.items()}
        )
        mesh, source = make_mesh(cfg, jax.devices()[:1]), training_source(cfg.data)
        tokenizer = tokenizers.train(source.texts(), cfg.model.decoder.vocab_size)
        rows = Rows(source, tokenizer, cfg.data, cfg.model.vision.image_size)
        budget = next((b for b in projectors.budgets(cfg.model.projector) if b <= tokens), GRID**2)
        plan = PackPlan(
            *rows.lengths(), budgets=(budget,), rows=cfg.data.rows, row_length=cfg.data.row_length,
            images_per_row=cfg.data.images_per_row,
        )  # fmt: skip
        element = next(elements(rows, plan, 0, 1, workers=0))
        return {
            "step": TrainStep(cfg, mesh, 100),
            "state": init_state(cfg, mesh, 100),
            "batch": put_rows(element.batch, mesh),
            "budget": budget,
            "questions": int((element.batch.loss_mask[:, 1:] & ~element.batch.loss_mask[:, :-1]).sum()),
        }

    def once(run):
        began = time.perf_counter()
        run["state"], values = run["step"](run["state"], run["batch"], run["budget"])
        jax.block_until_ready(values)
        return time.perf_counter() - began

    peer, table = prepare("mlp"), {}
    for system in systems:
        other = prepare(system)
        once(peer), once(other)  # compile
        pairs = [(once(peer) / peer["questions"], once(other) / other["questions"]) for _ in range(repeats)]
        mlp, ours = (statistics.median(column) for column in zip(*pairs))
        table[system] = {"tokens": other["budget"], "ms_a_question": 1e3 * ours, "ratio_to_mlp": ours / mlp}
        print(f"{system:16} {other['budget']:3} tokens: {1e3 * ours:6.2f} ms a question, {ours / mlp:.2f} of the MLP's")
    result = {
        "date": str(date.today()), "hardware": f"{os.cpu_count()} CPU cores", "versions": versions(),
        "command": "python benchmarks/easy_vqa.py --step-times", "steps": table,
    }  # fmt: skip
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "step_times.json").write_text(json.dumps(result, indent=2) + "\n")


# ------------------------------------------------------------------ the page


def report() -> str:
    """docs/results.md, from the result files alone."""
    results = [json.loads(file.read_text()) for file in sorted(RESULTS.glob("*-s*.json"))]
    if not results:
        sys.exit(f"{RESULTS} holds no result yet; run python benchmarks/easy_vqa.py first")
    times = RESULTS / "step_times.json"
    steps = json.loads(times.read_text())["steps"] if times.exists() else {}
    lines = [
        "# Results", "",
        "Made by `python benchmarks/easy_vqa.py --report` from the files in benchmarks/results/easy_vqa.",
        "All numbers are ours.",
        "", "## Systems on easy-VQA", "",
        f"Trained from scratch for {results[0]['epochs']:g} epochs each, {results[0]['hardware']}. Accuracy on all",
        "9,673 official test questions; with several seeds the mean and, in brackets, the range.",
        "",
    ]  # fmt: skip
    columns = ["64", "16", "4", "1"]
    head = [
        *(f"{count} tokens" for count in columns),
        "Seeds",
        "Projector parameters",
        "Projector MFLOPs",
        "Step time to MLP's",
    ]
    lines += ["| System | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for system in [*TRAINED, *UNTRAINED]:
        own = [r for r in results if r["system"] == system]
        if not own:
            continue
        cells = []
        for count in columns:
            found = [r["accuracy"][count]["all"] for r in own if count in r["accuracy"]]
            spread = f" ({min(found):.3f}-{max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.3f}{spread}" if found else "")
        parameters = {r["projector_parameters"] for r in own if "projector_parameters" in r}
        flops = [
            r["projector_flops"].get("16") or r["projector_flops"].get("64") for r in own if "projector_flops" in r
        ]
        flops = [value for value in flops if value]
        ratio = f"{steps[system]['ratio_to_mlp']:.2f}" if system in steps else ""
        cells += [
            str(len({r["seed"] for r in own})),
            f"{max(parameters):,}" if parameters else "as mlp",
            f"{flops[0] / 1e6:.1f}" if flops else "",
            ratio,
        ]
        lines.append(f"| {system} | " + " | ".join(cells) + " |")
    lines += [
        "", "- `fastervlm`, `prumerge` and `fastv` run on the MLP's model and are not trained. `mlp` makes 64 tokens.",
        "- `delta_elastic`, `m3` and `mqt` answer at every budget from one checkpoint.",
        "- Projector FLOPs are those of the compiled program, one image, at 16 tokens (the MLP at 64).", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", default=",".join([*TRAINED, *UNTRAINED]))
    parser.add_argument("--tokens", default="16,4")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--epochs", type=float, default=1.75)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark", help="the workdirs")
    parser.add_argument("--step-times", action="store_true")
    parser.add_argument("--report", action="store_true")
    options = parser.parse_args()
    systems = options.systems.split(",")
    unknown = [system for system in systems if system not in TRAINED and system not in UNTRAINED]
    if unknown:
        sys.exit(f"unknown system {unknown[0]!r}; known: {', '.join([*TRAINED, *UNTRAINED])}")
    numbers = lambda text: [int(part) for part in text.split(",")]
    if options.report:
        (ROOT / "docs" / "results.md").write_text(report())
    elif options.step_times:
        step_times([system for system in systems if system in TRAINED], 16)
    else:
        for system, tokens, seed in plan(systems, numbers(options.tokens), numbers(options.seeds)):
            run(system, tokens, seed, options.epochs, options.runs)


if __name__ == "__main__":
    main()
