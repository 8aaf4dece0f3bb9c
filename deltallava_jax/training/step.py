"""The train state and the one train step."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from deltallava_jax.config import Config
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels import registry
from deltallava_jax.models import llavolta, lora, systems, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel import rules
from deltallava_jax.parallel.mesh import ROWS, compiled
from deltallava_jax.products import gradient_dtype
from deltallava_jax.sequence import Batch
from deltallava_jax.training.optimizer import join, make_optimizer, schedule, split


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """step: updates done. trained: float32. frozen: bfloat16 or quantised, without optimizer state."""

    step: Array
    trained: Params
    frozen: Params
    optimizer: optax.OptState

    @property
    def params(self) -> Params:
        """All parameters as they are kept: adapters beside their matrices, matrices quantised."""
        return join(self.trained, self.frozen)


def whole_params(cfg: Config, state: TrainState) -> Params:
    """The model's parameters as inference takes them: adapters merged, the layers' matrices in the compute dtype."""
    if not cfg.lora:
        return state.params
    return lora.merged(state.params, cfg.lora, lambda path: cfg.model.dtype if re.search(lora.MATRICES, path) else None)


def base_shapes(cfg: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape, dtype, sharding} of the parameters that a run starts from: before adapters are added and frozen
    matrices quantised."""
    shapes = jax.eval_shape(lambda: join(*_parts(cfg, vlm.init_params(cfg.model, jax.random.key(0)))))
    place = lambda path, leaf: NamedSharding(mesh, rules.spec_for(path, leaf.shape, mesh))
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(path, leaf))
        for path, leaf in flatten(shapes).items() if not lora.is_adapter(path)
    }  # fmt: skip


def state_shapes(cfg: Config, mesh: Mesh, steps: int) -> TrainState:
    """The train state as shapes with their shardings, nothing allocated."""
    shapes = jax.eval_shape(lambda: _fresh_state(cfg, steps))

    def place(leaf: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes, rules.shardings(shapes, mesh))


def init_state(cfg: Config, mesh: Mesh, steps: int, params: Params | None = None) -> TrainState:
    """A train state at step 0, created with its shardings.

    params: initial parameters in the dtypes and shardings of ``base_shapes``, which are donated; by default fresh from
    the config's seed."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(cfg, mesh, steps))
    if params is None:
        return jax.jit(lambda: _fresh_state(cfg, steps), out_shardings=placed)()
    begin = jax.jit(lambda params: _state(cfg, steps, params), out_shardings=placed, donate_argnums=0)
    return begin(params)


def _fresh_state(cfg: Config, steps: int) -> TrainState:
    return _state(cfg, steps, vlm.init_params(cfg.model, jax.random.key(cfg.seed)))


def init_frozen(cfg: Config, mesh: Mesh, params: Params) -> Params:
    """The frozen part of ``init_state``, to which the trained parts of a checkpoint belong."""
    placed = jax.tree.map(lambda leaf: leaf.sharding, state_shapes(cfg, mesh, 1).frozen)
    return jax.jit(lambda params: _kept(cfg, _parts(cfg, params)[1]), out_shardings=placed, donate_argnums=0)(params)


def _state(cfg: Config, steps: int, params: Params) -> TrainState:
    trained, frozen = _parts(cfg, params)
    frozen = _kept(cfg, frozen)
    optimizer = make_optimizer(cfg.optimizer, steps).init(trained)
    return TrainState(jnp.int32(0), trained, frozen, optimizer)


def _kept(cfg: Config, frozen: Params) -> Params:
    return lora.quantize(frozen, cfg.lora.base) if cfg.lora else frozen


def _parts(cfg: Config, params: Params) -> tuple[Params, Params]:
    """(trained, frozen) of a model's parameters, adapters included."""
    if cfg.lora:
        params = lora.added(params, cfg.lora, jax.random.key(cfg.seed))
    trained, frozen = split(params, cfg.optimizer)
    if cfg.lora and cfg.lora.base != "bfloat16":
        whole = next((path for path in flatten(trained) if re.search(lora.QUANTISED, path)), None)
        if whole:
            raise ConfigError(
                f"lora.base={cfg.lora.base} is for matrices that do not train, but {whole} does; name it in "
                "optimizer.frozen or in lora.targets"
            )
    return trained, frozen


def gradients(
    cfg: Config,
    trained: Params,
    frozen: Params,
    batch: Batch,
    rng: Array,
    budget: int,
    pooling: llavolta.Pooling | None = None,
) -> tuple[Array, Array, Params]:
    """(mean loss, supervised tokens, gradients of the mean loss) of a batch.

    With ``training.every_budget`` the loss is the mean over all of the projector's budgets.
    The batch is split into ``optimizer.accumulation`` microbatches: summed losses and gradients are accumulated and
    divided once by the supervised tokens of the whole batch, so that the result does not depend on the split."""
    parts = cfg.optimizer.accumulation

    def part_loss(trained, part, key):
        return _loss_sum(cfg, trained, frozen, part, key, budget, pooling)

    value_and_grad = jax.value_and_grad(part_loss, has_aux=True)
    if parts == 1:
        (total, count), grads = value_and_grad(trained, batch, rng)
    else:
        # Strided: each device's rows are spread over the microbatches, so that no row moves to another device.
        strided = jax.tree.map(lambda x: jnp.swapaxes(x.reshape(len(x) // parts, parts, *x.shape[1:]), 0, 1), batch)

        def body(sums, part_and_key):
            (total, count), grads = value_and_grad(trained, *part_and_key)
            return jax.tree.map(jnp.add, sums, (total, count, grads)), None

        zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trained))
        (total, count, grads), _ = jax.lax.scan(body, zeros, (strided, jax.random.split(rng, parts)))
    scale = 1.0 / jnp.maximum(count, 1.0)
    return total * scale, count, jax.tree.map(lambda g: g * scale, grads)


def _loss_sum(cfg: Config, trained: Params, frozen: Params, part: Batch, key: Array, budget: int, pooling):
    """(summed loss, supervised tokens) of a microbatch."""
    budgets = systems.budgets(cfg.model.projector) if cfg.training.every_budget else (budget,)
    params = join(trained, frozen)
    if cfg.lora:
        params = lora.assembled(params, cfg.lora, jax.random.fold_in(key, 1))
    with registry.forced(cfg.model, ordered=True), gradient_dtype(cfg.optimizer.gradient_dtype):
        sums = [vlm.loss_sum(params, cfg.model, part, key, budget=each, pooling=pooling) for each in budgets]
    return sum(total for total, _ in sums) / len(sums), sums[0][1]


def device_bytes(tree) -> int:
    """Bytes on one device of a tree of arrays or shapes with shardings."""
    sizes = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]
    return int(np.sum(sizes, dtype=np.int64))


