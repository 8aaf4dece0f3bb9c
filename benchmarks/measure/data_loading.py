"""Images a second through our data pipeline and the PyTorch way, and how much of a batch is not padding, there and on
the mixture of lengths that an instruction data set has.

    python -m benchmarks.recipes.make_llava data/synthetic --records 3000
    python -m benchmarks.measure.data_loading data/synthetic --tokenizer tests/testdata/llama_tokenizer

The peer is what LLaVA's training does: torch's DataLoader, PIL, square padding, CLIP's image processor (Pillow), a
padded collator, one conversation a row. Both read the same records with as many workers and give the same pixels."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.program import RESULTS, argument_parser, cores, origin, write_result

BUDGET, ROW_LENGTH, BATCH = 144, 2048, 16  # two packed rows hold about as many conversations
WARM_UP = 12  # batches


class Padded:
    """LLaVA's LazySupervisedDataset: a record as ids and float pixels."""

    def __init__(self, folder: Path, records: list[int], tokenizer):
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        self.folder, self.entries = folder, json.loads((folder / "data.json").read_text())
        self.records, self.tokenizer = records, tokenizer
        size = dict(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
        self.processor = CLIPImageProcessorPil(**size)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, place):
        import torch
        from PIL import Image

        from deltallava_jax.data.conversation import TEMPLATES, read_turns, tokenize

        entry = self.entries[self.records[place]]
        images = entry.get("image", [])
        images = [images] if isinstance(images, str) else images
        conversation = read_turns(entry["conversations"], len(images))
        tokenized = tokenize(conversation, TEMPLATES["vicuna_v1"], self.tokenizer)
        pixels = []
        for name in images:
            image = Image.open(self.folder / name).convert("RGB")
            side = max(image.size)
            square = Image.new("RGB", (side, side), (122, 116, 104))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            pixels.append(self.processor(square, return_tensors="np")["pixel_values"][0])
        return torch.from_numpy(tokenized.ids), [torch.from_numpy(image) for image in pixels]


def collate(samples):
    import torch

    ids = torch.nn.utils.rnn.pad_sequence([ids for ids, _ in samples], batch_first=True)
    images = [image for _, images in samples for image in images]
    return ids, torch.stack(images) if images else None, [len(ids) for ids, _ in samples], len(images)


def peer(folder: Path, records: list[int], tokenizer, workers: int) -> dict:
    from torch.utils.data import DataLoader

    loader = DataLoader(Padded(folder, records, tokenizer), BATCH, num_workers=workers, collate_fn=collate)

    def count(batch):
        ids, pixels, lengths, images = batch
        live = sum(lengths) + images * (BUDGET - 1)
        return images, live, len(lengths) * (ids.shape[1] + (BUDGET - 1) * (pixels is not None))

    return measure(loader, count)


def ours(rows, workers: int) -> dict:
    from deltallava_jax.data.pipeline import elements

    plan = rows.plan((BUDGET,), 0)

    def count(element):
        batch = element.batch
        images = int((batch.image_positions < batch.tokens.shape[1]).sum())
        live = int((batch.segments > 0).sum()) + images * (BUDGET - 1)
        return images, live, batch.tokens.shape[0] * ROW_LENGTH

    return measure(elements(rows, plan, 0, plan.steps_for(1), workers=workers), count)


def measure(batches, count) -> dict:
    """Sums of count(batch) -> (images, live slots, slots). The clock runs from the first batches, when all workers have
    started and nothing is in stock, to the last one, and not until the workers have gone."""
    sums, began = np.zeros(3, int), None
    for number, batch in enumerate(batches):
        if began is not None:
            sums += count(batch)
        elif number + 1 == WARM_UP:
            began = time.perf_counter()
        ended = time.perf_counter()
    if not sums[0]:
        raise SystemExit(f"error: no batch is left after the first {WARM_UP}, in which workers start: more --records")
    images, live, slots = map(int, sums)
    return {"images": images, "seconds": ended - began, "live": live / slots}


# Share, text tokens from and to, images: questions, conversations, captions and boxes, text alone.
MIXTURE = ((0.62, 60, 400, 1), (0.24, 100, 600, 1), (0.08, 60, 200, 1), (0.06, 200, 2000, 0))


