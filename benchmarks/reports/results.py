"""docs/results.md and its plots, from the result files in benchmarks/results.

    python -m benchmarks.reports.results

Nothing is measured for them: every number stands in a result file."""

from __future__ import annotations

import argparse
import json
import statistics

from benchmarks.program import RESULTS, ROOT, argument_parser
from benchmarks.reports import efficiency, emoji, speed
from benchmarks.reports.markdown import cell, table

PAGE, PLOT = ROOT / "docs" / "results.md", ROOT / "docs" / "easy_vqa_budgets.png"
TOKENS = ("64", "16", "4", "1")

SYSTEMS = {  # in the order of the table: (name, whether it is trained)
    "mlp": ("LLaVA-1.5's MLP", True),
    "delta": ("Delta, the paper's equations", True),
    "delta_release": ("Delta, the public code", True),
    "delta_elastic": ("Delta, elastic", True),
    "token_packer": ("TokenPacker", True),
    "m3": ("M3", True),
    "mqt": ("MQT", True),
    "resampler": ("Qwen-VL's resampler", True),
    "honeybee_c": ("Honeybee, C-Abstractor", True),
    "honeybee_d": ("Honeybee, D-Abstractor", True),
    "quecc": ("QueCC", True),
    "llavolta": ("LLaVolta", True),
    "evit": ("EViT", True),
    "dynamicvit": ("DynamicViT", True),
    "fastervlm": ("FasterVLM", False),
    "prumerge": ("PruMerge", False),
    "fastv": ("FastV", False),
}
ABLATIONS = {
    "delta": "whole",
    "delta_no_emhsa": "without EMHSA",
    "delta_no_delta": "without the low-rank updates",
    "delta_no_tb": "without the block",
}


def easy_vqa_runs() -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted((RESULTS / "easy_vqa").glob("*-s*.json"))]


