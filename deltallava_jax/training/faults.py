"""Records that cannot be used: listed, counted, and limited to data.max_bad_fraction.

Records with unusable text are found before step 1, counted against all records, and left out of the plan. Images that
cannot be read are found during training."""

from __future__ import annotations

from pathlib import Path

import jax

from deltallava_jax.data.conversation import NOTES
from deltallava_jax.data.packing import Plan
from deltallava_jax.errors import TooManyFaults, count_faults
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.workdir import Workdir

CHANCE = 1e-4  # probability, at each step, of stopping a run whose share of broken records is exactly the limit
HANDFUL = 10  # too few broken records to estimate a share from, if fewer


def validate_plan(plan: Plan, limit: float, workdir: Path) -> list[str]:
    """Lines to log before step 1 about the records that the plan leaves out; a new run also lists them in its workdir.
    Raises TooManyFaults if they exceed the share ``limit`` of all records."""
    file = Workdir(workdir).faults()
    is_new = Checkpoints(workdir).latest() is None  # called by all processes, which synchronize here
    if is_new and hosts.leads():
        file.unlink(missing_ok=True)
        if plan.faults:
            file.write_text("".join(f"{plan.faults[index]}\n" for index in sorted(plan.faults)))
    lines = [f"{count:,} {NOTES[kind]}" for kind, count in plan.notes.items() if count]
    if plan.faults:
        summary = (
            f"{len(plan.faults):,} of {len(plan.lengths):,} records cannot be used and are left out: "
            f"{count_faults(error.kind for error in plan.faults.values())}; they are listed in {file}"
        )
        if len(plan.faults) > limit * len(plan.lengths):
            raise TooManyFaults(
                f"{summary}. More than data.max_bad_fraction={limit}: repair the data or raise the limit"
            )
        lines.append(summary)
    return lines


def count_step(limit: float, workdir: Path, record: dict, plan: Plan, step: int, values: dict) -> None:
    """Adds a step's records and faults to the counts of its epoch in ``record`` {"epoch", "records", "faults"}.

    Faults are the planned records that were not trained on: the sum over all processes, without communication. Raises
    TooManyFaults when the epoch is certain to exceed ``limit``, including the records that the plan leaves out. Before
    the epoch's end it also raises for HANDFUL or more faults that a sample from data with the share ``limit`` of broken
    records would have with a probability below CHANCE."""
    planned = plan.step(step - 1)
    if record.get("epoch") != planned.epoch:
        record.update(epoch=planned.epoch, records=0, faults=0)
    records = sum(map(len, planned.rows))
    record["records"] += records
    record["faults"] += records - values["conversations"]
    allowed = limit * len(plan.lengths) - len(plan.faults)  # of the records in the plan
    if record["faults"] > allowed or (
        record["faults"] >= HANDFUL and _tail(record["faults"], record["records"], allowed / len(plan.records)) < CHANCE
    ):
        known = f", in addition to {len(plan.faults):,} left out before step 1" if plan.faults else ""
        raise TooManyFaults(
            f"{record['faults']:,} of {record['records']:,} records of epoch {planned.epoch} could not be read{known}: "
            f"more than data.max_bad_fraction={limit}; they are listed in {Workdir(workdir).faults()}"
            + (", those of other processes in faults.1.txt and so on" if jax.process_count() > 1 else "")
        )


def _tail(faults: int, records: int, share: float) -> float:
    """The probability of at least ``faults`` faults in ``records`` binomial draws."""
    from scipy.special import betainc

    return float(betainc(faults, records - faults + 1, share))
