"""Results in the form of the paper's Table 1, followed by the paper's rows, marked as such."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deltallava_jax.workdir import Workdir

# Column -> (task, metric, factor to the paper's scale)
COLUMNS = {
    "GQA": ("gqa", "exact_match", 100),
    "MMB": ("mmbench_en_dev", "gpt_eval_score", 1),
    "MME": ("mme", "mme_perception_score", 1),
    "POPE": ("pope", "pope_f1_score", 100),
    "SQA": ("scienceqa_img", "exact_match", 100),
    "TextVQA": ("textvqa_val", "exact_match", 100),
    "VizWiz": ("vizwiz_vqa_val", "exact_match", 100),
    "VQAv2": ("vqav2_val", "exact_match", 100),
    "Nocaps": ("nocaps_val", "nocaps_CIDEr", 100),
    "Flickr30k": ("flickr30k_test", "flickr_CIDEr", 100),
}
# The paper's Table 1 (Vicuna-7B; 13B where stated), captions from its Table 6: (method, tokens, values by column).
PAPER = (
    ("LLaVA-1.5", "576", (62.0, 64.3, 1510.7, 85.9, 66.8, 58.2, 50.0, 78.5, 99.8, 67.9)),
    ("TokenPacker", "144", (61.9, 65.1, None, 87.0, None, None, 52.0, 77.9)),
    ("Matryoshka Multi.", "144", (61.3, 66.4, None, 87.0, None, None, 53.1)),
    ("Matryoshka Query", "144", (61.4, 64.4, 1446.5, 83.9, 67.5, None, 52.0, 76.4)),
    ("Delta-LLaVA", "144", (62.34, 65.95, 1466.52, 86.77, 68.7, 57.14, 56.6, 76.1, 102.6, 72.1)),
    ("LLaVA-1.5 13B", "576", (63.3, 67.7, 1531.3, 86.2, 71.6, 61.3, 53.6, 80.0, 102.8, 73.0)),
    ("Delta-LLaVA-13B", "144", (62.7, 67.4, 1527.41, 87.3, 71.6, 59.25, 58.2, 76.9, 107.2, 76.1)),
    ("PruMerge", "~32", (57.2, 60.9, 1350.3, 76.3, 68.5, 56.0, 45.2, 72.0)),
    ("TokenPacker", "36", (59.6, 62.8, 1440.9, 83.3, 71.0, 53.2, 50.2, 75.0)),
    ("Matryoshka Multi.", "36", (60.3, 64.8, None, 85.5, None, None, 52.8)),
    ("Matryoshka Query", "36", (58.8, 63.4, 1416.3, 81.9, 66.8, None, 51.0, 73.7)),
    ("QueCC", "36", (60.5, 62.5, 1442.0, 84.5, 70.6, 53.3, 50.1, 75.8)),
    ("Delta-LLaVA", "36", (61, 64.4, 1424.7, 85.7, 68.6, 54.4, 56.2, 74.3, 99.8, 68.7)),
    ("TokenPacker", "16", (58.9, 62.7, 1378.8, 83.7, 68.1, 52.5, 50.5, 74.4)),
    ("Matryoshka Query", "16", (57.6, 61.9, 1408.5, 80.8, 67.5, None, 49.8, 71.1)),
    ("QueCC", "16", (59.0, 62.2, 1408.0, 83.4, 70.7, 51.3, 47.7, 74.5)),
    ("Delta-LLaVA", "16", (59.5, 62.9, 1375.9, 84.7, 69.7, 53.6, 55.2, 73.1, 98.9, 67.9)),
    ("TokenPacker", "4", (56.2, 61.5, 1347.6, 81.7, 68.5, 49.2, 45.7, 70.5)),
    ("Matryoshka Query", "4", (53.0, 56.5, 1176.1, 77.6, 65.1, None, 49.4, 64.1)),
    ("QueCC", "4", (56.5, 62.1, 1390.3, 81.8, 68.6, 48.7, 45.0, 70.6)),
    ("Delta-LLaVA", "4", (57.3, 61.7, 1314.2, 82.2, 67.9, 53.1, 52.6, 72.0, 91.9, 62.2)),
    ("TokenPacker", "1", (53.4, 58.7, 1262.4, 80.7, 69.4, 46.2, 41.1, 66.9)),
    ("Matryoshka Multi.", "1", (52.6, 59.5, None, 78.4, None, None, 49.4)),
    ("Matryoshka Query", "2", (50.8, 54.4, 1144.0, 74.5, 65.0, None, 48.5, 61.0)),
    ("QueCC", "1", (53.5, 59.4, 1269.1, 81.3, 69.9, 46.8, 44.1, 67.3)),
    ("Delta-LLaVA", "1", (53.7, 57.6, 1257.9, 82.4, 68.7, 48, 51, 66.1, 85.5, 57.7)),
)
NOTES = """\
Rows marked (paper) are printed in Delta-LLaVA's Tables 1 and 6; they were not measured here. They mix protocols: the
LLaVA-1.5 row is the model zoo's (VizWiz test, VQAv2 test-dev, TextVQA with OCR tokens), those of Delta-LLaVA are
lmms-eval's val splits without OCR tokens, the others are taken from their papers. Compare rows of one harness only.
Several of Table 6's captions for Delta-LLaVA repeat FastV's. Ours: POPE is F1 over the three kinds, MME perception,
Nocaps and Flickr30k CIDEr; MMBench is scored without GPT unless OPENAI_API_KEY is set."""


def format_table(folders: Sequence[Path]) -> str:
    """Markdown: a row for each workdir and number of tokens with results in its ``eval`` folder, then the paper's.

    Only columns with a value in one of ours, and only whole evaluations (``Workdir.reports``)."""
    ours = [row for folder in folders for row in _ours(folder)]
    columns = [place for place in range(len(COLUMNS)) if any(cells[place] for _, _, cells in ours)]
    rows = [(name, tokens, [cells[place] or "" for place in columns]) for name, tokens, cells in ours]
    for method, tokens, values in PAPER:
        cells = [f"{values[place]:g}" if place < len(values) and values[place] is not None else "" for place in columns]
        if any(cells):
            rows.append((f"{method} (paper)", tokens, cells))
    head = ["Method", "Tokens", *(list(COLUMNS)[place] for place in columns)]
    lines = [_line(head), "|" + "---|" * len(head), *(_line([name, tokens, *cells]) for name, tokens, cells in rows)]
    return "\n".join([*lines, "", NOTES])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _ours(folder: Path) -> list[tuple[str, str, list[str]]]:
    """(workdir, tokens, a cell for each column) of each budget of a workdir, the most tokens first."""
    found: dict[int, dict[str, dict]] = {}
    for report in Workdir(folder).reports():
        if "metrics" in report:
            found.setdefault(report["budget"], {})[report["task"]] = report
    rows = []
    for budget, reports in sorted(found.items(), reverse=True):
        cells = []
        for task, metric, factor in COLUMNS.values():
            report = reports.get(task)
            value = report["metrics"].get(metric) if report else None
            cells.append("" if value is None else f"{factor * value:.1f}")
        rows.append((folder.name, str(budget), cells))
    return rows
