"""The recipe's parts that need no package: configurations, the tower's training, the control."""

import dataclasses

import jax
import numpy as np
import pytest

from benchmarks.recipes import emoji_recipe, emoji_tower
from deltallava_jax.config import load_config
from deltallava_jax.convert.workdir import open_model
from deltallava_jax.errors import ConfigError
from deltallava_jax.models import systems

TINY = dataclasses.replace(emoji_tower.TOWER, image_size=16, width=32, layers=2, heads=2, mlp_width=64)


@pytest.mark.parametrize("system", sorted(set(emoji_recipe.TRAINED.values())))
def test_both_stages_load_and_fit_each_other(system):
    first, second = (load_config(f"configs/emoji.py:{system}-{stage}") for stage in ("pretrain", "finetune"))
    assert first.model == second.model and second.init_from == f"runs/{first.name}"
    assert set(systems.budgets(first.model.projector)) <= {16, 4, 1}
    assert first.optimizer.frozen == ("^vision/", "^decoder/") and second.optimizer.frozen == ("^vision/",)


def test_without_a_system_it_is_delta_and_others_are_refused():
    assert load_config("configs/emoji.py:finetune") == load_config("configs/emoji.py:delta-finetune")
    with pytest.raises(ConfigError, match="no system 'delta_7b'; did you mean 'delta'.; known: delta, mqt"):
        load_config("configs/emoji.py:delta_7b-pretrain")


def test_the_tower_learns_which_name_is_a_pictures(tmp_path):
    """Squares of a colour; the second drawing of each is lighter and elsewhere."""
    colours = [(230, 30, 30), (30, 200, 30), (30, 30, 230), (30, 30, 30), (230, 200, 20), (220, 30, 200)]
    drawn = np.full((2, len(colours), 16, 16, 3), 255, np.uint8)
    for sign, colour in enumerate(colours):
        drawn[0, sign, 3:13, 3:13] = colour
        drawn[1, sign, 1:9, 4:12] = np.minimum(np.array(colour) + 20, 255)
    names = np.arange(len(colours))
    texts = np.random.default_rng(0).normal(size=(len(colours), 12)).astype(np.float32)
    trained, losses = emoji_tower.train(drawn[0], names, texts, steps=80, cfg=TINY, lr=3e-3, shift=3.0)
    assert len(losses) == 80 and np.mean(losses[-10:]) < 0.5 * np.log(len(colours))  # the logarithm: chance
    of = lambda names: emoji_tower.accuracy(trained, drawn[1], names, texts, TINY)
    assert of(names) >= 0.8 and of(np.roll(names, 1)) <= 0.2
    emoji_tower.write(trained["tower"], tmp_path / "tower", TINY)
    read = open_model(tmp_path / "tower")
    assert read.cfg.vision == TINY and read.cfg.decoder is None
    jax.tree.map(np.testing.assert_array_equal, read.params["vision"], trained["tower"])


def test_the_control_gives_every_name_another_picture():
    records = [dict(id=str(number), image=f"{number}.png") for number in range(50)]
    mixed = emoji_recipe.shuffled(records)
    assert [each["id"] for each in mixed] == [each["id"] for each in records]
    assert sorted(each["image"] for each in mixed) == sorted(each["image"] for each in records)
    assert all(a["image"] != b["image"] for a, b in zip(mixed, records, strict=True))


def test_answers_are_scored_against_their_own_names_and_those_of_others():
    names = ["dog face", "grinning face", "flag of chad", "fire"]
    right, moved = emoji_recipe.scores(names, names), emoji_recipe.scores(names[1:] + names[:1], names)
    assert right["exact"] == 1 and 0 < right["cider"] < 1000 and right["cider_of_others"] < 0.2 * right["cider"]
    # Of three moves one brings every answer back to its name.
    assert moved["exact"] == 0 and moved["cider_of_others"] > right["cider"] / 3
    same = emoji_recipe.scores(["flag of chad"] * 4, names)  # independent of the image
    assert same["exact"] == 0.25 and same["cider"] == pytest.approx(same["cider_of_others"])
