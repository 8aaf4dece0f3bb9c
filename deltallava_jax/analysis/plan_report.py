"""The plan as text."""

from __future__ import annotations

from deltallava_jax.analysis.units import operations, seconds, size


def format_plan(plan: dict) -> str:
    """The plan as text."""
    memory, batch, mesh = plan["per_device"], plan["batch"], plan["mesh"]
    lines = [
        f"{plan['config']} on {plan['target']}: {plan['devices']} devices, mesh "
        + ", ".join(f"{axis}={count}" for axis, count in mesh.items()),
        f"batch: {batch['rows']} rows of {batch['row_length']}, {batch['images']} images of {batch['budget']} tokens "
        f"and {batch['text_tokens']} tokens of text a row; about {batch['conversations']} conversations, if an image "
        f"comes with about {batch['text_per_image']} tokens of text (--text)",
        "",
        "memory of a device",
        f"  parameters   {size(memory['parameters_bytes']):>14}",
        f"  optimizer    {size(memory['optimizer_bytes']):>14}",
        f"  temporaries  {size(memory['temporary_bytes']):>14}  (gradients {size(memory['gradient_bytes'])}, "
        f"activations {size(memory['activation_bytes'])})",
        f"  total        {size(memory['total_bytes']):>14}  of {size(memory['capacity_bytes'])}: "
        + ("fits" if plan["fits"] else "DOES NOT FIT"),
        f"a checkpoint: {size(plan['checkpoint_bytes'])}, uncompressed",
        "",
        f"operations of a step: {operations(plan['flops_per_step'])} in matrix products, "
        f"{operations(plan['model_flops_per_step'])} without what is recomputed or masked",
    ]
    for part, passes in plan["flops_by_part"].items():
        cells = ", ".join(f"{name} {operations(count)}" for name, count in passes.items() if count)
        lines.append(f"  {part:<10} {cells}")
    if plan["compiler_flops_per_step"] is not None:
        lines.append(f"  the compiled program has {operations(plan['compiler_flops_per_step'])}")
    if plan["collectives"] is not None:
        lines += ["", "collectives of a step on a device; bytes of the results, loop iterations included"]
        for one in plan["collectives"]:
            lines.append(f"  {one['kind']:<20} {one['count']:>7,} x {size(one['bytes']):>14}")
    if step := plan["step_seconds"]:
        lines += ["", *format_step(step)]
    if "ladder" in plan:
        lines += ["", *format_ladder(plan)]
    lines += ["", f"compiled in {seconds(plan['seconds_to_compile'])} with jax {plan['jax']}"]
    if plan["rematerialization_warnings"]:
        lines.append(f"the compiler warns {plan['rematerialization_warnings']} times that it replicates a whole array")
    if not plan["fits"]:
        near = plan["nearest"]
        lines.append(
            f"nearest setting that fits: {near['change']} ({size(near['per_device']['total_bytes'])} a device)"
            if near
            else "none of the neighbouring settings fits either"
        )
    return "\n".join(lines)


def format_step(step: dict) -> list[str]:
    """The estimate with its parts and its dearest operations."""
    shown = lambda row: (operations(row["operations"]) if row["operations"] else "", size(row["bytes"]),
                         seconds(row["seconds"]))  # fmt: skip
    waited = ", ".join(
        f"{name} {seconds(step[key])}"
        for name, key in (
            ("products", "products"), ("memory", "memory"), ("collectives that nothing hides", "collectives"),
            ("instructions too small for either", "overhead"),
        )
        if step[key]
    )  # fmt: skip
    hidden = f"; collectives take {seconds(step['collectives_and_hidden'])} in all" if step["collectives"] else ""
    moved = lambda key: ", ".join(f"{name} {size(count)}" for name, count in step[key].items() if count) or "nothing"
    lines = [
        f"a step: about {seconds(step['estimate'])} ({waited}{hidden})",
        f"  estimated: {step['assumption']}",
        f"  a device moves {size(step['bytes'])}; attention of a decoder layer without its four matrices: "
        + moved("attention_bytes_per_layer"),
        f"  of it scores, softmax and values: {moved('scores_bytes_per_layer')}",
    ]
    if step["not_counted"]:
        lines.append(f"  operations of these calls are not known, only their bytes: {', '.join(step['not_counted'])}")
    lines += ["", "by part, of one device"]
    lines += table([(row["part"], *shown(row)) for row in step["parts"]])
    lines += ["", "the dearest operations, those of equal scopes added up"]
    lines += table([(f"{row['scope']}: {row['operation']}", row["pass"], *shown(row)) for row in step["dearest"]])
    return lines


def format_ladder(plan: dict) -> list[str]:
    """What each policy of recomputation needs, from the least recomputation on."""
    rows = []
    for row in plan["ladder"]:
        if row["total_bytes"] is None:
            cells = (f"more than {size(row['least_bytes'])}", "", "")
        else:
            estimate = seconds(row["estimate"]) if row["estimate"] else ""
            cells = (size(row["total_bytes"]), operations(row["flops_per_step"]), estimate)
        rows.append(
            (row["remat"], *cells, "chosen" if row["remat"] == plan["remat"] else "" if row["fits"] else "too large")
        )
    return ["recomputation (remat=auto): the least from dots on that leaves 8 % of a device free", *table(rows)]


def table(rows: list[tuple[str, ...]]) -> list[str]:
    """Indented lines; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
