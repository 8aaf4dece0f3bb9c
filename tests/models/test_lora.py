"""Adapters and quantised matrices as functions: what is adapted, beside = merged, what is computed and saved."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltallava_jax import config as c
from deltallava_jax.analysis import flops
from deltallava_jax.config import LoraConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import lora, quantized, vlm
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.step import TrainStep, batch_shapes
from tests import tiny
from tests.models.rows import conversation, pack

EVERYWHERE = r"(vision|decoder)/layers/"


@functools.cache
def shapes_of(decoder: str) -> dict:
    cfg = c.compose(c.VisionConfig(), c.preset(c.DecoderConfig, decoder), dict(name="delta", scale_factor=2))
    return flatten(jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0))))


def adapted_params(cfg, settings, seed=1):
    """Random parameters of a model with adapters, B too."""
    params = lora.added(tiny.random_params(cfg), settings, jax.random.key(seed))
    drawn = lambda path, leaf: jax.random.normal(jax.random.key(len(path)), leaf.shape) * 0.2
    return unflatten(
        {path: drawn(path, leaf) if path.endswith(lora.B) else leaf for path, leaf in flatten(params).items()}
    )


@functools.cache
def rows():
    rng = np.random.default_rng(0)
    made = [[conversation(rng, 14, 1), conversation(rng, 9)], [conversation(rng, 20, 1)]]
    return pack(made, 24, 1)


@functools.cache
def small():
    cfg = tiny.get_config().model
    vision = dataclasses.replace(cfg.vision, image_size=32)
    return dataclasses.replace(
        cfg, vision=vision, projector=dataclasses.replace(cfg.projector, grid=vision.grid, scale_factor=2)
    )


# LLaVA's published adapters (r 128 on every matrix of the decoder's layers).
@pytest.mark.parametrize("decoder, count", [("vicuna_7b", 319_815_680), ("vicuna_13b", 500_695_040)])
def test_the_published_number_of_adapter_parameters(decoder, count):
    kernels = {path: leaf.shape for path, leaf in shapes_of(decoder).items()}
    assert sum(np.prod(shape) for shape in lora.shapes(LoraConfig(), kernels).values()) == count


@pytest.mark.parametrize(
    "targets, found",
    [
        ("q,v", "decoder q v"),
        ("q_proj, v_proj", "decoder q v"),
        (r"(q|v)_proj", "decoder q v"),
        (r"\.*(gate|down)", "decoder gate down"),
        (r"layers/o$", "decoder o"),
        (r"^vision/layers/(q|up)$", "vision q up"),
        (r"(vision|decoder)/layers/k$", "vision k decoder k"),
    ],
)
def test_targets_without_the_towers_name_are_of_the_decoder_alone(targets, found):
    """As in LLaVA, whose plain list of names would match CLIP's tower too."""
    modules = lora.targets(LoraConfig(targets=targets), shapes_of("vicuna_7b"))
    words, part = [], None
    for module in sorted(modules, key=lambda module: module.startswith("decoder/")):
        owner, _, name = module.split("/")
        words += ([owner] if owner != part else []) + [name]
        part = owner
    assert sorted(words) == sorted(found.split())


@pytest.mark.parametrize("targets", ["w,q", "lm_head", "^projector/", "nothing/here"])
def test_targets_that_match_no_matrix_are_refused(targets):
    with pytest.raises(ConfigError, match="lora.targets"):
        lora.targets(LoraConfig(targets=targets), shapes_of("vicuna_7b"))


@pytest.mark.parametrize("settings", [dict(), dict(rslora=True), dict(base="nf4"), dict(base="int8")])
def test_beside_the_matrices_and_merged_the_logits_are_the_same(settings):
    cfg, settings = small(), LoraConfig(rank=3, alpha=5, targets=EVERYWHERE, **settings)
    params = lora.quantize(adapted_params(cfg, settings), settings.base)
    beside = vlm.logits(lora.assembled(params, settings), cfg, rows())
    whole = lora.merged(params, settings, lambda path: jnp.float32)
    live = rows().segments.max(1) > 0
    np.testing.assert_allclose(beside[live], vlm.logits(whole, cfg, rows())[live], atol=2e-4)
    plain = unflatten({path: leaf for path, leaf in flatten(whole).items()})
    assert flatten(plain).keys() == flatten(tiny.random_params(cfg)).keys()
    base = vlm.logits(tiny.random_params(cfg), cfg, rows())
    assert np.abs(beside - base)[live].max() > 0.05  # the adapters, and the quantisation, do something


def test_the_merged_matrix_is_that_of_the_definition():
    cfg, settings = small(), LoraConfig(rank=3, alpha=5)
    params = adapted_params(cfg, settings)
    flat, whole = flatten(params), flatten(lora.merged(params, settings))
    for name in ("decoder/layers/down", "decoder/layers/q"):
        a, b, kernel = (np.float64(flat[f"{name}/{leaf}"]) for leaf in ("lora_a", "lora_b", "kernel"))
        np.testing.assert_allclose(whole[f"{name}/kernel"], kernel + 5 / 3 * a @ b, rtol=1e-5, atol=1e-6)
    assert whole["vision/layers/q/kernel"] is flat["vision/layers/q/kernel"]


