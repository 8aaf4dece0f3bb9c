"""The emoji data set from small archives of the packages' form."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from benchmarks.recipes import emoji
from deltallava_jax.config import DataConfig
from deltallava_jax.data.sources import training_source

SIGNS = [
    ("1f600", "GRINNING FACE", "Smileys & Emotion"),
    ("1f436", "DOG FACE", "Animals & Nature"),
    ("1f1e6", "Andorra Flag", "Flags"),
    ("1f3fb", "SKIN TONE", "Component"),
    ("1f43a", "DOG FACE", "Symbols"),
]


@pytest.fixture
def packages(tmp_path):
    folder = tmp_path / "out" / "packages"
    folder.mkdir(parents=True)
    for style in emoji.STYLES:
        with tarfile.open(folder / f"emoji-datasource-{style}-{emoji.VERSION}.tgz", "w:gz") as tar:

            def add(name, content, tar=tar):
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

            drawn = {f"has_img_{each}": True for each in emoji.STYLES}
            listed = [dict(name=name, image=f"{code}.png", category=group, **drawn) for code, name, group in SIGNS]
            listed.append(dict(listed[0], image="0.png", name="ONLY GOOGLE") | {"has_img_twitter": False})
            add("emoji.json", json.dumps(listed).encode())
            for code, *_ in SIGNS:
                pixels = np.zeros((64, 64, 4), np.uint8)
                pixels[:32] = (255, 0, 0, 255)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                add(f"img/{style}/64/{code}.png", file.getvalue())
    return tmp_path / "out"


def test_records_pictures_and_the_style_that_is_held_out(packages, capsys):
    assert emoji.build(packages, "twitter") == dict(pretrain=6, finetune=6, test=3)
    stage1, stage2, test = (json.loads((packages / f"{n}.json").read_text()) for n in ("pretrain", "finetune", "test"))
    names = {"grinning face", "dog face", "andorra flag"}
    assert {record["conversations"][1]["value"] for record in stage1} == names
    assert all(each["image"].startswith("twitter/") for each in test) and {each["answer"] for each in test} == names
    assert not any(record["image"].startswith("twitter") for record in stage1 + stage2)
    seconds = []
    for record in stage2:
        turns = [turn["value"] for turn in record["conversations"]]
        assert turns[0].startswith("<image>\n") and len(turns) == 4
        asked = {
            question.removeprefix("<image>\n"): answer for question, answer in zip(turns[::2], turns[1::2], strict=True)
        }
        name = asked.pop(emoji.NAME)
        ((question, answer),) = asked.items()
        named = emoji.WHETHER.format(name)
        assert {"yes": question == named, "no": question != named}.get(answer, question == emoji.GROUP)
        seconds.append(answer if answer in ("yes", "no") else "group")
    assert sorted(seconds) == ["group", "group", "no", "no", "yes", "yes"]
    pixels = np.asarray(Image.open(packages / "images" / "google" / "1f600.png"))
    assert pixels.shape == (64, 64, 3) and (pixels[0, 0] == (255, 0, 0)).all() and (pixels[-1, 0] == 255).all()
    source = training_source(DataConfig(
        dataset="llava", json=(str(packages / "finetune.json"),), images=str(packages / "images")))  # fmt: skip
    assert len(source) == 6


def test_the_same_command_resumes(packages):
    emoji.build(packages, "facebook")
    first = (packages / "finetune.json").read_bytes()
    kept, lost = (packages / "images" / "google" / name for name in ("1f600.png", "1f436.png"))
    before = kept.stat().st_mtime_ns
    lost.unlink()
    emoji.build(packages, "facebook")
    assert lost.is_file() and kept.stat().st_mtime_ns == before
    assert (packages / "finetune.json").read_bytes() == first
    assert emoji.build(packages, "facebook", limit=2)["test"] == 2
