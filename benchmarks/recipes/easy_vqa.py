"""Every system on easy-VQA: a fresh projector between the same tower and decoder, the same data, steps and sizes.

    python -m benchmarks.recipes.easy_vqa                          # all runs of the table; a finished one is kept
    python -m benchmarks.recipes.easy_vqa --systems delta,mlp --tokens 16 --seeds 0,1
    python -m benchmarks.recipes.easy_vqa --step-times             # step time, as a ratio to the MLP's
    python -m benchmarks.recipes.easy_vqa --towers --seeds 0,1     # Delta on towers of other shapes
    python -m benchmarks.reports.results                           # docs/results.md from the result files

The tower and the decoder are those of one model, trained from scratch with the MLP. As in LLaVA's second stage the
tower is frozen, projector and decoder train. A run is convert, train.py and eval.py on configs/easy_vqa.py:SYSTEM; its
result is one file in benchmarks/results/easy_vqa/. Started again, it goes on where it stopped. There are no pretrained
towers here of one size and several shapes, so --towers trains everything from scratch, tower included."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

from benchmarks.program import RESULTS, ROOT, argument_parser, call, cores, numbers, origin, write_result

FOLDER = RESULTS / "easy_vqa"
TOWER_FOLDER = RESULTS / "towers"
GRID = 8  # patches a side
# What all of these runs were trained with, whatever configs/easy_vqa.py has learned since.
PROTOCOL = {"optimizer.name": "adamw", "optimizer.lr": 4e-4, "data.rows": 4}
# The run that tower and decoder come from; it reads the tower's last layer, so that all layers are trained.
BASE, BASE_SETTINGS = "mlp", {"training.epochs": 6, "training.eval_every": 0, "model.projector.select_layer": -1}


def scaled(tokens: int) -> dict:
    room = {"data.row_length": 320} if tokens == GRID**2 else {}  # as the elastic model has
    return {"model.projector.scale_factor": GRID // round(tokens**0.5), **room}


# system -> the settings of a run for a number of tokens; None: one run, evaluated at every budget
TRAINED = {
    "mlp": None,
    "delta": scaled,
    "delta_elastic": None,
    "token_packer": scaled,
    "m3": None,
    "mqt": None,
    "resampler": lambda tokens: {"model.projector.queries": tokens},
    "honeybee_c": scaled,
    "honeybee_d": scaled,
    "quecc": scaled,
    "llavolta": None,
    "evit": lambda tokens: {"model.projector.keep_ratio": {16: 0.46, 4: 0.2}[tokens]},
    "dynamicvit": lambda tokens: {"model.projector.keep_ratio": (tokens / GRID**2) ** 0.5},
    "delta_release": scaled,
    "delta_no_emhsa": scaled,
    "delta_no_delta": scaled,
    "delta_no_tb": scaled,
}
# Methods without training: the MLP's model, and what eval.py changes in it for a number of tokens.
UNTRAINED = {
    "fastervlm": lambda t: {"model.projector.name": "fastervlm", "model.projector.tokens": f"({t},)"},
    "prumerge": lambda t: {"model.projector.name": "prumerge", "model.projector.keep_ratio": (t - 1) / GRID**2},
    "fastv": lambda t: {"model.fastv.layer": 1, "model.fastv.keep": t},
}
ABLATIONS = ("delta_no_emhsa", "delta_no_delta", "delta_no_tb")
# The paper's Table 5 in small: CLIP 336, CLIP 224 and SigLIP 384 with its scale factors there; patches of 8 x 8 pixels.
TOWERS = {  # name -> (family, pixels a side, scale factor)
    "clip_48": ("clip", 48, 3),
    "clip_32": ("clip", 32, 2),
    "siglip_72": ("siglip", 72, 3),
}
TOWER_EPOCHS = 3
MORE_SEEDS = ("delta", "token_packer", "mqt", "mlp")  # three of each


def plan(systems: list[str], tokens: list[int], seeds: list[int]) -> list[tuple[str, int | None, int]]:
    """(system, tokens or None, seed) of every run."""
    runs = []
    for seed in seeds:
        for system in systems:
            if {**TRAINED, **UNTRAINED}[system] is None:
                runs.append((system, None, seed))
            else:
                runs += [(system, count, seed) for count in ([16] if system in ABLATIONS else tokens)]
    return runs


def the_table() -> list[tuple[str, int | None, int]]:
    """Every run of docs/results.md: all systems at 16 and 4 tokens, Delta at 64 and 1 beside the elastic one, seeds."""
    return [
        *plan([*TRAINED, *UNTRAINED], [16, 4], [0]),
        *plan(["delta"], [64, 1], [0]),
        *plan(list(MORE_SEEDS), [16, 4], [1, 2]),
    ]


def name_of(system: str, tokens: int | None, seed: int) -> str:
    return f"{system}-{tokens or 'all'}-s{seed}"


def run(system: str, tokens: int | None, seed: int, epochs: float, runs: Path) -> None:
    """Trains and evaluates one run unless its result is there; writes the result."""
    name, changes = name_of(system, tokens, seed), {}
    out = FOLDER / f"{name}.json"
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
    config = ROOT / "configs" / f"easy_vqa.py:{system}"
    if system in TRAINED:
        start = begin(config, changes, seed, runs / f"{name}-start", runs / "base")
        settings = {"seed": seed, "training.epochs": epochs, "training.eval_every": 0, "init_from": start}
        settings |= changes | {"optimizer.frozen": "('^vision/',)"}
        call("train.py", "--config", config, "--workdir", workdir, PROTOCOL | settings)
    call("eval.py", "--workdir", workdir, evaluated)
    result = {"system": system, "seed": seed, "epochs": epochs, "accuracy": accuracies(workdir, evaluated)}
    arguments = ["--systems", system, "--seeds", str(seed), *(["--tokens", str(tokens)] if tokens else [])]
    write(out, result, began, arguments, size(workdir) if system in TRAINED else {})


def run_tower(tower: str, seed: int, runs: Path) -> None:
    """Trains and evaluates Delta, tower and decoder from scratch unless the result is there; writes it."""
    family, pixels, scale = TOWERS[tower]
    out, workdir, began = TOWER_FOLDER / f"{tower}-s{seed}.json", runs / f"tower_{tower}-s{seed}", time.monotonic()
    if out.exists():
        print(f"{tower}, seed {seed}: kept")
        return
    changes = {"vision.family": family, "vision.image_size": pixels, "projector.grid": pixels // 8}
    changes |= {"vision.norm_eps": 1e-6} if family == "siglip" else {}
    changes = {f"model.{key}": value for key, value in (changes | {"projector.scale_factor": scale}).items()}
    settings = {"seed": seed, "training.epochs": TOWER_EPOCHS, "training.eval_every": 0} | changes
    config = ROOT / "configs" / "easy_vqa.py:delta"
    call("train.py", "--config", config, "--workdir", workdir, PROTOCOL | settings)
    call("eval.py", "--workdir", workdir)
    result = {"tower": tower, "family": family, "pixels": pixels, "patches": (pixels // 8) ** 2, "scale_factor": scale}
    result |= {"seed": seed, "epochs": TOWER_EPOCHS, "accuracy": accuracies(workdir, {})}
    write(out, result, began, ["--towers", "--seeds", str(seed)], size(workdir))


def write(out: Path, result: dict, began: float, arguments: list[str], sizes: dict) -> None:
    minutes = (time.monotonic() - began) / 60
    result |= {"minutes": round(minutes, 1), **origin(__spec__.name, arguments, cores())}
    write_result(out, result | sizes)
    print(f"{out.stem}: {result['accuracy']} in {minutes:.1f} min", flush=True)


def begin(config: Path, changes: dict, seed: int, start: Path, base: Path) -> Path:
    """A workdir with the base's tower and decoder and a fresh projector; the base is trained if it is not there."""
    finished = base / "finished"
    if not finished.exists():
        config_of_base = ROOT / "configs" / f"easy_vqa.py:{BASE}"
        call("train.py", "--config", config_of_base, "--workdir", base, PROTOCOL | BASE_SETTINGS)
        finished.touch()
    if not start.exists():
        projector = "model.projector."
        settings = [f"--set={key[len(projector) :]}={v}" for key, v in changes.items() if key.startswith(projector)]
        call("-m", "deltallava_jax", "convert", "--vision", base, "--decoder", base, "--config", config, *settings,
             "--seed", seed, start)  # fmt: skip
    return start


