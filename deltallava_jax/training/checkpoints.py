"""Orbax checkpoints: asynchronous, whole or not there at all, restored onto whatever mesh the state is to live on."""

from __future__ import annotations

from pathlib import Path

import jax
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from deltallava_jax.config import ModelConfig
from deltallava_jax.models import vlm
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import flatten, unflatten
from deltallava_jax.training.optimizer import join
from deltallava_jax.training.step import TrainState


class CheckpointError(ValueError):
    """A checkpoint that is missing or does not fit; the message says which and what to do."""


class Checkpoints:
    """The newest ``keep`` checkpoints of a workdir, each with the train state and a small JSON record.

    create: makes the folder; without it CheckpointError says what a workdir without one lacks."""

    def __init__(self, workdir: str | Path, keep: int = 2, *, create: bool = False):
        self.path = Path(workdir).absolute() / "checkpoints"
        if not create and not self.path.is_dir():
            raise CheckpointError(f"{workdir} holds no finished checkpoint; train first")
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        handlers = {
            "params": ocp.StandardCheckpointHandler(),
            "optimizer": ocp.StandardCheckpointHandler(),
            "record": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, record: dict) -> None:
        """Starts saving and returns before the files are written. ``record`` is JSON, e.g. the fault counts."""
        items = ocp.args.Composite(
            params=ocp.args.StandardSave({"trained": state.trained, "frozen": state.frozen}),
            optimizer=ocp.args.StandardSave({"step": state.step, "moments": state.optimizer}),
            record=ocp.args.JsonSave(record),
        )
        if step != self.latest():
            self._manager.save(step, args=items)

    def save_params(self, params: Params) -> None:
        """Saves parameters alone, as step 0, and returns when they are written: a model to start from.

        In the foreground and uncompressed: otherwise copies of the whole model are in memory meanwhile."""
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        handlers = {"params": ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=1)}
        manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)
        manager.save(0, args=ocp.args.Composite(params=ocp.args.PyTreeSave({"trained": params, "frozen": {}})))
        manager.close()

    def restore(self, step: int, shapes: TrainState) -> tuple[TrainState, dict]:
        """The state of a step, in the shapes, dtypes and shardings of ``shapes``, and its record.

        Raises CheckpointError if the checkpoint holds other parameters, no optimizer, or cannot be read."""
        params = {"trained": shapes.trained, "frozen": shapes.frozen}
        saved = self._saved_params(step)
        if not (self.path / str(step) / "optimizer").is_dir():
            raise CheckpointError(
                f"checkpoint {self.path / str(step)} holds parameters alone; train in another --workdir with "
                f"--config.init_from={self.path.parent}"
            )
        self._compare(step, saved, params)
        items = self._restore(
            step,
            params=ocp.args.StandardRestore(params),
            optimizer=ocp.args.StandardRestore({"step": shapes.step, "moments": shapes.optimizer}),
            record=ocp.args.JsonRestore(),
        )
        params, optimizer = items["params"], items["optimizer"]
        return (
            TrainState(optimizer["step"], params["trained"], params["frozen"], optimizer["moments"]),
            items["record"],
        )

    def restore_params(self, step: int, cfg: ModelConfig, like: Params | None = None) -> Params:
        """The parameters of a step alone.

        like: their dtypes and shardings; by default the saved dtypes, whole on the first device. Raises
        CheckpointError as ``restore`` does."""
        saved = self._saved_params(step)
        expected = jax.eval_shape(lambda: vlm.init_params(cfg, jax.random.key(0)))
        self._compare(step, join(saved["trained"], saved["frozen"]), expected)
        flat, device = flatten(like or {}), SingleDeviceSharding(jax.devices()[0])

        def wanted(path, leaf):
            if path in flat:
                return flat[path]
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)

        shapes = {
            part: unflatten({path: wanted(path, leaf) for path, leaf in flatten(tree).items()})
            for part, tree in saved.items()
        }
        params = self._restore(step, params=ocp.args.StandardRestore(shapes))["params"]
        return join(params["trained"], params["frozen"])

    def frozen_paths(self, step: int) -> list[str]:
        """Names of the parameters that the training of this checkpoint keeps as they are."""
        return list(flatten(self._saved_params(step)["frozen"]))

    def _restore(self, step: int, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(f"checkpoint {self.path / str(step)} cannot be restored: {error}") from error

    def _saved_params(self, step: int) -> dict:
        try:
            metadata = self._manager.item_metadata(step)["params"]
            return {"trained": metadata["trained"], "frozen": metadata.get("frozen", {})}
        except (ValueError, KeyError, OSError, TypeError) as error:
            raise CheckpointError(f"checkpoint {self.path / str(step)} cannot be read: {error}") from error

    def _compare(self, step: int, saved: Params, expected: Params) -> None:
        """CheckpointError listing the names and shapes that differ."""
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
        """Returns when every save begun is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()
