"""The choice of what the backward pass recomputes: the least that fits, found by compiling."""

import dataclasses

import jax
import pytest

from deltallava_jax.config import MeshConfig
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training import remat
from deltallava_jax.training.step import TrainStep, batch_shapes
from tests import tiny

refused_before = lambda policy: list(remat.CHOICES[: remat.CHOICES.index(policy)])
LAYERS = 6  # so that saved activations are more than what a layer needs while it runs


@pytest.fixture(scope="module")
def world():
    """(make, batch, compiled bytes by policy), of a run with long rows on two devices."""
    cfg = tiny.get_config()
    decoder = dataclasses.replace(cfg.model.decoder, layers=LAYERS)
    model = dataclasses.replace(cfg.model, decoder=decoder, remat="auto", loss_chunk=32)
    cfg = dataclasses.replace(cfg, model=model, mesh=MeshConfig(data=1, fsdp=-1))
    mesh = make_mesh(cfg, jax.devices()[:2])
    batch, steps = batch_shapes(cfg, mesh, 244, 4), {}

    def make(cfg):
        """One step for a policy, so that each is compiled once in all tests."""
        return steps.setdefault(cfg.model.remat, TrainStep(cfg, mesh, 10))

    size = {
        policy: remat.program_bytes(make(remat.with_policy(cfg, policy)).compile(batch, 4))
        for policy in ("dots", "full")
    }
    assert size["dots"] > 1.1 * size["full"]
    return cfg, make, batch, size


# Without an attention kernel, whose outputs alone it saves, "attention" is "full".
@pytest.mark.parametrize(("room", "expected"), [("dots", "dots"), ("full", "attention"), (None, "full")])
def test_the_least_recomputation_that_leaves_room_is_chosen(world, room, expected):
    cfg, make, batch, size = world
    capacity = int(size[room] / (1 - remat.FREE)) + 1 if room else 1000
    step, line = remat.choose(cfg, make, batch, 4, capacity)
    assert step.cfg.model.remat == expected and step.compiled
    assert line.startswith(f"remat={expected}: ")
    assert [name for name in remat.CHOICES if f"{name} needs" in line] == refused_before(expected), line


def test_what_is_far_too_large_is_not_compiled(world):
    cfg, _, batch, size = world
    compiled = []

    class Counted(TrainStep):
        def compile(self, *arguments):
            compiled.append(self.cfg.model.remat)
            return super().compile(*arguments)

    mesh = make_mesh(cfg, jax.devices()[:2])
    step, _ = remat.choose(cfg, lambda cfg: Counted(cfg, mesh, 10), batch, 4, 1000)
    assert compiled == ["full"] and step.cfg.model.remat == "full"


def test_what_is_saved_is_counted_without_compiling(world):
    cfg, make, batch, size = world
    least = {policy: remat.least_bytes(make(remat.with_policy(cfg, policy)), batch, 4) for policy in ("none", *size)}
    assert least["none"] > least["dots"] > least["full"]
    assert all(least[policy] < size[policy] for policy in size)
