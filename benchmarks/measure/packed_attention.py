"""Packed rows' attention on a CPU: our blocks, XLA's dense form and torch's sdpa, forward and backward.

    python -m benchmarks.measure.packed_attention

Four rows of 64 to 2,048 tokens in conversations of about 300, 8 heads of 64, float32, two threads. From which length on
blocks are taken (MIN_PACKED of kernels/attention/dispatch.py) is read from the result."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.measure.dense_attention import Case, jax_calls, torch_call
from benchmarks.measure.timing import alternate, two_threads
from benchmarks.program import RESULTS, argument_parser, cores, numbers, origin, write_result

OUT = RESULTS / "packed_attention.json"
LENGTHS = [64, 128, 256, 384, 512, 768, 1024, 1536, 2048]
ROWS, CONVERSATION = 4, 300


def measure(length: int, mode: str, rounds: int) -> dict:
    import numpy as np

    case = Case(length, 8, 8, 64, max(length // CONVERSATION, 1), (ROWS,))
    calls = jax_calls(case, ROWS, mode, 1)[0]
    seconds = alternate(calls, rounds)
    # Not in turns with torch, whose threads go on spinning for a while.
    seconds |= alternate({"torch": torch_call(case, ROWS, mode, 1, "cpu")}, rounds)
    middle = {name: float(np.median(found)) for name, found in seconds.items()}
    return {
        "tokens": length, "conversations_a_row": case.segments, "mode": mode,
        "milliseconds": {name: round(1e3 * value, 2) for name, value in middle.items()},
        "times_faster_than": {name: round(middle[name] / middle["blocks"], 2) for name in middle if name != "blocks"},
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--lengths", type=numbers, default=LENGTHS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    two_threads()
    import torch

    torch.set_num_threads(2)
    made = origin(__spec__.name, sys.argv[1:], cores(), ("jax", "torch"))
    results = []
    for length in options.lengths:
        for mode in ("forward", "both"):
            results.append(measure(length, mode, options.rounds))
            print(json.dumps(results[-1]), flush=True)
            write_result(options.out, made | {"rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
