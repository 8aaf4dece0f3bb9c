"""The model card of an export."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from deltallava_jax.convert.pretrained import Pretrained
from deltallava_jax.convert.read import read_json
from deltallava_jax.data.conversation import TEMPLATES
from deltallava_jax.models import systems
from deltallava_jax.workdir import Workdir

FOR_TRANSFORMERS = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained({name}{trust})
processor = AutoProcessor.from_pretrained({name}{trust})
content = [{{"type": "image", "path": "picture.png"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
{generate}
print(processor.decode(answer, skip_special_tokens=True))"""

FOR_US = """\
import deltallava_jax

model = deltallava_jax.load({name})
print(model.generate("picture.png", "What is this?"))"""

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # values of its --max-lora-rank


def write_card(model: Pretrained, folder: Path, name: str, source: Path | None) -> None:
    """README.md: the model, how to prompt it, its training and results; the last two if ``source`` is a workdir."""
    cfg = model.cfg
    parts = [f"| {part} | {describe(getattr(cfg, part))} |" for part in ("vision", "projector", "decoder")]
    task = "image-text-to-text" if cfg.whole else "text-generation" if cfg.decoder else "image-feature-extraction"
    lines = [
        "---", "library_name: transformers", f"pipeline_tag: {task}", "---", "", f"# {name}", "",
        "Exported by deltallava_jax.", "",
        "| Part | |", "|---|---|", *parts, f"| parameters | {model.size:,} |", "",
    ]  # fmt: skip
    if cfg.whole:
        lines += ["```python", _code(model, folder, name), "```", "", _prompts(model.template), ""]
    results = Workdir(source).reports() if source else []
    if results:
        lines += ["## Results", "", "| Task | Tokens an image | Images | Accuracy | n |", "|---|---|---|---|---|"]
        lines += [
            f"| {r['task']} | {r['budget']} | {_images(r)} | {r['accuracy']:.4f} | {r['n']} |"
            for r in results if "accuracy" in r
        ] + [""]  # fmt: skip
    if source is not None and Workdir(source).exists:
        config = read_json(source / "config.json")
        config["init_from"] = Path(config.get("init_from", "")).name  # cards are published; local paths should not be
        lines += ["## Training configuration", "", "```json", json.dumps(config, indent=2), "```", ""]
    (folder / "README.md").write_text("\n".join(lines))


def write_adapter_card(model: Pretrained, folder: Path, name: str, base: str | None) -> None:
    """README.md of an adapter. base: the folder in it that holds the base model; None for LLaVA's, which holds none."""
    settings = model.lora
    modules = sorted({path.rsplit("/", 1)[0].replace("/layers/", " ") for path in model.adapters})
    count = sum(leaf.size for leaf in model.adapters.values())
    lines = [
        "---", "library_name: peft", "---", "", f"# {name}", "",
        "A LoRA adapter, exported by deltallava_jax.", "",
        "| | |", "|---|---|", f"| rank | {settings.rank} |",
        f"| scale | {settings.scale:g} (alpha {settings.alpha:g}{', rslora' if settings.rslora else ''}) |",
        f"| matrices | {', '.join(modules)} |", f"| parameters | {count:,} |", "",
    ]  # fmt: skip
    if base is None:
        lines += ["For the code of LLaVA, with the base model as its --model-base. The projector is in "
                  "non_lora_trainables.bin.", ""]  # fmt: skip
    else:
        code = (folder / base / "modeling_deltallava.py").is_file()
        trust = ", trust_remote_code=True" if code else ""
        kind = "AutoModelForImageTextToText" if model.cfg.whole else "AutoModelForCausalLM"
        kind = kind if model.cfg.decoder else "AutoModel"
        held = ", with the projector as it was trained beside the adapter" if model.cfg.projector else ""
        lines += [f"The base model is in {base}/{held}.", "", "```python", "from peft import PeftModel",
                  f"from transformers import {kind}", "",
                  f'base = {kind}.from_pretrained("{name}/{base}"{trust})',
                  f'model = PeftModel.from_pretrained(base, "{name}")', "```", ""]  # fmt: skip
        allowed = next((rank for rank in VLLM_RANKS if rank >= settings.rank), None)
        if allowed and model.cfg.decoder and not code:
            lines += [f"vLLM takes ranks up to 16 unless told: `vllm serve {name}/{base} --enable-lora "
                      f"--max-lora-rank {allowed} --lora-modules adapter={name}`.", ""]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines))


def _images(report: dict) -> str:
    return report.get("images") or ("noise" if report["blind"] else "real")  # earlier versions wrote "blind"


def _code(model: Pretrained, folder: Path, name: str) -> str:
    """Python code that asks the model in the folder ``name`` about picture.png."""
    if "mm_vision_tower" in read_json(folder / "config.json"):
        return FOR_US.format(name=json.dumps(name))
    if not (folder / "modeling_deltallava.py").is_file():
        generate = (
            'answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]  # the new tokens'
        )
        return FOR_TRANSFORMERS.format(name=json.dumps(name), trust="", generate=generate)
    budgets = systems.budgets(model.cfg.projector)
    generate = f"budget = {budgets[0]}  # visual tokens an image, of {', '.join(map(str, budgets))}\n"
    generate += "answer = model.generate(**inputs, budget=budget, max_new_tokens=32)[0]"
    return FOR_TRANSFORMERS.format(name=json.dumps(name), trust=", trust_remote_code=True", generate=generate)


def _prompts(name: str) -> str:
    template = TEMPLATES[name]
    system = f"System text: {json.dumps(template.system_text)}" if template.system_text else "It has no system text."
    return f"Prompts follow the template {name} (chat_template.jinja). {system}"


def describe(part) -> str:
    """The settings of a config section that differ from its defaults, in one line."""
    if part is None:
        return "none"
    changed = {f.name: getattr(part, f.name) for f in dataclasses.fields(part) if getattr(part, f.name) != f.default}
    return ", ".join(f"{key} {value}" for key, value in changed.items()) or "defaults"