def page() -> str:
    """docs/results.md as text."""
    runs = easy_vqa_runs()
    if not runs:
        return "# Results\n\nNone yet; `python -m benchmarks.recipes.easy_vqa` makes them.\n"
    parts = [
        "# Results",
        "Made by `python -m benchmarks.reports.results` from the files in benchmarks/results. Every number is ours,\n"
        "measured, unless it says that it is the paper's or counted; each file holds its command, date, hardware and\n"
        "versions.",
        systems(runs),
        budgets(runs),
        ablations(runs),
        step_times(),
        emoji.emoji(),
        *speed.parts(),
        soak(),
        efficiency.efficiency(),
        efficiency.heat_maps(),
        speed.WHOSE,
        efficiency.KNOWN,
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def accuracies(runs: list[dict], system: str, tokens: str, kind: str = "all") -> list[float]:
    """Of every run of a system that was evaluated at that many tokens."""
    return [run["accuracy"][tokens][kind] for run in runs if run["system"] == system and tokens in run["accuracy"]]


def summary(runs: list[dict]) -> str:
    """README's table: systems that were trained with several seeds, and two that select without training."""
    chosen = ["mlp", "delta", "token_packer", "mqt", "fastervlm", "prumerge"]
    rows = [[SYSTEMS[system][0], *(cell(accuracies(runs, system, tokens)) for tokens in TOKENS)] for system in chosen]
    return table(["Accuracy at", *(f"{tokens} token{'' if tokens == '1' else 's'}" for tokens in TOKENS)], rows)


def systems(runs: list[dict]) -> str:
    rows = []
    for system, (name, trained) in SYSTEMS.items():
        own = [run for run in runs if run["system"] == system]
        if not own:
            continue
        sizes = [run for run in own if "projector_parameters" in run]
        flops = [run["projector_flops"].get("16") or run["projector_flops"].get("64") for run in sizes]
        rows.append(
            [
                f"{name} (`{system}`)",
                *(cell(accuracies(runs, system, tokens)) for tokens in TOKENS),
                str(len({run["seed"] for run in own})),
                f"{max(run['projector_parameters'] for run in sizes):,}" if trained else "the MLP's",
                f"{max(filter(None, flops)) / 1e6:.1f}" if any(flops) else "",
            ]
        )
    head = [
        "System",
        *(f"{tokens} token{'' if tokens == '1' else 's'}" for tokens in TOKENS),
        "Seeds",
        "Projector parameters",
        "Projector MFLOPs",
    ]
    return "\n".join(
        [
            "## Systems on easy-VQA",
            "",
            f"A fresh projector between the same tower and decoder, {runs[0]['epochs']:g} epoch of the same data",
            f"(`python -m benchmarks.recipes.easy_vqa`, {runs[0]['hardware']}). As in LLaVA's second stage the tower",
            "is frozen, projector and decoder train; both were trained from scratch with an MLP between them before.",
            "Accuracy on all 9,673 official test questions; with several seeds the mean and the range.",
            "",
            table(head, rows),
            "",
            "- `delta_elastic`, `m3` and `mqt` answer at every budget from one checkpoint; of the others each cell is",
            "  a model of its own.",
            "- `fastervlm`, `prumerge` and `fastv` are not trained: they run on the MLP's model.",
            "- `llavolta` pools while it trains and then makes the MLP's 64 tokens.",
            "- Projector FLOPs are those of the compiled program for one image, at 16 tokens or else at 64.",
            f"- Runs of one system and number of tokens that differ in the seed alone are up to {seed_range(runs):.3f}",
            "  apart: smaller differences between systems mean nothing.",
        ]
    )


def seed_range(runs: list[dict]) -> float:
    """The largest range of accuracy over the seeds of one system and number of tokens."""
    cells = [accuracies(runs, system, tokens) for system in SYSTEMS for tokens in TOKENS]
    return max(max(values) - min(values) for values in cells if values)


def budgets(runs: list[dict]) -> str:
    elastic = next((run for run in runs if run["system"] == "delta_elastic"), None)
    fixed = [run for run in runs if run["system"] == "delta" and run["seed"] == 0]
    rows = [
        [
            tokens,
            cell(accuracies([elastic] if elastic else [], "delta_elastic", tokens)),
            cell(accuracies(fixed, "delta", tokens)),
        ]
        for tokens in TOKENS
    ]
    return "\n".join(
        [
            "## One elastic Delta beside fixed ones",
            "",
            "The elastic model was trained once, a budget drawn for each step; each fixed model was trained for its",
            "own, on as much data. Seed 0.",
            "",
            table(["Tokens", "Elastic", "Fixed"], rows),
            "",
            f"![Accuracy against visual tokens]({PLOT.name})",
        ]
    )


def ablations(runs: list[dict]) -> str:
    runs = [run for run in runs if run["seed"] == 0]
    rows = [
        [name, *(cell(accuracies(runs, system, "16", kind)) for kind in ("all", "color", "shape", "yes/no"))]
        for system, name in ABLATIONS.items()
    ]
    head = ["Delta at 16 tokens", "All", "Colour", "Shape", "Yes/no"]
    return f"## Ablations\n\nThe paper's equations, trained as above, seed 0.\n\n{table(head, rows)}"


def step_times() -> str:
    file = RESULTS / "easy_vqa" / "step_times.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())
    rows = [
        [
            SYSTEMS[system][0] if system in SYSTEMS else f"Delta, {ABLATIONS[system]}",
            str(step["tokens"]),
            f"{step['ms_a_question']:.2f}",
            f"{step['ratio_to_mlp']:.2f}",
        ]
        for system, step in found["steps"].items()
    ]
    head = ["System", "Tokens", "ms a question", "Ratio to the MLP's"]
    return (
        f"## Step times\n\n`{found['command']}`, {found['hardware']}: a train step by question, in turns with the\n"
        f"MLP's in the same process, medians.\n\n{table(head, rows)}"
    )


def soak() -> str:
    """What became of a training that was killed again and again; "" without the file."""
    file = RESULTS / "soak.json"
    if not file.exists():
        return ""
    run = json.loads(file.read_text())
    same = run["parameters_equal_to_the_bit"] and run["losses_equal_to_the_bit"]
    which = "those" if same else "**not** those"
    saves = f"a checkpoint every {run['checkpoint_every']}"
    rows = [
        [saves, *map(str, run["lowest_memory_mib_by_tenth"])],
        ["one at the end", *map(str, run["lowest_memory_mib_by_tenth_without_saves"])],
    ]
    return (
        "## A training that is killed\n\n"
        f"{run['steps']:,} steps of a tiny model with {saves}, killed "
        f"{len(run['killed_after_steps'])} times at random and\nstarted again (`{run['command']}`, {run['hardware']}): "
        f"all losses and the final parameters are\n{which} of the undisturbed run, bit for bit. "
        "The least memory of the process, in MiB, in each tenth\nof the steps when it is left alone:\n\n"
        f"{table(['', *map(str, range(1, 11))], rows)}\n\n"
        f"What grows comes with the saves: without any training each leaves {run['memory_kib_left_by_a_save_alone']} "
        "KiB, as\ntensorstore never frees the JSON that it gives to orbax."
    )


def plot() -> None:
    """docs/easy_vqa_budgets.png: accuracy by number of tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = [json.loads(file.read_text()) for file in sorted((RESULTS / "easy_vqa").glob("*-s*.json"))]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for system in ("delta", "delta_elastic", "token_packer", "m3", "mqt", "fastv", "fastervlm", "prumerge", "mlp"):
        points = [(int(tokens), values) for tokens in TOKENS if (values := accuracies(runs, system, tokens))]
        if points:
            counts, values = zip(*points, strict=True)
            axes.plot(counts, list(map(statistics.mean, values)), "o-", label=SYSTEMS[system][0])
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
    axes.set(xlabel="visual tokens an image", ylabel="accuracy on easy-VQA")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(PLOT, dpi=120, metadata={"Software": None})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    return parser.parse_args(arguments)


def main() -> None:
    parse()
    PAGE.write_text(page())
    plot()
    efficiency.plots()
    print(f"written to {PAGE} and {PLOT}")


if __name__ == "__main__":
    main()
