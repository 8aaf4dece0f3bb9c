"""A small model trained over every mesh of four devices, by one process or as one of several:

    python -m tests.training.meshes FOLDER COORDINATOR PROCESSES PROCESS

The rows are real ones, and lie on the devices as in a training; the model has parameters under the names in the rules,
so that they are divided as a real one's, and is small enough to be compiled in a second."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

MESHES = ((4, 1, 1), (2, 2, 1), (1, 4, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4))  # data, fsdp, tensor
STEPS, WIDTH = 2, 32


class Broken:
    """easy-VQA's first records; the pictures of some are not there."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 300

    def __getitem__(self, index):
        record = self.source[index]
        return dataclasses.replace(record, images=(Path("nowhere"),)) if index % 4 == 0 else record

    def texts(self):
        return (turn["value"] for index in range(len(self)) for turn in self.source[index].conversation)


def make_params(cfg):
    rng = np.random.default_rng(0)
    new = lambda *shape: (0.1 * rng.standard_normal(shape)).astype(np.float32)
    size, vocabulary = cfg.model.vision.image_size, cfg.model.decoder.vocab_size
    return {
        "vision": {"layers": {"q": {"kernel": new(1, 3 * size, WIDTH)}}},
        "decoder": {
            "embed": {"embedding": new(vocabulary, WIDTH)},
            "layers": {
                "gate": {"kernel": new(1, WIDTH, 2 * WIDTH), "bias": new(1, 2 * WIDTH)},
                "down": {"kernel": new(1, 2 * WIDTH, WIDTH)},
            },
            "head": {"out": {"kernel": new(WIDTH, vocabulary)}},
        },
    }


def loss_of(params, batch):
    """The mean over the supervised tokens of the whole batch, in one layer that attends to the row's pictures."""
    import jax
    import jax.numpy as jnp

    decoder = params["decoder"]
    pixels = batch.images.mean(axis=(1, 2)) / 255  # [B, W, 3]
    visual = pixels.reshape(len(pixels), -1) @ params["vision"]["layers"]["q"]["kernel"][0]
    x = decoder["embed"]["embedding"][batch.tokens] + visual[:, None]
    gate, down = decoder["layers"]["gate"], decoder["layers"]["down"]
    x = x + jax.nn.gelu(x @ gate["kernel"][0] + gate["bias"][0]) @ down["kernel"][0]
    scores = jax.nn.log_softmax(x[:, :-1] @ decoder["head"]["out"]["kernel"])
    found = jnp.take_along_axis(scores, batch.tokens[:, 1:, None], axis=-1)[..., 0]
    mask = batch.loss_mask[:, 1:]
    return -(found * mask).sum() / mask.sum()


def train(devices, meshes=MESHES):
    """{mesh: (losses, parameters after the last step, faults reported by this process)}."""
    import jax
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from deltallava_jax.config import MeshConfig, override
    from deltallava_jax.data.pipeline import elements
    from deltallava_jax.data.sources import training_source
    from deltallava_jax.models.names import flatten
    from deltallava_jax.parallel import hosts, rules
    from deltallava_jax.parallel.mesh import compiler_options, held_rows, make_mesh, put_rows
    from tests import tiny

    def update(params, batch):
        loss, gradients = jax.value_and_grad(loss_of)(params, batch)
        return loss, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients)

    heads = dict.fromkeys(("vision.heads", "decoder.heads", "decoder.kv_heads"), "4")  # the axis tensor divides them
    cfg, results = override(tiny.get_config(), {f"model.{key}": value for key, value in heads.items()}), {}
    rows, plan, _ = tiny.make_run(cfg, Broken(training_source(cfg.data)))
    whole = list(elements(rows, plan, 0, STEPS, workers=0))
    for sizes in meshes:
        mesh = make_mesh(dataclasses.replace(cfg, mesh=MeshConfig(*sizes)), devices)
        params = make_params(cfg)
        placed = rules.shardings(params, mesh)
        put = lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])  # noqa: B023
        params = jax.tree.map(put, params, placed)
        step = jax.jit(
            update, out_shardings=(NamedSharding(mesh, P()), placed), compiler_options=compiler_options(mesh)
        )
        losses, faults = [], []
        for element, all_rows in zip(
            elements(rows, plan, 0, STEPS, workers=0, held=held_rows(mesh, plan.rows)), whole, strict=True
        ):
            batch = put_rows(element.batch, mesh)
            for ours, expected in zip(jax.tree.leaves(batch), jax.tree.leaves(all_rows.batch), strict=True):
                for shard in ours.addressable_shards:
                    np.testing.assert_array_equal(shard.data, expected[shard.index])
            loss, params = step(params, batch)
            losses.append(float(loss))
            faults += element.faults
        results[sizes] = losses, flatten(hosts.whole(params)), faults
    return results


if __name__ == "__main__":
    import jax

    folder, coordinator, processes, process = sys.argv[1:]
    jax.distributed.initialize(coordinator, int(processes), int(process))
    devices = jax.devices()
    # The devices of one process are not adjacent, nor are its rows.
    results = train([*devices[::2], *devices[1::2]])
    texts = [[losses, faults] for losses, _, faults in results.values()]
    (Path(folder) / f"{processes}.{process}.json").write_text(json.dumps(texts))
    if process == "0":
        arrays = {
            f"{number}/{path}": leaf
            for number, (_, params, _) in enumerate(results.values())
            for path, leaf in params.items()
        }
        np.savez(Path(folder) / f"{processes}.npz", **arrays)
