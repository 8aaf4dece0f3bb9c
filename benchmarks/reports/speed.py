"""The parts of docs/results.md about towers, training time and throughput, which results.py puts on it."""

from __future__ import annotations

import json

from benchmarks.measure import inference, train_speed
from benchmarks.program import RESULTS
from benchmarks.recipes.easy_vqa import TOWERS
from benchmarks.reports.markdown import cell, table

# The paper's Table 5: tower -> (the paper's name, tokens, GQA, POPE, SQA)
PAPER_TOWERS = {
    "clip_48": ("CLIP 336", 64, 61.1, 86.12, 67.82),
    "clip_32": ("CLIP 224", 64, 60.5, 84.56, 69.3),
    "siglip_72": ("SigLIP 386", 81, 59.44, 85.2, 68.42),
}


WHOSE = """\
## What is the paper's and what is ours

- Ours, measured: every table on easy-VQA, the times and the heat maps. Small models, trained here from scratch.
- Ours, counted: the operations of an answer, in the paper's convention and by every matrix product.
- The paper's: what is named so, copied from its tables and its Figure 3. None of its results was reproduced: its
  models are Vicuna-7B and 13B after LLaVA's 558k captions and 665k conversations, and no run of that size was made.

Those runs are, with the data and weights in place ([README](../README.md)) and other configurations for other budgets
and towers ([configs](../configs/README.md)):

```
python -m deltallava_jax convert --vision clip-vit-large-patch14-336 --decoder vicuna-7b-v1.5 \\
    --config configs/pretrain_7b.py runs/delta_start
python train.py --config configs/pretrain_7b.py --workdir runs/delta_pretrain
python train.py --config configs/finetune_7b.py --workdir runs/delta
python eval.py --workdir runs/delta --tasks \\
    gqa,mmbench_en_dev,mme,pope,scienceqa_img,textvqa_val,vqav2_val,vizwiz_vqa_val,nocaps_val,flickr30k_test
python -m benchmarks.measure.train_speed --minutes 9
python -m benchmarks.measure.inference --random vicuna_7b
```"""


def parts() -> tuple[str, ...]:
    return towers(), training_time(), throughput()


def training_time() -> str:
    """The paper's Table 4, by the steps of each machine that was at hand."""
    parts = ["## Training time"]
    for folder in sorted(path for path in (RESULTS / "train_speed").glob("*") if any(path.glob("*.json"))):
        found = train_speed.read(folder)
        one = next(iter(found.values()))
        small = " The model is small, of a 7B's proportions (benchmarks/measure/sizes.py)." * (one["size"] == "small")
        parts.append(
            f"`{one['command']}`, {one['hardware']}:\nmedians of {one['steps']} train steps with random weights, 576 "
            f"patches an image.{small}\n\n{table(train_speed.HEAD, train_speed.rows(found))}"
        )
    if len(parts) == 1:
        return ""
    parts.append(NOTES)
    return "\n\n".join(parts)


NOTES = """\
- 576 tokens are LLaVA-1.5's MLP, fewer are Delta. Stage 1 (`pretrain`) trains the projector on captions, stage 2
  (`finetune`) projector and decoder on a mixture of which 6 % of the conversations have no image.
- Conversations a second are those of the whole mixture; tokens (text and visual, no padding), images, MFU and memory
  are those of the steps with images. A ratio is the time of an epoch at 576 tokens by that at so many.
- The paper's ratios are those of its Table 4, whole epochs of its run in hours and minutes: its decoder has 7B
  parameters, its text is LLaVA's, its batches are padded, and reading the data counts.
- Attention over a row takes a larger share in a narrow model, and packed rows are longer: there packing pays with
  few tokens an image and costs with 576. Padded batches have lengths in multiples of 256: the captions of stage 1 are
  mostly padding there, which holds their ratio down."""