def batch_shapes(cfg: Config, mesh: Mesh, text: int, images: int) -> Batch:
    """The global batch as shapes with their sharding: T text tokens and I image places per row."""
    make = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, ROWS))
    return Batch.shapes(
        cfg.data.rows, text, images, cfg.model.vision.image_size,
        question=systems.question_length(cfg.model.projector), branches=cfg.data.independent_rounds, make=make,
    )  # fmt: skip


class TrainStep:
    """step(state, batch, budget, pooling) -> (state, metrics); the old state is donated; budget and pooling (of
    LLaVolta's current phase) are static.

    Compiled ahead of time, once for each (budget, pooling, rows, text, images) signature. Where the loss or a gradient
    is not finite the parameters are unchanged and metrics["finite"] is False."""

    def __init__(self, cfg: Config, mesh: Mesh, steps: int):
        llavolta.validate(cfg)
        self.cfg = cfg
        self.mesh = mesh
        self.shapes = state_shapes(cfg, mesh, steps)
        self.compiled: dict[tuple, jax.stages.Compiled] = {}
        self._optimizer = make_optimizer(cfg.optimizer, steps)
        self._rate = schedule(cfg.optimizer, steps)
        placed = jax.tree.map(lambda leaf: leaf.sharding, self.shapes)
        self._jit = jax.jit(
            self._step, static_argnums=(2, 3), donate_argnums=0, out_shardings=(placed, NamedSharding(mesh, P()))
        )

    def trace(self, batch: Batch, budget: int, pooling: llavolta.Pooling | None = None) -> jax.stages.Traced:
        """The program for batches like ``batch`` (arrays or shapes, with shardings), before it is compiled."""
        with jax.set_mesh(self.mesh):
            return self._jit.trace(self.shapes, batch, budget, pooling)

    def compile(self, batch: Batch, budget: int, pooling: llavolta.Pooling | None = None) -> jax.stages.Compiled:
        """The program for batches like ``batch``."""
        if not batch.image_positions.shape[1]:  # without images all budgets share one program
            budget = systems.budgets(self.cfg.model.projector)[0]
            pooling = None
        signature = (budget, pooling, *batch.tokens.shape, batch.image_positions.shape[1])
        if signature not in self.compiled:
            lowered = self.trace(batch, budget, pooling).lower()
            self.compiled[signature] = compiled(lowered, self.mesh)
        return self.compiled[signature]

    def saved(self, batch: Batch, budget: int) -> list[jax.ShapeDtypeStruct]:
        """What the forward pass of a microbatch keeps for its backward pass besides the weights and the batch, as
        shapes of all devices together. Traced, not compiled."""
        parts = self.cfg.optimizer.accumulation
        micro = jax.tree.map(lambda x: jax.ShapeDtypeStruct((len(x) // parts, *x.shape[1:]), x.dtype), batch)

        def residuals(trained, frozen, batch):
            key = jax.random.key(0)
            loss = lambda trained: _loss_sum(self.cfg, trained, frozen, batch, key, budget, None)
            pull = jax.vjp(loss, trained, has_aux=True)[1]
            given = {id(x) for x in jax.tree.leaves((trained, frozen, batch))}
            return [x for x in jax.tree.leaves(pull) if id(x) not in given]

        with jax.set_mesh(self.mesh):
            return jax.eval_shape(residuals, self.shapes.trained, self.shapes.frozen, micro)

    def __call__(
        self, state: TrainState, batch: Batch, budget: int, pooling: llavolta.Pooling | None = None
    ) -> tuple[TrainState, dict[str, Array]]:
        return self.compile(batch, budget, pooling)(state, batch)

    def _step(self, state: TrainState, batch: Batch, budget: int, pooling) -> tuple[TrainState, dict[str, Array]]:
        rng = jax.random.fold_in(jax.random.key(self.cfg.seed), state.step)
        loss, supervised, grads = gradients(self.cfg, state.trained, state.frozen, batch, rng, budget, pooling)
        norm = optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, moments = self._optimizer.update(grads, state.optimizer, state.trained)
            trained = optax.apply_updates(state.trained, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)

        def keep(new, old):
            return jnp.where(finite, new, old)

        images = (batch.image_positions < batch.tokens.shape[1]).sum()
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "lr": self._rate(state.step),
            "finite": finite,
            "supervised": supervised,
            "conversations": batch.segments.max(axis=1).sum(),
            "images": images,
            "tokens": (batch.segments > 0).sum() + images * (budget - 1),  # without padding
        }
        state = TrainState(
            step=state.step + 1,
            trained=jax.tree.map(keep, trained, state.trained),
            frozen=state.frozen,
            optimizer=jax.tree.map(keep, moments, state.optimizer),
        )
        return state, metrics