def test_dropout_touches_the_adapters_branch_alone():
    settings = LoraConfig(rank=4, alpha=4, dropout=0.25)
    rng = np.random.default_rng(0)
    new = lambda *shape: jnp.float32(rng.standard_normal(shape))
    node = {"kernel": new(8, 6), "lora_a": new(8, 4), "lora_b": new(4, 6)}
    x = new(4000, 8)
    with_key = lambda node, key: lora.assembled(dict(node), settings, key)["kernel"].product(x)
    zero = node | {"lora_b": jnp.zeros((4, 6))}
    np.testing.assert_array_equal(with_key(zero, jax.random.key(0)), with_key(zero, None))
    # The mean over many masks is the product without dropout; a column of A alone shows the masks themselves.
    branch = np.mean([with_key(node, jax.random.key(seed)) for seed in range(64)], axis=0)
    np.testing.assert_allclose(branch, with_key(node, None), atol=4.0, rtol=0.5)
    one = {"kernel": jnp.zeros((8, 1)), "lora_a": jnp.eye(8, 4), "lora_b": jnp.ones((4, 1))}
    ones = jnp.ones((20_000, 8))
    dropped = lora.assembled(one, settings, jax.random.key(3))["kernel"].product(ones)
    values, counts = np.unique(np.asarray(dropped).round(3), return_counts=True)
    np.testing.assert_allclose(values, np.arange(5) / 0.75, atol=1e-3)  # none to all of four inputs kept
    assert abs((values * counts).sum() / 20_000 - 4) < 0.05


def test_nf4_takes_the_nearest_level_and_packs_two_codes_a_byte():
    kernel = jax.random.normal(jax.random.key(0), (2, 128, 24))
    leaf = quantized.quantize(kernel, "nf4")
    assert leaf["nf4"].shape == (2, 64, 24) and leaf["nf4"].dtype == jnp.uint8 and leaf["scale"].shape == (2, 2, 24)
    blocks = np.asarray(kernel).reshape(2, 2, 64, 24)
    scale = np.asarray(leaf["scale"], np.float32)[:, :, None]
    np.testing.assert_allclose(scale[:, :, 0], np.abs(blocks).max(2), rtol=2**-8)
    levels = quantized.NF4 * scale[..., None]  # [.., 1, 24, 16]
    nearest = np.abs(levels - blocks[..., None]).argmin(-1)
    expected = np.take_along_axis(np.broadcast_to(levels, (*nearest.shape, 16)), nearest[..., None], -1)[..., 0]
    whole = quantized.assembled(leaf).whole(jnp.float32)
    np.testing.assert_allclose(whole, expected.reshape(kernel.shape), rtol=1e-6)


def test_int8_is_within_half_a_step_of_its_block():
    kernel = jax.random.normal(jax.random.key(0), (96, 24)).at[:, 3].set(0)
    leaf = quantized.quantize(kernel, "int8")
    assert leaf["scale"].shape == (3, 24)  # blocks of 32, which divide 96
    error = jnp.abs(quantized.assembled(leaf).whole(jnp.float32) - kernel).reshape(3, 32, 24).max(1)
    assert (error <= leaf["scale"].astype(jnp.float32) * (0.5 / 127 + 2**-8)).all()


# ------------------------------------------------------------------ what the train step computes and saves


def step_of(remat: str, settings: LoraConfig | None, frozen: tuple[str, ...]):
    cfg = tiny.get_config()
    cfg = dataclasses.replace(
        cfg, model=dataclasses.replace(cfg.model, remat=remat), lora=settings,
        optimizer=dataclasses.replace(cfg.optimizer, frozen=frozen),
    )  # fmt: skip
    return TrainStep(cfg, make_mesh(cfg, jax.devices()[:1]), 8)


def test_no_gradient_of_the_base_is_computed():
    """In products: the base has one in the backward pass, of its inputs, where full tuning has two."""
    count = {}
    for name, settings, frozen in (
        ("base", None, ("^vision/", "^decoder/")),
        ("lora", LoraConfig(rank=4), ("^vision/", "^decoder/")),
        ("full", None, ("^vision/",)),
    ):
        step = step_of("none", settings, frozen)
        count[name] = flops.traced(step.trace(batch_shapes(step.cfg, step.mesh, 60, 3), 4).jaxpr)["decoder"]
    forward = {name: passes["forward"] for name, passes in count.items()}
    assert forward["base"] == forward["full"] < forward["lora"]
    adapters = forward["lora"] - forward["base"]
    assert count["lora"]["backward"] == count["base"]["backward"] + 2 * adapters
    assert count["full"]["backward"] == 2 * forward["full"]
    assert count["lora"]["recompute"] < adapters  # of the adapters' first product alone


def test_of_a_product_and_its_adapter_the_sum_alone_is_saved():
    bytes_of = lambda settings: sum(
        leaf.size * leaf.dtype.itemsize
        for step in [step_of("dots", settings, ("^vision/", "^decoder/"))]
        for leaf in step.saved(batch_shapes(step.cfg, step.mesh, 60, 3), 4)
    )
    plain, adapted = bytes_of(None), bytes_of(LoraConfig(rank=4))
    cfg = tiny.get_config().model.decoder
    outputs = 4 * cfg.width + 2 * cfg.mlp_width + cfg.width  # of a layer's seven matrices
    one = 8 * 96 * cfg.layers * 4 * outputs  # bytes of them
    assert adapted - plain < 0.3 * one
