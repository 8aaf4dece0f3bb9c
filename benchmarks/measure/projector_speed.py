"""The whole Delta projector against the same computation in PyTorch, by visual tokens: forward and train step.

    python -m benchmarks.measure.projector_speed                  # JAX_PLATFORMS=cpu: float32, two threads
    python -m benchmarks.measure.projector_speed --budgets 64,16,1 --batch 8

The release's projector at its sizes (CLIP ViT-L/14-336 to --out-width), random weights, the same in both; a train step
is the forward pass, the gradients of all parameters for a sum over the tokens, and a plain SGD update in place. The
peer is the PyTorch module that our exports carry, which has the release's structure; on a GPU it is in bfloat16 and
compiled by torch.compile as well. The outputs are compared first. Seconds are the shortest of alternating rounds."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import types

from benchmarks.measure.timing import LIBRARIES, best, device, two_threads
from benchmarks.program import RESULTS, argument_parser, cores, numbers, origin, write_result

FOLDER = RESULTS / "projector_speed"
BUDGETS = (576, 144, 64, 36, 16, 9, 4, 1)
RATE = 1e-4


def torch_projector(cfg, state):
    """The PyTorch projector with the weights of a state dict, on the device at hand."""
    import dataclasses

    import torch

    from deltallava_jax.convert.export import TORCH_MODULES

    package = types.ModuleType("exported")
    package.__path__ = [str(TORCH_MODULES)]
    sys.modules.setdefault("exported", package)
    module = importlib.import_module("exported.projector_delta").Projector(dataclasses.asdict(cfg))
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})
    return module


def draw(cfg, batch: int) -> dict:
    import numpy as np

    rng = np.random.default_rng(0)
    widths = {"last": cfg.in_width, "levels": cfg.level_count * cfg.in_width}
    return {name: rng.standard_normal((batch, cfg.grid**2, width), np.float32) for name, width in widths.items()}


def ours(cfg, state, arrays, dtype) -> dict:
    """{"forward", "train"}: calls that run our projector."""
    import jax
    import jax.numpy as jnp

    from deltallava_jax.models import systems
    from deltallava_jax.models.vision import VisionFeatures

    features = VisionFeatures(**{name: jnp.asarray(x, dtype) for name, x in arrays.items()}, grid=(cfg.grid, cfg.grid))
    held = [jax.tree.map(jnp.asarray, systems.from_torch(state, cfg))]
    forward = jax.jit(lambda params, features: systems.project(params, cfg, features))

    def update(params, features):
        loss = lambda params: systems.project(params, cfg, features).astype(jnp.float32).sum()
        return jax.tree.map(lambda p, g: p - RATE * g, params, jax.grad(loss)(params))

    step = jax.jit(update, donate_argnums=0)

    def train():
        held[0] = jax.block_until_ready(step(held[0], features))

    return {"forward": lambda: jax.block_until_ready(forward(held[0], features)), "train": train}


def theirs(cfg, state, arrays, dtype, budget: int, on: str, compiled: bool) -> dict:
    import torch

    module = torch_projector(cfg, state).to(on)
    parts = importlib.import_module("exported.projector_parts")
    dtype = getattr(torch, dtype)
    features = parts.Features(**{name: torch.from_numpy(x).to(on, dtype) for name, x in arrays.items()})
    autocast = torch.autocast(on, dtype, enabled=dtype != torch.float32)
    run = torch.compile(module) if compiled else module
    wait = torch.cuda.synchronize if on == "cuda" else lambda: None
    parameters = list(module.parameters())

    def forward():
        with torch.no_grad(), autocast:
            out = run(features, budget)
        wait()
        return out

    def train():
        with autocast:
            loss = run(features, budget).float().sum()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient, alpha=RATE)
        wait()

    return {"forward": forward, "train": train}


def measure(budget: int, options, platform: str) -> dict:
    import jax
    import numpy as np

    from deltallava_jax.config import system_config
    from deltallava_jax.models import systems

    cfg = system_config(out_width=options.out_width, scale_factor=round((576 / budget) ** 0.5), drop_path=0.0)
    params = systems.init_params(cfg, jax.random.key(0))
    state = {name: np.asarray(value) for name, value in systems.to_torch(params, cfg).items()}
    arrays = draw(cfg, options.batch)
    cpu = platform == "cpu"
    dtype, on = ("float32", "cpu") if cpu else ("bfloat16", "cuda")
    calls = {"ours": ours(cfg, state, arrays, dtype), "torch": theirs(cfg, state, arrays, dtype, budget, on, False)}
    if not cpu:
        calls["torch_compile"] = theirs(cfg, state, arrays, dtype, budget, on, True)
    outputs = [np.asarray(calls["ours"]["forward"](), np.float32), calls["torch"]["forward"]().float().cpu().numpy()]
    difference = float(np.abs(outputs[0] - outputs[1]).max() / np.abs(outputs[1]).max())
    assert difference < (1e-4 if cpu else 5e-2), f"{budget} tokens: outputs differ by {difference}"
    row = {"tokens": budget, "difference": difference}
    for mode in ("forward", "train"):
        seconds = best({name: call[mode] for name, call in calls.items()}, options.rounds)
        row[mode] = {
            "seconds": {name: round(value, 5) for name, value in seconds.items()},
            "times_faster": {
                name: round(value / seconds["ours"], 3) for name, value in seconds.items() if name != "ours"
            },
        }
        print(f"{budget:4} tokens {mode:8}", row[mode], flush=True)
    return row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--budgets", type=numbers, default=BUDGETS)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out-width", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=10)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        two_threads()
    platform, kind = device()
    if platform == "cpu":
        import torch

        torch.set_num_threads(2)
    file = FOLDER / f"{kind.replace(' ', '-').lower()}-batch-{options.batch}.json"
    result = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    result |= {
        "device": kind,
        "batch": options.batch,
        "out_width": options.out_width,
        "rounds": options.rounds,
        **origin(__spec__.name, sys.argv[1:], f"{kind}, {cores()}", LIBRARIES),
    }
    for budget in options.budgets:
        if str(budget) not in result["rows"]:
            result["rows"][str(budget)] = measure(budget, options, platform)
            write_result(file, result)


if __name__ == "__main__":
    main()
