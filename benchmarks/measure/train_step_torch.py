"""A whole train step beside the same model in PyTorch, on a CPU: transformers' Llava with its sdpa attention.

    python -m benchmarks.measure.train_step_torch
    python -m benchmarks.measure.train_step_torch --widths 256 --rounds 3

CLIP's tower is frozen, LLaVA-1.5's MLP and a Llama decoder are trained: forward, backward, clipping of the gradient's
norm, AdamW, in float32, each side with as many threads as there are cores. Both start from the same weights, which
transformers makes and the converter reads; the losses of the first step are compared. Steps alternate.

"step": equal shapes, 4 rows of 271 tokens, 256 of them visual. "mixture": conversations a second on an instruction
mixture (data_loading.py) at 144 visual tokens an image: torch's batches padded to their longest conversation, as
LLaVA's are, against our packed rows."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.measure.data_loading import MIXTURE
from benchmarks.measure.timing import alternate, two_threads
from benchmarks.program import RESULTS, argument_parser, cores, numbers, origin, write_result

OUT = RESULTS / "train_step_torch.json"
ROWS, TEXT, GRID = 4, 16, 16  # a row: an image of 16 x 16 patches in a text of 16 tokens, the image's place included
VOCAB, LAYERS = 2048, 4
SHARE = sum(share for share, _, _, images in MIXTURE if images)
WITH_IMAGES = tuple((share / SHARE, low, high, images) for share, low, high, images in MIXTURE if images)
POOL, MIXTURE_GRID = 2048, 12  # conversations of the mixture, patches a side
PADDED, PACKED_ROWS, PACKED_LENGTH, BATCHES = 16, 4, 2048, 3


def torch_model(width: int, grid: int):
    """transformers' LLaVA with random weights."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    tower = CLIPVisionConfig(
        hidden_size=width // 2, intermediate_size=2 * width, num_hidden_layers=LAYERS, num_attention_heads=width // 64,
        image_size=14 * grid, patch_size=14,
    )  # fmt: skip
    decoder = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=LAYERS,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, rms_norm_eps=1e-5,
    )  # fmt: skip
    cfg = LlavaConfig(
        vision_config=tower, text_config=decoder, image_token_index=1, vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=grid**2, attn_implementation="sdpa",
    )  # fmt: skip
    return LlavaForConditionalGeneration(cfg).float()


class Theirs:
    """Train steps of transformers' model on padded batches."""

    def __init__(self, model):
        import torch

        self.model = model.train()
        model.model.vision_tower.requires_grad_(False)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.0, fused=True)

    def step(self, batch: dict) -> float:
        import torch

        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        return loss.item()


class Ours:
    """Train steps of our model from transformers' weights."""

    def __init__(self, folder: str, data: dict):
        import jax

        from deltallava_jax import config as c
        from deltallava_jax.convert.read import read
        from deltallava_jax.parallel.mesh import make_mesh
        from deltallava_jax.training.step import TrainStep, init_state

        found = read(Path(folder))
        model = replace(found.cfg, dtype="float32", remat="dots")
        self.cfg = c.Config(
            model=model, data=c.DataConfig(**data), optimizer=c.OptimizerConfig(lr=1e-4, frozen=("^vision/",))
        )
        mesh = make_mesh(self.cfg, jax.devices()[:1])
        self.train = TrainStep(self.cfg, mesh, 1000)
        placed = jax.tree.map(lambda x, leaf: jax.device_put(x, leaf.sharding), found.params, self.train.shapes.params)
        self.state = init_state(self.cfg, mesh, 1000, placed)
        self.mesh = mesh

    def put(self, batch):
        from deltallava_jax.parallel.mesh import put_rows

        return put_rows(batch, self.mesh)

    def step(self, batch, budget: int) -> float:
        self.state, values = self.train(self.state, batch, budget)
        return float(values["loss"])


def conversations(lengths, images, grid: int):
    """Random conversations of so many text tokens, an image at the first token of some: [(ids, pixels or None)]."""
    rng = np.random.default_rng(0)
    for length, count in zip(lengths, images, strict=True):
        ids = rng.integers(3, VOCAB, length).astype(np.int64)
        yield ids, rng.integers(0, 256, (14 * grid, 14 * grid, 3)).astype(np.uint8) if count else None


