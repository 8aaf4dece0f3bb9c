"""The parts of docs/results.md about operations and heat maps, which results.py puts on it."""

from __future__ import annotations

import json

from benchmarks.program import RESULTS, ROOT
from benchmarks.reports.markdown import table
from deltallava_jax.analysis.efficiency import BUDGETS, PUBLISHED
from deltallava_jax.analysis.efficiency_plot import plot

PLOTS = {  # file in docs/ -> the systems in it
    "flops_delta.png": ("mlp", "delta"),
    "flops_systems.png": ("delta", "m3", "mqt", "quecc", "resampler", "evit", "fastervlm", "fastv"),
}
PARTS = ("vision", "projector", "prefill", "decode", "total")


def load() -> list[dict]:
    return json.loads((RESULTS / "flops.json").read_text())


def efficiency() -> str:
    """The section on what an answer costs."""
    rows = load()
    find = lambda system, budget, kind: next(
        (r for r in rows if (r["system"], r["budget"], r["convention"]) == (system, budget, kind)), None
    )
    own = []
    for budget in BUDGETS:
        system = "mlp" if budget == 576 else "delta"
        printed = PUBLISHED.get(budget, {})
        if printed:
            cells = [f"{printed[part]:g}" if part in printed else "" for part in PARTS]
            own.append([str(budget), "printed in the paper", *cells, ""])
        for kind, name in (("paper", "by the paper's convention"), ("exact", "every matrix product")):
            row = find(system, budget, kind)
            cells = [f"{row[f'{part}_tflops']:.3g}" for part in PARTS]
            own.append([str(budget), name, *cells, f"{row['cache_bytes'] / 2**20:.1f}"])
    systems = list(dict.fromkeys(row["system"] for row in rows))
    cells = lambda system: [
        f"{row['total_tflops']:.2f}" if (row := find(system, budget, "exact")) else "" for budget in BUDGETS
    ]
    text, new = rows[0]["text_tokens"], rows[0]["new_tokens"]
    share = lambda what: f"{find('delta', 16, 'exact')[what] / find('mlp', 576, 'exact')[what]:.0%}"
    return "\n".join(
        [
            "## What an answer costs",
            "",
            "Counted, not measured: `python -m deltallava_jax flops --systems all --json`, CLIP-L/14-336 and",
            f"Vicuna-7B, one image, {text} tokens of text, {new} new ones. TFLOPs; the cache, in MiB, is that of",
            "bfloat16 keys and values. 576 tokens are LLaVA-1.5's MLP, the others Delta.",
            "",
            table(["Tokens", "", *(part.capitalize() for part in PARTS), "Cache"], own),
            "",
            "- The paper's convention has two matrices in the decoder's MLP; Vicuna's has three. It counts two maps",
            "  of the projector on the visual tokens alone; Delta's keys and values come from all 576 patches at",
            f"  every budget. Its prefill follows from {text} tokens of text; its answers had 30 on average.",
            f"- By every matrix product an answer at 16 tokens takes {share('total_tflops')} of what it takes at 576,",
            f"  and {share('cache_bytes')} of the cache.",
            "",
            "![Operations of an answer](flops_delta.png)",
            "",
            "All systems, every matrix product, total TFLOPs by visual tokens (an empty cell: not made):",
            "",
            table(["System", *map(str, BUDGETS)], [[f"`{system}`", *cells(system)] for system in systems]),
            "",
            "- `fastv` drops tokens before the decoder's third layer: the two below it see all 576.",
            "- `quecc` reads the question with the decoder first; all 64 places that it may take are counted.",
            "- `evit` and `dynamicvit` drop patches inside the tower. `prumerge` and `prumerge_plus` choose by",
            "  outliers of the attention, up to that many tokens.",
            "",
            "![Operations by system](flops_systems.png)",
        ]
    )


def heat_maps() -> str:
    """The section on how often a heat map finds the shape."""
    file = RESULTS / "gradcam.json"
    if not file.is_file():
        return ""
    found = json.loads(file.read_text())
    rows = [
        [f"`{row['system']}`", str(row["tokens"]), f"{row['chance']:.2f}"]
        + [f"{row[method][what]:.2f}" for what in ("share", "hottest") for method in ("relevance", "gradcam")]
        for row in found["rows"]
    ]
    head = ["System", "Tokens", "Chance"]
    head += [f"{what}, {method}" for what in ("Share", "Hottest") for method in ("relevance", "gradcam")]
    return "\n".join(
        [
            "## Heat maps",
            "",
            f"`{found['command']}`, {found['hardware']}: {found['rows'][0]['images']} test images of easy-VQA, asked",
            "for their shape. The share of the heat in the cells that the shape touches, how often the hottest cell is",
            "one of them, and how many cells those are (chance), for both methods of the `gradcam` command.",
            "",
            table(head, rows),
        ]
    )


KNOWN = """\
## Known problems of the paper's tables

Wherever the paper's numbers stand beside ours:

- Table 1 mixes protocols: the LLaVA-1.5 row is the model zoo's (VizWiz test, VQAv2 test-dev, TextVQA with OCR tokens),
  Delta-LLaVA's rows are lmms-eval's val splits without OCR tokens.
- In Table 2 the values of Qwen-VL-Chat under POPE, SQA and VizWiz are those of SQA, VizWiz and VQAv2.
- Table 4's text says 13 and 2.5 times; the table gives 5.25 (1:24:01 to 0:16:00) and 1.6 (4:34:20 to 2:51:50).
- Table 5 says SigLIP 386, whose 81 tokens come from 384 pixels, and marks its 68.42 as the best SQA beside 69.3.
- Table 6 repeats several cells of FastV as Delta-LLaVA's.
- Figure 3 counts an MLP of two matrices and two maps of the projector (above)."""


def plots() -> None:
    rows = load()
    for name, systems in PLOTS.items():
        chosen = [row for row in rows if row["system"] in systems]
        plot(sorted(chosen, key=lambda row: systems.index(row["system"])), ROOT / "docs" / name)
