"""The controls of easy-VQA: what an answer is worth without its image."""

import numpy as np
import pytest

from deltallava_jax.data import easy_vqa
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import ConfigError
from deltallava_jax.evaluation.easy_vqa import _pixels, derangement, evaluate
from tests import tiny


def test_a_derangement_gives_each_item_another_one_and_uses_all():
    for seed in range(20):
        items = list(range(10, 10 + seed + 2))
        other = derangement(items, seed)
        assert sorted(other) == sorted(other.values()) == items
        assert all(item != shown for item, shown in other.items())
    assert derangement(items, 1) == derangement(items, 1) != derangement(items, 2)


def test_the_shuffled_control_shows_another_test_images_picture():
    cfg = tiny.get_config()
    asked = list(range(40))
    shuffled, real = _pixels(cfg, asked, "shuffled"), _pixels(cfg, asked, "")
    assert not any(np.array_equal(a, b) for a, b in zip(shuffled, real, strict=True))
    every = {load_image(easy_vqa.image_path("test", i), 64, cfg.data.aspect).tobytes() for i in range(1000)}
    assert all(picture.tobytes() in every for picture in shuffled)
    np.testing.assert_array_equal(_pixels(cfg, asked[:3], "shuffled"), shuffled[:3])  # whatever else is asked
    noise = _pixels(cfg, asked, "noise")
    assert noise.shape == real.shape and not any(picture.tobytes() in every for picture in noise)


def test_an_unknown_control_is_refused():
    with pytest.raises(ConfigError, match="control 'blank'; known: shuffled, noise"):
        evaluate(None, tiny.get_config(), None, control="blank")