def accuracies(workdir: Path, overrides: dict) -> dict[str, dict]:
    """{tokens: accuracy in all and by type} of the evaluations just made."""
    from deltallava_jax.workdir import Workdir

    found = {}
    for report in Workdir(workdir).reports():
        if report["overrides"] == {key: str(value) for key, value in overrides.items()} and report["images"] == "real":
            by_type = {kind: round(score["accuracy"], 4) for kind, score in report["by_type"].items()}
            tokens = overrides.get("model.fastv.keep", report["budget"])
            found[str(tokens)] = {"all": round(report["accuracy"], 4), **by_type}
    return dict(sorted(found.items(), key=lambda item: -int(item[0])))


def size(workdir: Path) -> dict:
    """Parameters in all and of the projector, and the projector's FLOPs for one image at each budget."""
    import jax

    from deltallava_jax.config import workdir_config
    from deltallava_jax.models import systems, vision, vlm

    cfg = workdir_config(workdir).model
    count = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    shapes = jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0)))
    needs = systems.needs(cfg.projector, cfg.vision.layers)
    pixels = jax.ShapeDtypeStruct((1, cfg.vision.image_size, cfg.vision.image_size, 3), jax.numpy.float32)
    prune = lambda params: systems.pruning(params["projector"], cfg.projector)
    see = lambda params, x: vision.encode(params["vision"], cfg.vision, x, needs, prune=prune(params))
    features = jax.eval_shape(see, shapes, pixels)
    text = jax.ShapeDtypeStruct((1, cfg.decoder.width), jax.numpy.float32)
    flops = {}
    for budget in systems.budgets(cfg.projector):
        project = jax.jit(lambda p, f, t, b=budget: systems.project(p, cfg.projector, f, t, budget=b))
        flops[str(budget)] = project.lower(shapes["projector"], features, text).compile().cost_analysis()["flops"]
    return {"parameters": count(shapes), "projector_parameters": count(shapes["projector"]), "projector_flops": flops}


