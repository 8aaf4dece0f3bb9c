"""Where in an image an answer comes from: the paper's Figure 1, for one number of visual tokens or several.

    python -m deltallava_jax gradcam runs/easy_vqa --image shape.png --prompt "what shape is in the image?"
    python -m deltallava_jax gradcam runs/elastic --image taxi.jpg --prompt "What is weird here?" \\
        --budgets 16,64,144 --out weird.png

Writes a PNG: the tower's input image, and for each budget the heat of its tokens over it, with the answer below.
The heat comes from the gradient of the answer's log-probability at the projector's output: each token times its own
gradient (relevance), or weighted by the mean gradient of all, as in the paper's figure (gradcam). For systems whose
tokens have places in the image.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from deltallava_jax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a workdir of train.py, or a folder in Hugging Face's or LLaVA's layout")
    parser.add_argument("--image", required=True, type=Path)
    parser.add_argument("--prompt", required=True, help="the question")
    parser.add_argument("--budgets", default="", help="visual tokens per image, comma-separated (default: the most)")
    parser.add_argument("--answer", help="explain this answer instead of the model's own")
    parser.add_argument("--method", choices=("relevance", "gradcam"), default="relevance")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("gradcam.png"), help="default: gradcam.png")


def main(options: argparse.Namespace) -> None:
    import deltallava_jax
    from deltallava_jax.analysis import gradcam

    try:
        budgets = [int(part) for part in options.budgets.split(",")] if options.budgets else []
    except ValueError:
        raise ConfigError(f"--budgets {options.budgets!r}: expected numbers, e.g. 144,16") from None
    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {options.out}: expected a name that ends in .png")
    model = deltallava_jax.load(options.model)
    maps = gradcam.heat_maps(
        model, options.image, options.prompt,
        budgets=budgets, answer=options.answer, method=options.method, max_new_tokens=options.max_new_tokens,
    )  # fmt: skip
    for heat in maps:
        print(f"{heat.budget:4} tokens: {heat.answer}  (log-probability {heat.log_probability:.3f})")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    gradcam.figure(gradcam.tower_image(model, options.image), maps).save(options.out)
    print(f"written to {options.out}")
