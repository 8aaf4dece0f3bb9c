"""How often a heat map finds the shape.

    python -m benchmarks.measure.gradcam --runs runs/benchmark

Over easy-VQA test images, models of recipes.easy_vqa and both methods of analysis/gradcam.py: the share of the
heat in cells that the shape touches, and whether the hottest cell does. Writes benchmarks/results/gradcam.json."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import deltallava_jax
from benchmarks.program import RESULTS, ROOT, argument_parser, cores, origin, write_result
from deltallava_jax.analysis import gradcam
from deltallava_jax.data import easy_vqa
from deltallava_jax.data.images import load_image

OUT = RESULTS / "gradcam.json"
MODELS = {  # workdir -> tokens
    "mlp-all-s0": (64,),
    "delta_elastic-all-s0": (64, 16),
    "token_packer-16-s0": (16,),
    "honeybee_c-16-s0": (16,),
}
CONTRAST, TOUCHED = 60, 0.05  # of a shape's pixels to the background; the share of a cell from which on it is touched


def questions(count: int) -> list:
    """One question about the shape for each of the first images that have one."""
    found = {}
    for question in easy_vqa.questions("test"):
        if question.question.startswith("what") and "shape" in question.question and "color" not in question.question:
            found.setdefault(question.image, question)
    return list(found.values())[:count]


def touched(pixels: np.ndarray, side: int) -> np.ndarray:
    """Bool [side, side]: the cells with some of the shape."""
    pixels = pixels.astype(int)
    background = np.median(pixels.reshape(-1, 3), axis=0)
    shape = np.abs(pixels - background).max(-1) > CONTRAST
    cell = len(pixels) // side
    return shape.reshape(side, cell, side, cell).mean((1, 3)) > TOUCHED


def measure(runs: Path, count: int) -> list[dict]:
    rows, asked = [], questions(count)
    for name, budgets in MODELS.items():
        model = deltallava_jax.load(runs / name)
        for budget in budgets:
            shares = {method: [] for method in gradcam.METHODS}
            hits, chance = {method: [] for method in gradcam.METHODS}, []
            for question in asked:
                path = easy_vqa.image_path("test", question.image)
                cells = touched(load_image(path, model.cfg.vision.image_size, model.aspect), round(budget**0.5))
                chance.append(cells.mean())
                for method in gradcam.METHODS:
                    (found,) = gradcam.heat_maps(
                        model, path, question.question, budgets=(budget,), answer=question.answer, method=method
                    )
                    shares[method].append(found.grid[cells].sum() / max(found.grid.sum(), 1e-30))
                    hits[method].append(bool(found.grid.max() > 0 and cells.flat[found.grid.argmax()]))
            mean = lambda values: round(float(np.mean(values)), 3)
            row = dict(system=name.split("-")[0], tokens=budget, images=len(asked), chance=mean(chance))
            for method in gradcam.METHODS:
                row[method] = dict(share=mean(shares[method]), hottest=mean(hits[method]))
            print(row, flush=True)
            rows.append(row)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "benchmark", help="workdirs of recipes.easy_vqa")
    parser.add_argument("--images", type=int, default=200)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    rows = measure(options.runs, options.images)
    write_result(OUT, {**origin(__spec__.name, [], cores()), "rows": rows})
    print(f"written to {OUT}")


if __name__ == "__main__":
    main()
