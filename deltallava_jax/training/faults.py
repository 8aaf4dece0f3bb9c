"""Records that cannot be used: listed, counted, and judged against data.max_bad_fraction.

What the text of a record shows is judged before step 1, against all records, and left out of the plan. What breaks only
when it is read, an image, is judged as the training goes."""

from __future__ import annotations

from pathlib import Path

import jax

from deltallava_jax.data.conversation import NOTES
from deltallava_jax.data.packing import Plan
from deltallava_jax.errors import TooManyFaults, count_faults
from deltallava_jax.parallel import hosts
from deltallava_jax.training.checkpoints import Checkpoints
from deltallava_jax.workdir import Workdir

CHANCE = 1e-4  # that a run ends whose data have just the share of broken records that is allowed, at one step
HANDFUL = 10  # fewer broken records than this say nothing about the share


def validate_plan(plan: Plan, limit: float, workdir: Path) -> list[str]:
    """What is to be said before step 1 of the records that the plan leaves out; the workdir of a run that begins lists
    them. Raises TooManyFaults if they are more than ``limit`` of all records."""
    file = Workdir(workdir).faults()
    begins = Checkpoints(workdir).latest() is None  # asked by all processes, which wait for each other here
    if begins and hosts.leads():
        file.unlink(missing_ok=True)
        if plan.faults:
            file.write_text("".join(f"{plan.faults[index]}\n" for index in sorted(plan.faults)))
    said = [f"{count:,} {NOTES[kind]}" for kind, count in plan.notes.items() if count]
    if plan.faults:
        told = (
            f"{len(plan.faults):,} of {len(plan.lengths):,} records cannot be used and are left out: "
            f"{count_faults(error.kind for error in plan.faults.values())}; they are listed in {file}"
        )
        if len(plan.faults) > limit * len(plan.lengths):
            raise TooManyFaults(f"{told}. More than data.max_bad_fraction={limit} are too many to train on the rest")
        said.append(told)
    return said


def count_step(limit: float, workdir: Path, record: dict, plan: Plan, step: int, values: dict) -> None:
    """Adds a step's records, and those left out, to the counts of its epoch in ``record`` {"epoch", "records",
    "faults"}.

    The records left out are the planned ones less those trained on, which is the sum over all processes without any
    communication. Raises TooManyFaults when the epoch will exceed ``limit``, the records that ``validate_plan`` left out
    included. At the end of the epoch the plain share decides; before that, the faults must number at least HANDFUL, and
    a draw from records of which ``limit`` are broken must have as many with a probability below CHANCE."""
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
        known = f", beside {len(plan.faults):,} that were left out before" if plan.faults else ""
        raise TooManyFaults(
            f"{record['faults']:,} of {record['records']:,} records of epoch {planned.epoch} could not be read{known}: "
            f"more than data.max_bad_fraction={limit}; they are listed in {Workdir(workdir).faults()}"
            + (", of other processes in faults.1.txt and so on" if jax.process_count() > 1 else "")
        )


def _tail(faults: int, records: int, share: float) -> float:
    """The chance of so many or more faults in so many draws."""
    from scipy.special import betainc

    return float(betainc(faults, records - faults + 1, share))
