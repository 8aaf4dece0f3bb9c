"""A plot of the rows of analysis/efficiency.py, in the form of the paper's Figure 3."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from deltallava_jax.errors import ConfigError

PARTS = {"vision": "#4c72b0", "projector": "#dd8452", "prefill": "#55a868", "decode": "#c44e52"}
TITLES = {"paper": "in the paper's convention", "exact": "every matrix product"}
MOST_STACKED = 2  # with more systems only totals are plotted, not parts


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib, which is not installed: pip install '.[plots]', or matplotlib")


def plot(rows: list[dict], path: Path) -> None:
    """Writes a PNG with a panel for each convention: the four parts of each answer stacked, or for many systems their
    totals as curves over the number of tokens.

    rows: of equal lengths of text and answers. Raises ConfigError without matplotlib."""
    require_matplotlib()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    systems = list(dict.fromkeys(row["system"] for row in rows))
    stacked = len(systems) <= MOST_STACKED
    width = max(5.0, 1.5 + 0.25 * len(rows)) if stacked else 6.0
    figure, panels = pyplot.subplots(1, 2, figsize=(2 * width, 4.2), sharey=True, layout="constrained")
    for axes, (convention, title) in zip(panels, TITLES.items(), strict=True):
        own = [row for row in rows if row["convention"] == convention]
        (_stack if stacked else _curves)(axes, own, systems)
        axes.set(title=title)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(ylabel=f"TFLOPs: {rows[0]['text_tokens']} text tokens, {rows[0]['new_tokens']} new ones")
    panels[1].legend(fontsize=8)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)


def _stack(axes, rows: list[dict], systems: list[str]) -> None:
    below = [0.0] * len(rows)
    for part, color in PARTS.items():
        values = [row[f"{part}_tflops"] for row in rows]
        axes.bar(range(len(rows)), values, bottom=below, label=part, color=color)
        below = [a + b for a, b in zip(below, values, strict=True)]
    for place, height in enumerate(below):
        axes.annotate(f"{height:.3g}", (place, height), ha="center", va="bottom", fontsize=7)
    names = [f"{row['system']}\n{row['budget']}" if len(systems) > 1 else str(row["budget"]) for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set(xlabel="visual tokens per image")


def _curves(axes, rows: list[dict], systems: list[str]) -> None:
    from matplotlib import colormaps

    for place, system in enumerate(systems):
        points = sorted((row["budget"], row["total_tflops"]) for row in rows if row["system"] == system)
        style = dict(color=colormaps["tab20"](place % 20), marker="osD^v"[place % 5], markersize=4)
        axes.plot(*zip(*points, strict=True), label=system, **style)
    axes.set_xscale("log", base=2)
    budgets = sorted({row["budget"] for row in rows})
    axes.set_xticks(budgets, list(map(str, budgets)))
    axes.minorticks_off()
    axes.set(xlabel="visual tokens per image")
