"""The part of docs/results.md about the two stages on emoji, which results.py puts on it."""

from __future__ import annotations

import json
import statistics

from benchmarks.program import RESULTS
from benchmarks.reports.markdown import table

TOKENS = ("16", "4", "1")
NAMES = {  # run -> its name, in the order of the tables
    "delta": "Delta, elastic",
    "mqt": "MQT",
    "pool": "MLP and average pooling",
    "token_packer": "TokenPacker",
    "delta_shuffled": "Delta, pictures shuffled",
    "fastv": "FastV on pooling's 16 tokens",
    "fastervlm": "FasterVLM on pooling's MLP",
    "prumerge": "PruMerge on pooling's MLP",
}
TRAINED = ("delta", "mqt", "pool", "token_packer")
PRUNED = ("fastv", "fastervlm", "prumerge")


def emoji() -> str:
    """The section; empty where no run is finished."""
    runs = [json.loads(file.read_text()) for file in sorted((RESULTS / "emoji").glob("*-s*.json"))]
    runs.sort(key=lambda run: (list(NAMES).index(run["run"]), run["seed"]))
    if not any("held_out" in run and run["run"] in TRAINED for run in runs):
        return ""
    return "\n\n".join(filter(None, [about(runs[0]), losses(runs), names(runs), pruning(runs), absent(runs)]))


def about(run: dict) -> str:
    tower, style = run["tower"], run["style"].capitalize()
    pretrain, finetune = run["steps"]["pretrain"], run["steps"]["finetune"]
    size, seen, right = tower["parameters"] / 1e6, tower["signs"], tower["held_out_accuracy"]
    return f"""\
## The two stages on emoji

`python -m benchmarks.recipes.emoji_recipe`, {run["hardware"]}: {run["signs"]} signs, each drawn in three styles;
Google's and Twitter's train, {style}'s is the test. A tower of {size:.1f} million parameters was trained before,
contrastively with the names of {seen} signs in the two styles ({tower["steps"]} steps); of the held-out style it puts
{right:.0%} of the pictures nearest to their own name among all {seen}. It stays frozen. Then `convert`, stage 1
({pretrain} steps of 128 slots, the projector alone) and stage 2 ({finetune} steps, projector and SmolLM2-135M), as
`train.py` runs them on 558k and 665k records ([configs/emoji.py](../configs/emoji.py)). All runs have the same tower,
decoder, data and slots; one model answers at all its budgets, drawn for each step. What can be told of the held-out
style is bounded by what the tower makes of it. Two standard errors of an exact match are up to
{run["signs"] ** -0.5:.2f} with so few pictures, more than most rows differ."""


def losses(runs: list[dict]) -> str:
    rows = []
    for run in (run for run in runs if "stage1_loss" in run):
        for tokens, found in run["stage1_loss"]["held_out"].items():
            seen = run["stage1_loss"]["train"][tokens]
            cells = [f"{each[kind]:.3f}" for each in (seen, found) for kind in ("pictures", "shuffled")]
            rows.append([label(run, runs), tokens, f"{run['projector_parameters']:,}", *cells])
    head = [
        "After stage 1",
        "Tokens",
        "Projector parameters",
        "Training styles",
        "shuffled",
        "Held-out style",
        "shuffled",
    ]
    text = """\
The loss of a name after stage 1, with its own picture and with that of another sign: what a picture says about its
name is the difference."""
    if any(run["run"].endswith("_shuffled") for run in runs):
        text += """ The control was trained with the pictures shuffled among the names: it learns wrong names by
heart, and a sign's own is no likelier to it than another's."""
    return f"{text}\n\n{table(head, rows)}"


def names(runs: list[dict]) -> str:
    rows = []
    for run in (run for run in runs if run["run"] in TRAINED and "held_out" in run):
        for tokens in TOKENS:
            if tokens in run["held_out"]:
                held, seen = run["held_out"][tokens], run["train"][tokens]
                cells = [
                    [f"{of['exact']:.3f}", f"{of['cider']:.1f}", f"{of['cider_of_others']:.1f}"] for of in (held, seen)
                ]
                rows.append([label(run, runs), tokens, *cells[0], *cells[1]])
    signs, best = runs[0]["signs"], runs[0]["best_cider"]
    head = ["After stage 2", "Tokens", "Held-out: exact", "CIDEr", "of others"]
    head += ["Trained style: exact", "CIDEr", "of others"]
    return f"""\
Names told ("What is this?", greedy) of the {signs} pictures of the held-out style and of half as many of a style that
was trained on. Chance is {1 / signs:.3f}; CIDEr of the names themselves is {best:.0f}, as they have few words. "Of
others" is the control: the CIDEr of the same answers for the names of the other pictures.

{table(head, rows)}"""


def pruning(runs: list[dict]) -> str:
    found = {
        name: [run for run in runs if run["run"] == name and "held_out" in run] for name in ("delta", "pool", *PRUNED)
    }
    rows = []
    for name, own in found.items():
        cells = []
        for tokens in TOKENS:
            values = [run["held_out"][tokens]["cider"] for run in own if tokens in run["held_out"]]
            cells.append(f"{statistics.mean(values):.1f}" if values else "")
        if own:
            rows.append([NAMES[name], *cells])
    if not any(found[name] for name in PRUNED):
        return ""
    return f"""\
CIDEr on the held-out style when tokens are pruned, the shape of the paper's Table 6; with several seeds the mean. The
pruned rows are not trained: FastV keeps tokens of the pooling model's 16 from the decoder's third layer on, FasterVLM
and PruMerge choose among the 64 patches before its MLP, which was trained with pooled ones behind it.

{table(["CIDEr", *TOKENS], rows)}"""


def absent(runs: list[dict]) -> str:
    missing = [name for name in NAMES if name not in {run["run"] for run in runs}]
    names = ", ".join(f"`{name}`" for name in missing)
    return f"Not run here, the same command makes them: {names}." if missing else ""


def label(run: dict, runs: list[dict]) -> str:
    several = len({each["seed"] for each in runs if each["run"] == run["run"]}) > 1
    return NAMES[run["run"]] + (f", seed {run['seed']}" if several else "")
