"""What the recipes need on machines that we do not have.

    python -m benchmarks.measure.scale --page

Runs ``plan --json`` for every pair of RUNS whose compiler is installed, one file each in benchmarks/results/scale/, and
writes docs/scale.md from the files. What has a file is not run again, so the program can be stopped and started, and
run from two environments: one with libtpu (requirements-plan.txt), one with JAX's CUDA plugin. --page: only the page.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.program import RESULTS, ROOT, argument_parser
from benchmarks.reports.markdown import table
from deltallava_jax.analysis.targets import installed, parse_target

FOLDER = RESULTS / "scale"
PAGE = ROOT / "docs" / "scale.md"
GIB = 2**30

RECIPES = (  # (configuration, target)
    ("finetune_7b", "h100:8"),
    ("finetune_7b", "v5p:2x2x2"),
    ("finetune_7b", "v5e:4x4"),
    ("finetune_13b", "h100:8"),
    ("finetune_13b", "v5p:2x2x4"),
    ("pretrain_7b", "h100:8"),
    ("finetune_qwen2_7b", "h100:8"),
)
ADAPTERS = (  # (configuration, target, settings): LoRA and QLoRA on one GPU, and on GPUs of 24 GB
    ("finetune_lora_7b", "h100:1", ("--config.optimizer.accumulation=8",)),
    ("finetune_lora_7b", "rtx4090:8", ()),
    ("finetune_qlora_7b", "rtx4090:1", ()),
)
ROWS_A_CHIP = 1  # as finetune_7b has them on 16 chips
SCALING = (("v5e:4x4", 16), ("v5e:8x8", 64), ("v5e:16x16", 256))
# The recipes' settings before attention and recomputation were chosen by the machine, with gradients as they were then.
BEFORE = "-before"
SETTINGS_BEFORE = (
    "--config.model.remat=full",
    "--config.model.attention=xla",
    "--config.model.loss_chunk=512",
    "--config.optimizer.gradient_dtype=bfloat16",
)
RUNS = (  # (configuration, target, settings, the end of the file's name)
    *((config, target, (), "") for config, target in RECIPES),
    *((config, target, settings, "") for config, target, settings in ADAPTERS),
    *((config, target, SETTINGS_BEFORE, BEFORE) for config, target in RECIPES),
    *(("finetune_7b", target, (f"--config.data.rows={ROWS_A_CHIP * chips}",), "") for target, chips in SCALING[1:]),
)


def file_of(config: str, target: str, end: str = "") -> Path:
    return FOLDER / f"{config}-{target.replace(':', '-')}{end}.json"


def plans(end: str = "") -> dict[tuple[str, str], dict]:
    """(configuration, target) -> the plan in its file, of those that are there."""
    files = {(config, target): file_of(config, target, end) for config, target, _, its_end in RUNS if its_end == end}
    return {key: json.loads(file.read_text())["plan"] for key, file in files.items() if file.exists()}


def run(config: str, target: str, more: tuple[str, ...], end: str) -> None:
    """One plan, compiled in a process of its own, into its file."""
    arguments = [
        "-m",
        "deltallava_jax",
        "plan",
        "--config",
        f"configs/{config}.py",
        "--target",
        target,
        *more,
        "--json",
    ]
    print(" ".join(["python", *arguments]), file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    result = dict(
        command=" ".join(["python", *arguments]),
        date=datetime.date.today().isoformat(),
        plan=json.loads(done.stdout),
    )
    file_of(config, target, end).write_text(json.dumps(result, indent=1) + "\n")


def page() -> str:
    """docs/scale.md as text."""
    found = plans()
    parts = [
        "# What the recipes need",
        "Made by `python -m benchmarks.measure.scale` from the files in benchmarks/results/scale. Nothing here ran on\n"
        "the machines: `python -m deltallava_jax plan` compiles the train step that train.py runs with the machine's\n"
        "own compiler (libtpu, XLA for the H100) and reads memory, operations and collectives from the program.\n"
        "Steps' times are estimates from peaks, not measurements.",
        "## Memory\n\n" + memory(found),
        "## Operations and time\n\n" + timed if (timed := operations(found)) else "",
        adapters(found),
        before_and_now(found),
        ladders(found),
        "## Collectives\n\n" + moved(found),
        "## More chips at the same rows a chip\n\n" + scaling(found),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def recipes(found: dict, compiled: bool = True) -> list[tuple[str, dict]]:
    """compiled: only those whose program is there; the TPU compiler refuses one that is too large."""
    plans = [(config, found[config, target]) for config, target in RECIPES if (config, target) in found]
    return [(config, plan) for config, plan in plans if plan["collectives"] or not compiled]


def memory(found: dict) -> str:
    rows = []
    for config, plan in recipes(found, compiled=False):
        size, batch = plan["per_device"], plan["batch"]
        rows.append([
            f"`{config}`", plan["target"], f"{batch['rows']} x {batch['row_length']}", str(batch["conversations"]),
            plan.get("remat", "full (1)"),
            gib(size["parameters_bytes"]), gib(size["optimizer_bytes"]), gib(size["gradient_bytes"]),
            gib(size["activation_bytes"]), gib(size["total_bytes"]), gib(size["capacity_bytes"]),
            "yes" if plan["fits"] else "**no**",
        ])  # fmt: skip
    head = ["Recipe", "Target", "Rows", "Conversations", "Recomputed", "Parameters", "Optimizer", "Gradients",
            "Activations", "All", "Of", "Fits"]  # fmt: skip
    note = (
        "GiB a device, everything sharded over the devices (fsdp). Gradients are counted, activations are what else\n"
        "the compiler's temporaries hold. The conversations of a step follow from the assumed length of a text."
    )
    if any("remat" not in plan for plan in found.values()):
        note += "\n(1) Made with the settings of before, with XLA's attention; not made again yet."
    return table(head, rows) + "\n\n" + note


def operations(found: dict) -> str:
    rows, assumptions = [], {}
    for config, plan in recipes(found):
        counted, seconds = plan["compiler_flops_per_step"], plan["step_seconds"]
        if "assumption" not in seconds or "products" not in seconds:
            continue  # made before traffic was counted
        assumptions[plan["target"].split(":")[0]] = seconds["assumption"]
        rows.append([
            f"`{config}`", plan["target"], plan["remat"], f"{plan['flops_per_step'] / 1e15:.2f}",
            f"{counted / 1e15:.2f}" if counted else "", f"{plan['model_flops_per_step'] / 1e15:.2f}",
            *(f"{sum(seconds[f'{key}_bytes_per_layer'].values()) / 1e9:.2f}" for key in ("attention", "scores")),
            *(f"{seconds[key]:.2f}" for key in ("products", "memory", "collectives", "estimate")),
        ])  # fmt: skip
    if not rows:
        return ""
    head = ["Recipe", "Target", "Recomputed", "PFLOP", "in the program", "needed", "Attention, GB a layer",
            "of it scores", "Products, s", "Memory, s", "Collectives, s", "Step, s"]  # fmt: skip
    note = (
        "Operations of a step in matrix products, as traced; as counted in the compiled program; without what is\n"
        "recomputed or masked. What attention of a decoder layer moves in all passes on a\n"
        "device, besides the products with its four matrices; of it scores, softmax and values. Each instruction\n"
        "takes what its operations or its bytes need, whichever is more (products, memory); of collectives, what\n"
        "nothing hides. Assumed:"
    )
    return "\n".join([table(head, rows), "", note, "", *(f"- {kind}: {text}" for kind, text in assumptions.items())])


def adapters(found: dict) -> str:
    rows = []
    for config, target in (("finetune_7b", "h100:8"), *(run[:2] for run in ADAPTERS)):
        if (plan := found.get((config, target))) is None or not plan["step_seconds"]:
            continue
        size, batch = plan["per_device"], plan["batch"]
        state = plan.get("checkpoint_bytes")
        rows.append([
            f"`{config}`", target, f"{batch['rows']} in {batch['accumulation']}", plan["remat"],
            *(gib(size[f"{key}_bytes"]) for key in ("parameters", "optimizer", "gradient", "activation", "total")),
            f"{gib(size['capacity_bytes'])}, {'yes' if plan['fits'] else '**no**'}", gib(state) if state else "",
            f"{plan['flops_per_step'] / 1e15:.2f}", f"{plan['flops_per_step'] / plan['model_flops_per_step']:.2f}",
            f"{plan['step_seconds']['estimate'] * plan['devices']:.1f}",
        ])  # fmt: skip
    if len(rows) < 2:
        return ""
    head = ["Recipe", "Target", "Rows in parts", "Recomputed", "Parameters", "Optimizer", "Gradients", "Activations",
            "All", "Of, fits", "Checkpoint", "PFLOP", "over needed", "Device-seconds"]  # fmt: skip
    note = (
        "Memory in GiB a device; a checkpoint uncompressed. The first row is full tuning, for comparison. Needed are\n"
        "products with the frozen matrices forward and for the gradients of their inputs, not of the matrices.\n"
        "Device-seconds: a step's estimated time times the devices."
    )
    return "## Adapters\n\n" + table(head, rows) + "\n\n" + note


def before_and_now(found: dict) -> str:
    rows = []
    for (config, target), old in plans(BEFORE).items():
        if (config, target) not in found or not old["step_seconds"]:
            continue
        both = old, found[config, target]
        share = [f"{plan['flops_per_step'] / plan['model_flops_per_step']:.2f}" for plan in both]
        scores = [f"{sum(plan['step_seconds']['scores_bytes_per_layer'].values()) / 1e9:.2f}" for plan in both]
        size = [gib(plan["per_device"]["total_bytes"]) for plan in both]
        times = [plan["step_seconds"]["estimate"] for plan in both]
        rows.append([
            f"`{config}`", target, " → ".join(share), " → ".join(scores), " → ".join(size),
            f"{times[0]:.2f} → {times[1]:.2f}", f"{times[0] / times[1]:.2f}",
        ])  # fmt: skip
    if not rows:
        return ""
    head = ["Recipe", "Target", "PFLOP over needed", "Scores, GB a layer", "Memory, GiB", "Step, s", "Times faster"]
    note = (
        f"With `{' '.join(SETTINGS_BEFORE)}`,\n"
        "as the recipes were, and as they are: attention by the library's kernel for the device, recomputation by\n"
        "what fits. The same estimate for both."
    )
    return "## Before and now\n\n" + table(head, rows) + "\n\n" + note


def ladders(found: dict) -> str:
    rows = [
        [
            f"`{config}`", plan["target"], row["remat"] + (" (chosen)" if row["remat"] == plan["remat"] else ""),
            gib(row["total_bytes"]) if row["total_bytes"] else f"more than {gib(row['least_bytes'])}",
            f"{row['flops_per_step'] / 1e15:.2f}" if row["flops_per_step"] else "",
            f"{row['estimate']:.2f}" if row["estimate"] else "",
        ]
        for config, plan in recipes(found) for row in plan.get("ladder", ())
    ]  # fmt: skip
    if not rows:
        return ""
    head = ["Recipe", "Target", "Recomputed", "Memory of a device, GiB", "PFLOP", "Step, s"]
    note = "`model.remat=auto` takes the first from `dots` on that leaves 8 % of the device free."
    return "## Recomputation\n\n" + table(head, rows) + "\n\n" + note


def moved(found: dict) -> str:
    rows = []
    for config, plan in recipes(found):
        cells = [f"{one['kind']} {one['count']:,} ({one['bytes'] / GIB:.2f})" for one in plan["collectives"]]
        rows.append([f"`{config}`", plan["target"], ", ".join(cells), str(plan["rematerialization_warnings"])])
    head = ["Recipe", "Target", "How many a step (GiB of results on a device)", "Warnings"]
    note = (
        "A collective in a loop's body counts as often as the loop runs. Of a reduce-scatter, here of the gradients,\n"
        "the compiler makes an all-reduce and a slice on these TPU slices. Warnings: of the compiler, that it would\n"
        "replicate an array whole (involuntary full rematerialization)."
    )
    return table(head, rows) + "\n\n" + note


def scaling(found: dict) -> str:
    plans = [found["finetune_7b", target] for target, _ in SCALING if ("finetune_7b", target) in found]
    rows = [
        [
            plan["target"], str(plan["devices"]), str(plan["batch"]["rows"]), gib(plan["per_device"]["total_bytes"]),
            f"{sum(one['bytes'] for one in plan['collectives']) / GIB:.1f}", f"{plan['seconds_to_compile']:.0f}",
        ]
        for plan in plans
    ]  # fmt: skip
    head = ["Target", "Chips", "Rows", "Memory of a chip, GiB", "Collectives of a chip, GiB", "Compile, s"]
    return table(head, rows) + f"\n\n`finetune_7b` with {ROWS_A_CHIP} row a chip. Bytes are those of the results."


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--page", action="store_true", help="write the page from the files there are")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    FOLDER.mkdir(parents=True, exist_ok=True)
    for config, target, more, end in () if options.page else RUNS:
        if not installed(parse_target(target)):
            print(f"{config} on {target}: left out, its compiler is not installed here", file=sys.stderr)
        elif not file_of(config, target, end).exists():
            run(config, target, more, end)
            PAGE.write_text(page())
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