def draw(mixture: tuple, records: int) -> tuple[np.ndarray, np.ndarray]:
    """(text tokens, images) of random records."""
    rng = np.random.default_rng(0)
    kinds = [mixture[kind] for kind in rng.choice(len(mixture), records, p=[share for share, *_ in mixture])]
    return np.array([rng.integers(low, high + 1) for _, low, high, _ in kinds]), np.array([kind[3] for kind in kinds])


def live_share(budget: int, records: int = 20_000) -> dict[str, float]:
    """Slots that hold a token, of all: packed by our plan, and padded in random batches as the peer's."""
    from deltallava_jax.data.packing import PackPlan

    lengths, images = draw(MIXTURE, records)
    plan = PackPlan(lengths, images, budgets=(budget,), rows=16, row_length=ROW_LENGTH)
    slots = lengths + images * (budget - 1)
    padded = slots[: records // BATCH * BATCH].reshape(-1, BATCH)
    return {
        "packed": round(slots.sum() / (plan.steps_for(1) * plan.rows * ROW_LENGTH), 3),
        "padded": round(padded.sum() / (padded.max(axis=1) * BATCH).sum(), 3),
    }


def same_pixels(folder: Path, rows, records: list[int], tokenizer, count: int = 64) -> str:
    """How many images have the peer's pixels, of ``count`` without an EXIF orientation, which the peer ignores."""
    from PIL import Image

    from deltallava_jax.data.images import load_image

    data, equal, seen = Padded(folder, records, tokenizer), 0, 0
    mean, std = (np.array(data.processor.image_mean), np.array(data.processor.image_std))
    for place in range(len(records)):
        images = rows.source[place].images
        if seen == count or not images or Image.open(images[0]).getexif().get(0x0112, 1) != 1:
            continue
        theirs = data[place][1][0].numpy().transpose(1, 2, 0)
        theirs = np.rint((theirs * std + mean) * 255).astype(np.uint8)
        equal, seen = equal + np.array_equal(theirs, load_image(images[0], 336, "pad")), seen + 1
    return f"{equal} of {seen}"


class Chosen:
    """Some records of a source."""

    def __init__(self, source, records):
        self.source, self.records = source, records

    def __len__(self):
        return len(self.records)

    def __getitem__(self, index):
        return self.source[self.records[index]]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("folder", type=Path, help="made by recipes.make_llava")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--records", type=int, default=1500)
    parser.add_argument("--out", type=Path, default=RESULTS / "data_loading.json")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    from deltallava_jax.config import DataConfig, VisionConfig
    from deltallava_jax.data import tokens
    from deltallava_jax.data.images import load_image
    from deltallava_jax.data.llava_json import LlavaJson
    from deltallava_jax.data.pipeline import Rows
    from deltallava_jax.errors import BadSample

    tokenizer = tokens.load(options.tokenizer)
    source = LlavaJson(options.folder / "data.json", options.folder)
    sound = []
    for index in range(min(options.records, len(source))):  # the peer survives no broken record
        try:
            record = source[index]
            whole = sum(turn["value"].count("<image>") for turn in record.conversation) == len(record.images)
            if whole and all(turn["value"].strip() for turn in record.conversation):
                [load_image(image, 8) for image in record.images]
                sound.append(index)
        except BadSample:
            continue
    cfg = DataConfig(aspect="pad", template="vicuna_v1", rows=2, row_length=ROW_LENGTH)
    rows = Rows(Chosen(source, sound), tokenizer, cfg, VisionConfig())
    results = {"ours": [], "peer": []}
    for _ in range(2):  # in turns
        results["ours"].append(ours(rows, options.workers))
        results["peer"].append(peer(options.folder, sound, tokenizer, options.workers))
    rate = {name: max(run["images"] / run["seconds"] for run in runs) for name, runs in results.items()}
    report = {
        **origin(__spec__.name, sys.argv[1:], f"{cores()}, {options.workers} workers", packages=()),
        "records": len(sound),
        "images_per_second": {name: round(value, 1) for name, value in rate.items()},
        "ratio": round(rate["ours"] / rate["peer"], 2),
        "share_of_slots_that_hold_a_token": {name: round(runs[0]["live"], 3) for name, runs in results.items()},
        "the_same_of_the_stated_mixture": {str(budget): live_share(budget) for budget in (144, 36, 1)},
        "images_with_equal_pixels": same_pixels(options.folder, rows, sound, tokenizer),
    }  # fmt: skip
    write_result(options.out, report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
