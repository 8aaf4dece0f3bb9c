"""What benchmarks/measure/train_speed.py makes of measured steps: batches, rates and ratios by hand."""

import numpy as np
import pytest

from benchmarks.measure import train_speed
from benchmarks.measure.data_loading import draw


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_an_epoch_counts_what_the_records_hold(layout):
    cfg = train_speed.config("small", "finetune", 16, layout, 1)
    load = train_speed.Load(cfg, "finetune", 16, records=600)
    lengths, images = draw(train_speed.mixture("finetune", 16), 600)
    kept = [record for step in load.steps for row in step.rows for record in row]
    assert images.all() and len(set(kept)) == len(kept) == load.epoch["conversations"] == load.epoch["images"] > 560
    assert load.epoch["tokens"] == lengths[kept].sum() + 15 * len(kept)  # no record is longer than a row
    slots = sum(cfg.data.rows * (step.text + 15 * step.images) for step in load.steps)
    assert load.live == pytest.approx(load.epoch["tokens"] / slots)
    batch = load.batch()
    assert (batch.segments > 0).sum() == lengths[[r for row in load.first.rows for r in row]].sum()
    placed = batch.image_positions < load.text
    assert placed.sum() == sum(map(len, load.first.rows))
    assert (np.take_along_axis(batch.tokens, batch.image_positions * placed, 1)[placed] == 0).all()


def test_stage_2_takes_its_share_of_records_without_an_image():
    rate = lambda value: {"conversations_a_second": value}
    results = {("finetune", 576, "packed"): rate(2.0), ("finetune", 0, "packed"): rate(4.0)}
    seconds = train_speed.seconds_a_conversation(results, "finetune", 576, "packed")
    assert train_speed.TEXT_SHARE == pytest.approx(0.06) and seconds == pytest.approx(0.94 / 2 + 0.06 / 4)
    assert train_speed.seconds_a_conversation(results, "finetune", 576, "padded") is None
    del results["finetune", 0, "packed"]
    assert train_speed.seconds_a_conversation(results, "finetune", 576, "packed") is None
    results = {("pretrain", 576, "packed"): rate(8.0)}
    assert train_speed.seconds_a_conversation(results, "pretrain", 576, "packed") == 1 / 8


def test_the_decoder_gets_the_layers_that_a_device_holds():
    whole = train_speed.config("vicuna_7b", "finetune", 144, "packed", 1)
    assert 6.6e9 * 16 < train_speed.state_bytes(whole) < 7.1e9 * 16  # float32: weights, two moments, gradients
    on = lambda stage, gib, layout: train_speed.config("vicuna_7b", stage, 144, layout, 1, gib * 2**30)
    layers = lambda stage, gib, layout="packed": on(stage, gib, layout).model.decoder.layers
    assert layers("finetune", 75) == 16 and layers("finetune", 132) == 32
    assert layers("finetune", 75, "padded") == 16 and layers("finetune", 132, "padded") == 28  # gradients twice
    assert layers("pretrain", 75) == 32