# ------------------------------------------------------------------ step times


def step_times(names: list[str], tokens: int, repeats: int = 10) -> None:
    """Seconds a train step, in turns with the MLP's in this process; written with the ratio."""
    import jax

    from deltallava_jax.config import load_config, override
    from deltallava_jax.data import tokens as tokenizers
    from deltallava_jax.data.pipeline import Rows, elements
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.models import systems
    from deltallava_jax.parallel.mesh import make_mesh, put_rows
    from deltallava_jax.training.step import TrainStep, init_state

    def prepare(system):
        changes = PROTOCOL | (TRAINED[system](tokens) if TRAINED[system] else {})
        cfg = override(load_config(ROOT / "configs" / f"easy_vqa.py:{system}"), {k: str(v) for k, v in changes.items()})
        mesh, source = make_mesh(cfg, jax.devices()[:1]), training_source(cfg.data)
        tokenizer = tokenizers.train(source.texts(), cfg.model.decoder.vocab_size)
        rows = Rows(source, tokenizer, cfg.data, cfg.model.vision, systems.question_length(cfg.model.projector))
        budget = next((b for b in systems.budgets(cfg.model.projector) if b <= tokens), GRID**2)
        plan = rows.plan((budget,), cfg.seed)
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
    for system in names:
        other = prepare(system)
        once(peer), once(other)  # compile
        pairs = [(once(peer) / peer["questions"], once(other) / other["questions"]) for _ in range(repeats)]
        mlp, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
        table[system] = {"tokens": other["budget"], "ms_a_question": 1e3 * ours, "ratio_to_mlp": ours / mlp}
        print(f"{system:16} {other['budget']:3} tokens: {1e3 * ours:6.2f} ms a question, {ours / mlp:.2f} of the MLP's")
    made = origin(__spec__.name, ["--step-times"], cores())
    write_result(FOLDER / "step_times.json", {**made, "steps": table})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--systems", default="", help="comma-separated; all runs of docs/results.md without it")
    parser.add_argument("--tokens", type=numbers, default="16,4")
    parser.add_argument("--seeds", type=numbers, default="0")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark", help="the workdirs")
    parser.add_argument("--step-times", action="store_true")
    parser.add_argument("--towers", nargs="?", const=",".join(TOWERS), default="", help="all, or comma-separated")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    systems = options.systems.split(",") if options.systems else [*TRAINED, *UNTRAINED]
    unknown = [system for system in systems if system not in TRAINED and system not in UNTRAINED]
    if unknown:
        sys.exit(f"unknown system {unknown[0]!r}; known: {', '.join([*TRAINED, *UNTRAINED])}")
    if options.step_times:
        step_times([system for system in systems if system in TRAINED], 16)
        return
    if options.towers:
        for seed in options.seeds:
            for tower in options.towers.split(","):
                run_tower(tower, seed, options.runs)
        return
    asked = plan(systems, options.tokens, options.seeds) if options.systems else the_table()
    for system, tokens, seed in asked:
        run(system, tokens, seed, options.epochs, options.runs)


if __name__ == "__main__":
    main()
