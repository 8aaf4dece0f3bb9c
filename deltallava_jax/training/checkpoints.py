"""Orbax checkpoints: written asynchronously and atomically, restored onto any mesh."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Collection
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from deltallava_jax.config import LoraConfig, ModelConfig
from deltallava_jax.errors import CheckpointError, SaveFailed
from deltallava_jax.models import lora, vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.parallel import hosts
from deltallava_jax.training.optimizer import join
from deltallava_jax.training.step import TrainState

# (path, saved) -> the shape, dtype and sharding to restore a parameter in, or None to leave it out
Place = Callable[[str, jax.ShapeDtypeStruct], jax.ShapeDtypeStruct | None]

# Orbax also logs, with a traceback, each error that it raises; the user gets a CheckpointError.
logging.getLogger("absl").addFilter(lambda record: "orbax" not in record.pathname)


class Checkpoints:
    """The checkpoints of a workdir, each with the train state and a small JSON record: the newest ``keep``, and the
    ``best`` ones of highest accuracy.

    create: create the folder. clean: remove, in the background, what interrupted saves left there; only for training,
    when no other process saves to this folder."""

    def __init__(self, workdir: str | Path, keep: int = 2, best: int = 0, *, create: bool = False, clean: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"

        def accuracy(metrics: dict) -> float:
            return metrics["accuracy"]

        highest = BestN(get_metric_fn=accuracy, n=best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=accuracy if best else None,  # with it the accuracies are saved too
            preservation_policy=AnyPreservationPolicy([LatestN(keep), highest]),
            create=create,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=clean,
        )
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict, accuracy: float | None = None) -> None:
        """Starts saving and returns before the files are written. ``record`` is JSON, e.g. the fault counts.
        ``state.frozen`` is empty where the base of adapters is kept by reference.

        accuracy: of an evaluation at this step. Raises SaveFailed if this save or the one before fails."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave({"trained": state.trained, "frozen": state.frozen}),
            optimizer=ocp.args.StandardSave({"step": state.step, "moments": state.optimizer}),
            record=ocp.args.JsonSave(record),
        )
        if step != self.latest():
            with self._writing():
                self._manager.save(step, args=items, metrics=None if accuracy is None else {"accuracy": accuracy})

    def save_params(self, params: Params) -> None:
        """Saves parameters alone, as step 0, to initialize a training, and returns when they are written.

        Synchronous and uncompressed, because orbax would otherwise hold copies of the whole model in memory."""
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        limit = _gigabytes(jax.tree.leaves(params))
        handlers = {"params": ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=limit)}
        manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave({"trained": params, "frozen": {}})))
        manager.close()

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, dict]:
        """The state of a step, in the shapes, dtypes and shardings of ``shapes``, and its record.

        Raises CheckpointError if the checkpoint holds other parameters, no or another optimizer, or cannot be read."""
        params = {"trained": shapes.trained, "frozen": shapes.frozen}
        saved = self._saved_params(step)
        self.require_optimizer(step)
        self._compare(step, saved, params)
        optimizer = {"step": shapes.step, "moments": shapes.optimizer}
        kept = _array_shapes(self._saved_optimizer(step))
        if kept and kept != _array_shapes(optimizer):
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} holds the state of another optimizer; resume with the "
                f"optimizer.name of {self.path.parent / 'config.json'}, or train in another --workdir with "
                f"--config.init_from={self.path.parent}"
            )
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore(optimizer),
            record=ocp.args.JsonRestore(),
        )
        params = items["params"]
        optimizer = items["optimizer"]
        state = TrainState(optimizer["step"], params["trained"], params["frozen"], optimizer["moments"])
        return state, items["record"]

    def require_optimizer(self, step: int) -> None:
        """Raises CheckpointError for a checkpoint of parameters alone, from which training cannot resume."""
        if not (self.path / str(step) / "optimizer").is_dir():
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} holds parameters alone; train in another --workdir with "
                f"--config.init_from={self.path.parent}"
            )

    def restore_params(
        self,
        step: int,
        cfg: ModelConfig,
        place: Place | None = None,
        adapters: LoraConfig | None = None,
        elsewhere: Collection[str] = (),
    ) -> Params:
        """The parameters of a step alone; by default in the saved dtypes, whole on this process's first device.

        place(path, saved): the shape, dtype and sharding to restore one in, None to leave it out. adapters: those of
        the checkpoint. elsewhere: the parameters that it lacks. Raises CheckpointError as ``restore`` does."""
        saved = self._saved_params(step)
        expected = flatten(jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0))))
        if adapters:
            shapes = lora.shapes(adapters, {path: leaf.shape for path, leaf in expected.items()})
            expected = {path: leaf for path, leaf in expected.items() if path not in elsewhere}
            expected |= {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
        self._compare(step, join(saved["trained"], saved["frozen"]), expected)
        wanted = {}
        for part, tree in saved.items():
            found = {path: (place or as_saved)(path, leaf) for path, leaf in flatten(tree).items()}
            found = {path: leaf for path, leaf in found.items() if leaf is not None}
            if found:
                wanted[part] = unflatten(found)
        if not wanted:  # orbax refuses an empty tree
            return {}
        arguments = ocp.args.PyTreeRestore(
            wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted), partial_restore=True
        )
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_gigabytes(jax.tree.leaves(saved)))
        try:
            with ocp.Checkpointer(handler) as reader:
                params = reader.restore(self.path / str(step) / "params", args=arguments)
        except Exception as error:  # as in ``_restore``
            raise self._damaged(step, _brief(error)) from error
        return join(params.get("trained", {}), params.get("frozen", {}))

    def frozen(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The frozen parameters of a checkpoint: path -> shape and dtype."""
        return flatten(self._saved_params(step)["frozen"])

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # tensorstore raises bare Exception where the file of an array is missing
            raise self._damaged(step, _brief(error)) from error

    def _saved_optimizer(self, step: int):
        """Shapes of the optimizer's state; None where they cannot be read, which ``_restore`` then reports."""
        try:
            return self._manager.item_metadata(step)["optimizer"]
        except (ValueError, KeyError, OSError, TypeError):
            return None

    def _saved_params(self, step: int) -> dict:
        try:
            metadata = self._manager.item_metadata(step)["params"]
            return {"trained": metadata["trained"], "frozen": metadata.get("frozen", {})}
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise self._damaged(step, "the names of its parameters cannot be read") from error

    def _damaged(self, step: int, reason: str) -> CheckpointError:
        before = max((other for other in self._manager.all_steps() if other < step), default=None)
        after = "start over" if before is None else f"resume from step {before}"
        return CheckpointError(
            f"checkpoint {self.path / str(step)} cannot be restored: {reason}. If a file of it is missing, restore "
            f"it from a backup, or move the folder {step} away to {after}"
        )

    @contextlib.contextmanager
    def _writing(self):
        """Raises SaveFailed for an error in orbax's threads, which may come from the previous save."""
        try:
            yield
        except (ValueError, OSError) as error:
            self._manager.reload()
            good = self.latest()
            kept = "no checkpoint was saved yet" if good is None else f"the checkpoint of step {good} is kept"
            what_to_do = "Free space on that disk" if "No space left" in str(error) else "Fix this"
            raise SaveFailed(
                f"a checkpoint could not be written to {self.path}: {_brief(error)}; {kept}. {what_to_do} and "
                "start the same command again"
            ) from error

    def _compare(self, step: int, saved: Params, expected: Params) -> None:
        """Raises CheckpointError listing the names and shapes that differ."""
        ours = {path: tuple(leaf.shape) for path, leaf in flatten(expected).items()}
        theirs = {path: tuple(leaf.shape) for path, leaf in flatten(saved).items()}
        differing = [path for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)]
        if differing:
            lines = [f"  {path}: saved {theirs.get(path)}, expected {ours.get(path)}" for path in differing[:5]]
            lines += [f"  and {len(differing) - 5} more"] if len(differing) > 5 else []
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} is of another model; use its config or another --workdir:\n"
                + "\n".join(lines)
            )

    def wait(self) -> None:
        """Waits until every pending save is complete. Raises SaveFailed if one fails."""
        with self._writing():
            self._manager.wait_until_finished()

    def close(self) -> None:
        with self._writing():
            self._manager.close()


