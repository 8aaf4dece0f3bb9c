"""The step as the TPU compiler makes it for eight chips, where libtpu is installed: nothing is gathered or replicated
whole, and the optimizer's state lies as its parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.analysis import plan, targets
from deltallava_jax.analysis.collectives import collectives, summary
from deltallava_jax.config import DecoderConfig, MeshConfig, compose
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import ROWS, compiler_options, make_mesh
from deltallava_jax.training.step import TrainStep, batch_shapes
from tests import tiny

EIGHT = targets.Target("v5e", (2, 4))
pytestmark = pytest.mark.skipif(
    not targets.installed(EIGHT), reason="compiles for a TPU, which needs libtpu: pip install -r requirements-plan.txt"
)


@pytest.fixture(scope="module")
def compiled():
    """(the step, its program, what the compiler wrote)."""
    targets.prepare(EIGHT)
    cfg = tiny.get_config()
    decoder = DecoderConfig(vocab_size=2048, width=256, layers=3, heads=2, kv_heads=2, mlp_width=768)
    projector = dict(scale_factor=4, head_dim=16, block_head_dim=16, rank=4)
    cfg = dataclasses.replace(
        cfg,
        model=compose(cfg.model.vision, decoder, projector, dtype="bfloat16", remat="full"),
        mesh=MeshConfig(data=1, fsdp=-1),
    )
    step = TrainStep(cfg, make_mesh(cfg, targets.devices(EIGHT)), plan.STEPS)
    with plan.compiler_output() as written:
        program = step.compile(batch_shapes(cfg, step.mesh, 116, 4), 4)
    return step, program, "".join(written)


def test_no_collective_gathers_the_parameters_at_once(compiled):
    step, program, _ = compiled
    found = collectives(program.as_text(), 8)
    trained = flatten(step.shapes.trained)
    layer = lambda path, leaf: leaf.shape[1:] if "/layers/" in path else leaf.shape
    largest = max(4 * math.prod(layer(path, leaf)) for path, leaf in trained.items())
    everything = sum(4 * leaf.size for leaf in trained.values())
    assert found and largest < everything / 3
    for one in found:
        assert one.bytes <= largest, f"{one.kind} of {one.bytes:,} bytes: {one.source}"


def test_the_compiler_replicates_nothing_whole(compiled):
    _, _, written = compiled
    assert "nvoluntary full remat" not in written


def test_the_optimizer_lies_as_its_parameters(compiled):
    step, program, _ = compiled
    (state, *_), _ = program.input_shardings
    after, _ = program.output_shardings
    parameters = flatten(step.shapes.trained)
    moments = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(step.shapes.optimizer):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for moment in ("mu/", "nu/"):
            if moment in name:
                moments[moment, name.split(moment)[1]] = leaf
    assert len(moments) == 2 * len(parameters)
    for (_, path), leaf in moments.items():
        assert leaf.sharding.is_equivalent_to(parameters[path].sharding, leaf.ndim), path
    # And the program takes and gives the state as it was placed.
    for placed in (state, after):
        for wanted, given in zip(jax.tree.leaves(step.shapes), jax.tree.leaves(placed), strict=True):
            assert given.is_equivalent_to(wanted.sharding, wanted.ndim)
    sharded = [leaf for leaf in parameters.values() if math.prod(leaf.shape) >= 2**16]
    assert sharded and all(not leaf.sharding.is_fully_replicated for leaf in sharded)


def test_weights_are_gathered_before_a_large_product(compiled):
    mesh, width = compiled[0].mesh, 4096
    shape = lambda rows, spec: jax.ShapeDtypeStruct((rows, width), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    lowered = jax.jit(jnp.matmul).lower(shape(8 * width, ROWS), shape(width, P("fsdp")))
    with plan.compiler_output():
        ours, default = (lowered.compile(options).as_text() for options in (compiler_options(mesh), {}))
    weights = 2 * width**2
    assert summary(collectives(ours, 8)) == [dict(kind="all-gather", count=1, bytes=weights)]
    # By default the compiler sends shards around a ring. Each is counted as often as it is sent.
    (one,) = summary(collectives(default, 8))
    assert one["kind"] == "collective-permute" and 7 / 8 * weights <= one["bytes"] <= 9 / 8 * weights
