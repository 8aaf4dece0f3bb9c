"""One run over several processes: how they connect, and how they end when one of them stops.

``supervise`` comes first, before jax is imported: it continues in a child process. When another process of the run
dies, jax's runtime aborts this one, since collectives can no longer finish; the parent reports that in one line.
``connect`` then initialises jax.distributed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import signal
import sys
from glob import glob
from importlib import util

from deltallava_jax.errors import ConfigError

HEARTBEAT = 30  # seconds without a heartbeat after which a process counts as dead
PATIENCE = 300  # seconds in which all processes must connect
RESUME = "start the same command again on all hosts to resume from the newest checkpoint"

_LOST = re.compile(r"Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|Socket closed|Connection (closed|reset)")
_ENTRY = re.compile(r"[IWEF]\d{4} \d\d:\d\d:")  # the first line of an entry in the runtime's log
_PEERS = re.compile(r"coordination_service|preemption_\w+\.cc|JAX distributed service|Check failure stack trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for hosts without a cluster manager."""
    group = parser.add_argument_group("several processes (SLURM, GKE and TPU VMs are recognised without these)")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, a free port on its host")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 to N - 1")


def several(options: argparse.Namespace) -> bool:
    """Whether this process may be one of several: by its options, under SLURM, on GKE or on a TPU VM.

    A single machine is none of these and does not use jax.distributed. Raises ConfigError for options that contradict
    each other."""
    explicit = (options.coordinator, options.processes, options.process)
    if explicit != (None, None, None):
        if None in explicit:
            raise ConfigError("--coordinator, --processes and --process go together: give all three or none")
        if not 0 <= options.process < options.processes or not re.fullmatch(r".+:\d+", options.coordinator):
            raise ConfigError(
                f"--coordinator {options.coordinator} --processes {options.processes} --process {options.process}: "
                f"expected HOST:PORT and a process from 0 to {options.processes - 1}"
            )
        return options.processes > 1
    tasks = _slurm_tasks()
    if tasks is not None:
        return tasks > 1
    environment = os.environ
    workers = environment.get("TPU_WORKER_HOSTNAMES", "").count(",") + 1
    if workers > 1 or _number("MEGASCALE_NUM_SLICES") > 1:  # GKE
        return True
    chips = glob("/dev/accel*") + glob("/dev/vfio/[0-9]*")
    return bool(chips) and "TPU_SKIP_MDS_QUERY" not in environment and util.find_spec("libtpu") is not None


def _slurm_tasks() -> int | None:
    """The number of tasks of this srun step; None outside of one.

    SLURM_NTASKS may count the allocation's tasks where the step is a shell of one task. Raises ConfigError."""
    if not {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID"} <= os.environ.keys():
        return None
    return _number("SLURM_STEP_NUM_TASKS" if os.environ.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS")


def _number(variable: str) -> int:
    """An environment variable's value; 1 where it is not set or empty. Raises ConfigError."""
    value = os.environ.get(variable) or "1"
    if not re.fullmatch("[0-9]+", value):
        raise ConfigError(f"the environment variable {variable} is {value!r}; expected a number")
    return int(value)


def connect(options: argparse.Namespace) -> None:
    """Connects the processes, so that jax.devices() lists the devices of all. Does nothing for a single process.

    Raises ConfigError if the coordinator cannot be found; if other processes do not connect, the runtime aborts."""
    import jax

    if not several(options):
        return
    count = _slurm_tasks() if options.processes is None else options.processes
    where = (options.coordinator, count, options.process)
    method = {} if options.coordinator is None else {"cluster_detection_method": "deactivate"}
    try:
        jax.distributed.initialize(
            *where,
            **method,
            initialization_timeout=PATIENCE,
            heartbeat_timeout_seconds=HEARTBEAT,
            shutdown_timeout_seconds=2 * HEARTBEAT,
        )
    except (RuntimeError, ValueError) as error:
        if isinstance(error, ValueError) and count is None:
            return  # a TPU VM outside of a larger slice
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the processes of this run could not connect: {reason}") from error


def leads() -> bool:
    """True in the one process that writes and prints."""
    import jax

    return jax.process_index() == 0


def wait(name: str) -> None:
    """Returns when all processes have called it."""
    import jax

    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def whole(tree):
    """A copy of a tree of global arrays, each whole on every process."""
    import jax

    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def gather(text: str) -> list[str]:
    """Every process's text, in the processes' order; all must call it."""
    import jax
    import numpy as np

    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    own = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(len(own)))
    padded = multihost_utils.process_allgather(np.pad(own, (0, lengths.max() - len(own))))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


def lost(error: Exception) -> str | None:
    """The message for a collective that failed because another process stopped; None for any other error."""
    reason = next(iter(str(error).splitlines()), "")
    if type(error).__name__ != "JaxRuntimeError" or not _LOST.search(reason):
        return None
    return f"error: another process stopped ({reason}); {RESUME}"


def leave(message: str, code: int, *, at_once: bool = False) -> None:
    """Ends this process with an error message and exit code.

    One of several processes does not wait for the others, as the interpreter's exit would; at_once: never waits."""
    import jax

    print(message, file=sys.stderr, flush=True)
    if not (at_once or jax.distributed.is_initialized()):
        sys.exit(code)
    sys.stdout.flush()
    os._exit(code)


# ---------------------------------------------------------------- the parent


def supervise(arguments: list[str]) -> None:
    """For one of several processes: returns in a child process, while the parent waits for it. Else returns at once.

    The parent forwards SIGTERM to the child; if the parent is killed, so is the child."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_arguments(parser)
    try:
        if not several(parser.parse_known_args(arguments)[0]):
            return
    except ConfigError:
        return  # raised again where errors are reported
    parent = os.getpid()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)  # Python's own stderr is unchanged
        os.dup2(writer, 2)  # the runtime's log goes through the parent
        os.close(writer)
        return
    os.close(writer)
    signal.signal(signal.SIGTERM, lambda number, _: os.kill(child, number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends Ctrl-C to the child too
    kept = _relay(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code == -signal.SIGABRT and "JAX distributed service" in kept:
        if "RegisterTask" in kept:
            sys.exit(
                f"error: the processes of this run did not connect within {PATIENCE} seconds; start the command on "
                "all hosts and check that they reach the coordinator's address"
            )
        sys.exit(f"\nerror: {_who(kept)} stopped; {RESUME}")  # the progress bar may have left the line open
    if code == -signal.SIGINT:  # a second Ctrl-C
        sys.exit(130)
    if code < 0:
        sys.stderr.write(kept)
        sys.exit(f"\nerror: this process was stopped by {signal.Signals(-code).name}; {RESUME}")
    sys.exit(code)  # the child has reported its error


def _relay(reader: int) -> str:
    """Forwards the child's log until it ends; returns the entries about other processes instead of printing them."""
    kept = ""
    keep = False
    with os.fdopen(reader, errors="replace") as log:
        for line in log:
            if _ENTRY.match(line) or _PEERS.search(line):
                keep = bool(_PEERS.search(line))
            if keep:
                kept += line
            else:
                sys.stderr.write(line)
                sys.stderr.flush()
    return kept


def _who(log: str) -> str:
    """The processes that stopped, by the runtime's log."""
    if found := re.search(r"unhealthy \(stopped sending heartbeats\):\n((?:\d+\n)+)", log):
        numbers = sorted({int(number) for number in found[1].split()})
        return f"process{'es' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
    return "process 0, the coordinator," if "leader task" in log else "another process"