def has_finished(workdir: str | Path) -> bool:
    """Whether a workdir holds a finished checkpoint. Lists folders only: JAX's devices must not be initialized before
    the processes of a run are connected."""
    folder = Path(workdir).absolute() / "checkpoints"
    return folder.is_dir() and ocp.utils.any_checkpoint_step(folder) is not None


def _array_shapes(tree) -> list[tuple[int, ...]]:
    return sorted(leaf.shape for leaf in jax.tree.leaves(tree))


def as_saved(path: str, saved: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """A parameter as it was saved, whole on this process's first device."""
    return jax.ShapeDtypeStruct(saved.shape, saved.dtype, sharding=SingleDeviceSharding(jax.local_devices()[0]))


def only(paths: Collection[str], place: Place) -> Place:
    """``place`` for these parameters and their adapters, None for the rest."""
    return lambda path, saved: place(path, saved) if lora.adapted(path) in paths else None


def fingerprint(params: dict[str, jax.Array]) -> dict[str, str]:
    """A checksum of each array by path, of its values in bfloat16, in which frozen parameters are kept: the same on
    every mesh and device. It is made to notice another model, not an attack."""

    @jax.jit
    def sums(leaves):
        return jnp.stack([_checksum(leaf) for leaf in leaves])

    found = np.asarray(hosts.whole(sums(list(params.values())))) if params else []
    return {path: f"{value:08x}" for path, value in zip(params, found, strict=True)}


def require_the_same(known: dict[str, str], found: dict[str, str], whose: str) -> None:
    """Raises CheckpointError, naming the first parameter whose checksum differs."""
    differing = [path for path in found if known.get(path) != found[path]]
    if differing:
        more = f"and {len(differing) - 1} more have" if differing[1:] else "has"
        raise CheckpointError(
            f"{whose} as it was when they were trained, but {differing[0]} {more} changed there since; put it back"
        )


def _checksum(x: jax.Array) -> jax.Array:
    """Bits times odd numbers that depend on their place, added as integers, so in any order."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16).astype(jnp.uint32)
    place = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return (bits * (place * jnp.uint32(2654435761) | jnp.uint32(1))).sum(dtype=jnp.uint32)


def _gigabytes(leaves: list) -> int:
    """The smallest memory limit, in GB, under which orbax can move these arrays: above the size of the largest one."""
    return 1 + max(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) // 10**9


def _brief(error: Exception) -> str:
    """The first line of an error; for a full disk, only that."""
    if "No space left" in str(error):
        return "No space left on device"
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