def throughput() -> str:
    """The paper's Figure 3, by the answers of each machine that was at hand."""
    parts = ["## Throughput of answers"]
    for name in ("random", "small"):
        file = RESULTS / f"inference_{name}.json"
        if not file.is_file():
            continue
        found, rows = json.loads(file.read_text()), []
        for one in found["results"]:
            key = "new_tokens_per_second_of_the_whole_call"
            same = {each["budget"]: each[key] for each in found["results"] if each["batch"] == one["batch"]}
            paper = inference.PAPER.get(one["budget"])
            rows.append([
                str(one["batch"]), str(one["budget"]), f"{one['first_ms']:.0f}", f"{one['tokens_per_second']:.1f}",
                f"{one[key]:.1f}", f"{one[key] / same[576]:.2f}" if 576 in same else "",
                f"{paper / inference.PAPER[576]:.2f}" if paper and one["batch"] == 1 else "",
            ])  # fmt: skip
        head = ["Batch", "Tokens", "First token, ms", "Then tokens/s", "Tokens/s of the whole", "Ratio to 576",
                "Paper's ratio"]  # fmt: skip
        parts.append(
            f"`{found['command']}`, {found['hardware']}: an image, {inference.TEXT} tokens of text, "
            f"{found['new_tokens']} new ones,\nrandom weights, Delta at every budget; medians of {found['rounds']} "
            f"rounds.\n\n{table(head, rows)}"
        )
    if len(parts) == 1:
        return ""
    parts.append(
        "The paper prints 23.96 tokens a second at 576 and 37.08 at 1 for Vicuna-7B; the whole is tower, projector,\n"
        "prefill and decoding."
    )
    return "\n\n".join(parts)


def towers() -> str:
    """The paper's Table 5 in small."""
    runs = [json.loads(file.read_text()) for file in sorted((RESULTS / "towers").glob("*.json"))]
    rows, apart = [], 0.0
    for tower in TOWERS:
        own = [run for run in runs if run["tower"] == tower]
        if not own:
            continue
        first = own[0]
        tokens = next(iter(first["accuracy"]))
        values = [[run["accuracy"][tokens][kind] for run in own] for kind in ("all", "shape")]
        apart = max(apart, max(values[0]) - min(values[0]))
        name, theirs, *scores = PAPER_TOWERS[tower]
        rows.append([
            f"{ {'clip': 'CLIP', 'siglip': 'SigLIP'}[first['family']] }-shaped, {first['pixels']} pixels",
            str(first["patches"]), tokens, str(len(own)), *map(cell, values),
            f"{name}, {theirs}: " + ", ".join(f"{value:g}" for value in scores),
        ])  # fmt: skip
    if not rows:
        return ""
    head = ["Tower", "Patches", "Tokens", "Seeds", "Accuracy", "Shape", "In the paper: tower, tokens: GQA, POPE, SQA"]
    return "\n".join([
        "## Towers",
        "",
        f"`python -m benchmarks.recipes.easy_vqa --towers`, {runs[0]['hardware']}: Delta with the paper's scale",
        f"factors, {runs[0]['epochs']} epochs from scratch, tower and decoder included; easy-VQA's official test",
        "split. With several seeds the mean and the range.",
        "",
        table(head, rows),
        "",
        f"- Runs of one tower that differ in the seed alone are up to {apart:.3f} apart: smaller differences mean",
        "  nothing.",
        "- As in the paper's Table 5 the towers differ in resolution and architecture; here they have 6, 4 and 9",
        "  patches a side instead of 24, 16 and 27. SigLIP's shape has no class token and no norm before its layers.",
        "- Nothing was pretrained: this shows what resolution and tokens do to a small tower that learns with the",
        "  rest, not how the published CLIP and SigLIP compare. After so few epochs shapes are only partly learned.",
        "- The paper's own towers are configs/llava.py:delta_clip_224 and :delta_siglip, with the 7B data.",
    ])  # fmt: skip
