"""The model card of an export."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from deltallava_jax.convert.read import Pretrained
from deltallava_jax.data.conversation import IMAGE as IMAGE_TOKEN
from deltallava_jax.data.conversation import TEMPLATES
from deltallava_jax.models import projectors
from deltallava_jax.workdir import Workdir


def write_card(model: Pretrained, folder: Path, name: str, source: Path | None) -> None:
    """README.md: what the model is, how it was trained, its results; both from ``source`` where that is a workdir."""
    cfg = model.cfg
    parts = [f"| {part} | {describe(getattr(cfg, part))} |" for part in ("vision", "projector", "decoder")]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: image-text-to-text", "---", "", f"# {name}", "",
        "Exported by deltallava_jax.", "",
        "| Part | |", "|---|---|", *parts, f"| parameters | {model.size:,} |", "",
    ]  # fmt: skip
    if (folder / "modeling_deltallava.py").is_file():
        template = TEMPLATES[model.template]
        prompt = template.user.format(f"{IMAGE_TOKEN}\\nWhat is this?") + template.assistant
        budgets = ", ".join(map(str, projectors.budgets(cfg.projector)))
        lines += [
            "```python", "from transformers import AutoModelForImageTextToText, AutoProcessor", "",
            f'model = AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)',
            f'processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)',
            f'inputs = processor(images=image, text="{prompt}", return_tensors="pt")',
            f"tokens = model.generate(**inputs, max_new_tokens=32)  # budget=: {budgets} tokens an image",
            "print(processor.batch_decode(tokens, skip_special_tokens=True)[0])", "```", "",
        ]  # fmt: skip
    results = Workdir(source).reports() if source else []
    shown = lambda r: r.get("images") or ("noise" if r["blind"] else "real")  # "blind": of earlier versions
    if results:
        lines += ["## Results", "", "| Task | Tokens an image | Images | Accuracy | n |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['task']} | {r['budget']} | {shown(r)} | {r['accuracy']:.4f} | {r['n']} |"
            for r in results if "accuracy" in r
        ] + [""]  # fmt: skip
    if source is not None and Workdir(source).exists:
        lines += ["## Training configuration", "", "```json", (source / "config.json").read_text().strip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def describe(part) -> str:
    """The settings of a config section that are not its defaults, in one line."""
    if part is None:
        return "none"
    changed = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if getattr(part, f.name) != f.default}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "defaults"