def padded_batch(records: list, visual: int) -> dict:
    """transformers' arguments: the second half of each text is supervised."""
    import torch

    from deltallava_jax.config import VisionConfig

    mean, std = (np.array(getattr(VisionConfig(), f"image_{name}"), np.float32) for name in ("mean", "std"))
    rows, pixels = [], []
    for ids, image in records:
        opened = ids
        if image is not None:
            opened = np.concatenate([np.full(visual, 1), ids[1:]])
            pixels.append(((image / 255 - mean) / std).transpose(2, 0, 1).astype(np.float32))
        target = np.where(np.arange(len(opened)) >= len(opened) - (len(ids) + 1) // 2, opened, -100)
        rows.append((opened, target))
    length = max(len(ids) for ids, _ in rows)
    fill = lambda row, value: np.pad(row, (0, length - len(row)), constant_values=value)
    batch = {
        "input_ids": np.stack([fill(ids, 0) for ids, _ in rows]),
        "labels": np.stack([fill(target, -100) for _, target in rows]),
        "attention_mask": np.stack([fill(np.ones(len(ids), np.int64), 0) for ids, _ in rows]),
    }
    batch = {name: torch.from_numpy(value) for name, value in batch.items()}
    return batch | ({"pixel_values": torch.from_numpy(np.stack(pixels))} if pixels else {})


def packed_batch(rows: list[list], text: int, images: int, side: int):
    """Our batch of the same conversations, several in a row."""
    from deltallava_jax.sequence import Batch

    batch = Batch.empty(len(rows), text, images, side)
    for row, records in enumerate(rows):
        start = placed = 0
        for segment, (ids, image) in enumerate(records, 1):
            end = start + len(ids)
            batch.tokens[row, start:end], batch.segments[row, start:end] = ids, segment
            batch.loss_mask[row, end - (len(ids) + 1) // 2 : end] = True
            if image is not None:
                batch.tokens[row, start] = 0
                batch.image_positions[row, placed], batch.images[row, placed] = start, image
                placed += 1
            start = end
    return batch


def sides(width: int, grid: int, data: dict):
    """(theirs, ours) with the same weights."""
    model = torch_model(width, grid)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Theirs(model), Ours(folder, data)


def equal_shapes(width: int, rounds: int) -> dict:
    theirs, ours = sides(width, GRID, dict(rows=ROWS, row_length=TEXT + GRID**2 - 1))
    records = list(conversations([TEXT] * ROWS, [1] * ROWS, GRID))
    batch = padded_batch(records, GRID**2)
    mine = ours.put(packed_batch([[one] for one in records], TEXT, 1, 14 * GRID))
    losses = theirs.step(batch), ours.step(mine, GRID**2)
    seconds = alternate({"torch": lambda: theirs.step(batch), "ours": lambda: ours.step(mine, GRID**2)}, rounds)
    middle = {name: float(np.median(found)) for name, found in seconds.items()}
    return {
        "what": "step", "width": width, "rows": ROWS, "tokens_a_row": TEXT + GRID**2 - 1,
        "first_losses": {"torch": round(losses[0], 4), "ours": round(losses[1], 4)},
        "seconds": {name: round(value, 4) for name, value in middle.items()},
        "ratio": round(middle["torch"] / middle["ours"], 3),
        "range": {name: [round(min(found), 4), round(max(found), 4)] for name, found in seconds.items()},
    }  # fmt: skip


def mixture(width: int, rounds: int) -> dict:
    """Conversations a second: torch's random padded batches of PADDED, and our packed rows of the same conversations.
    Those with an image, since batches without one are apart on both sides."""
    from benchmarks.measure.data_loading import draw
    from deltallava_jax.data.packing import PackPlan

    lengths, images = draw(WITH_IMAGES, POOL)
    records = list(conversations(lengths, images, MIXTURE_GRID))
    visual = MIXTURE_GRID**2
    theirs, ours = sides(width, MIXTURE_GRID, dict(rows=PACKED_ROWS, row_length=PACKED_LENGTH))
    plan = PackPlan(lengths, images, budgets=(visual,), rows=PACKED_ROWS, row_length=PACKED_LENGTH)
    planned = [plan.step(number) for number in range(plan.steps_for(1) - 1)]  # the last one has gaps
    shape = max(
        {(one.text, one.images) for one in planned}, key=lambda x: [(s.text, s.images) for s in planned].count(x)
    )
    same = [one for one in planned if (one.text, one.images) == shape][:BATCHES]
    packed = [
        ours.put(packed_batch([[records[i] for i in row] for row in one.rows], *shape, 14 * MIXTURE_GRID))
        for one in same
    ]
    held = sum(len(row) for one in same for row in one.rows)
    padded = [padded_batch(records[i : i + PADDED], visual) for i in range(0, PADDED * BATCHES, PADDED)]
    calls = {
        "torch": lambda: [theirs.step(batch) for batch in padded],
        "ours": lambda: [ours.step(batch, visual) for batch in packed],
    }
    seconds = alternate(calls, rounds)
    counts = {"torch": PADDED * BATCHES, "ours": held}
    speed = {name: [counts[name] / value for value in seconds[name]] for name in counts}
    middle = {name: float(np.median(found)) for name, found in speed.items()}
    return {
        "what": "mixture", "width": width, "visual_tokens": visual,
        "padded_batches": [list(batch["input_ids"].shape) for batch in padded],
        "packed_rows": [PACKED_ROWS, PACKED_LENGTH], "conversations": counts,
        "conversations_a_second": {name: round(value, 2) for name, value in middle.items()},
        "ratio": round(middle["ours"] / middle["torch"], 2),
        "range": {name: [round(min(found), 2), round(max(found), 2)] for name, found in speed.items()},
    }  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--widths", type=numbers, default=[256, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    two_threads()
    import torch

    torch.set_num_threads(2)
    made = origin(__spec__.name, sys.argv[1:], cores(), ("jax", "torch", "transformers"))
    results = []
    for measure in (equal_shapes, mixture):
        for width in options.widths:
            results.append(measure(width, options.rounds))
            print(json.dumps(results[-1]), flush=True)
            write_result(options.out, made | {"rounds": options.rounds, "results": results})


if __name__ == "__main__":
    main()
