"""A synthetic LLaVA data set in the layout of the 665k mixture, with planted faults: to try pipelines on.

    python -m benchmarks.recipes.make_llava data/synthetic --records 3000

Writes OUT/data.json, the images in the five folders of the original, and OUT/planted.json: how many records carry each
fault, and how many carry something odd that is no fault. Lengths follow a stated mixture: 62 % questions of 60 to 400
text tokens, 24 % conversations of 100 to 600, 8 % captions of 60 to 200, 6 % text alone of 200 to 2,000."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.program import argument_parser

FOLDERS = ("coco/train2017", "gqa/images", "ocr_vqa/images", "textvqa/train_images", "vg/VG_100K", "vg/VG_100K_2")
MIXTURE = ((0.62, 60, 400, 6), (0.24, 100, 600, 3), (0.08, 60, 200, 1), (0.06, 200, 2000, 4))  # share, tokens, rounds
# What makes a record useless, and what only looks as if it did.
FAULTS = ("truncated", "empty_file", "missing", "outside", "empty_turn", "extra_marker", "bomb", "not_an_image")
ODDITIES = (
    "gif_as_jpg",
    "cmyk",
    "palette",
    "grey",
    "rgba",
    "rotated",
    "long",
    "two_images",
    "marker_last",
    "gpt_first",
)
WORDS = (
    "the a of on in with under near red blue green small large old wooden bright dark man woman dog cat bus train "
    "table window street tree river mountain sign plate book phone is are sits stands holds shows reads left right "
    "there what how many which colour describe answer question picture image behind before above"
).split()


def make(folder: Path, records: int, seed: int = 0, each: int = 3) -> dict[str, int]:
    """Writes the data set, ``each`` records of every fault and every oddity. Returns how many of each were planted."""
    rng = np.random.default_rng(seed)
    special = [*FAULTS, *ODDITIES] * each
    kinds = special + ["sound"] * (records - len(special))
    rng.shuffle(kinds)
    for name in FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    entries = [_entry(folder, number, kind, rng) for number, kind in enumerate(kinds)]
    (folder / "data.json").write_text(json.dumps(entries))
    planted = dict(Counter(kinds))
    (folder / "planted.json").write_text(json.dumps(planted, indent=2) + "\n")
    return planted


def _entry(folder: Path, number: int, kind: str, rng) -> dict:
    share, low, high, rounds = MIXTURE[rng.choice(len(MIXTURE), p=[part[0] for part in MIXTURE])]
    text_only = kind == "sound" and high == 2000
    words = int(rng.integers(low, high) * 0.8)
    if kind == "long":
        words, rounds = 5000, 8
    turns = []
    for _ in range(rounds):
        turns.append({"from": "human", "value": _sentence(rng, words // (2 * rounds)) + "?"})
        turns.append({"from": "gpt", "value": _sentence(rng, words // (2 * rounds)) + "."})
    entry = {"id": f"{number:09d}", "conversations": turns, "model": ""}
    if text_only:
        return entry
    images = [_image(folder, number, kind, rng)]
    if kind == "two_images":
        images.append(_image(folder, number, "sound", rng, "b"))
    markers = "<image>\n" * (len(images) + (kind == "extra_marker"))
    first = turns[0]
    first["value"] = f"{first['value']}\n<image>" if kind == "marker_last" else markers + first["value"]
    if kind == "empty_turn":
        for turn in turns[1::2]:
            turn["value"] = " "
    if kind == "gpt_first":
        turns.insert(0, {"from": "gpt", "value": "Hello!"})
    if kind == "missing":
        (folder / images[0]).unlink()
    if kind == "outside":
        images = [f"../{images[0]}"]
    return entry | {"image": images[0] if len(images) == 1 else images}


def _sentence(rng, words: int) -> str:
    return " ".join(rng.choice(WORDS, max(words, 3)))


def _image(folder: Path, number: int, kind: str, rng, suffix: str = "") -> str:
    """Draws an image of that kind and returns its path below the folder."""
    name = f"{FOLDERS[number % len(FOLDERS)]}/{number:012d}{suffix}.{'png' if number % 7 == 0 else 'jpg'}"
    size = (640, 480) if rng.random() < 0.6 else tuple(map(int, rng.integers(48, 900, 2)))
    picture, path, options = _picture(size, rng), folder / name, {}
    if kind == "bomb":
        Image.new("1", (20_000, 20_000)).save(path, format="PNG")
        return name
    if kind == "not_an_image":
        path.write_text("<html>404 Not Found</html>")
        return name
    if kind == "empty_file":
        path.write_bytes(b"")
        return name
    mode = {"cmyk": "CMYK", "palette": "P", "grey": "L", "rgba": "RGBA"}.get(kind)
    picture = picture.convert(mode) if mode else picture
    form = "GIF" if kind == "gif_as_jpg" else "PNG" if kind in ("palette", "rgba") else "JPEG"
    if form == "JPEG" and name.endswith("png") and kind not in ("cmyk", "rotated"):
        form = "PNG"
    if kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = 6
        options["exif"] = exif
    picture.save(path, format=form, **options)
    if kind == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    return name


def _picture(size: tuple[int, int], rng) -> Image.Image:
    """A gradient with shapes and a little noise: compresses as a photograph does."""
    width, height = size
    across, down = np.linspace(0, 1, width)[None, :, None], np.linspace(0, 1, height)[:, None, None]
    colours = rng.integers(0, 256, (3, 3))
    pixels = colours[0] * (1 - across) + colours[1] * across * (1 - down) + colours[2] * across * down
    pixels = np.clip(pixels + rng.normal(0, 6, (height, width, 1)), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture)
    for _ in range(int(rng.integers(2, 9))):
        a, b = np.sort(rng.integers(0, width, 2)), np.sort(rng.integers(0, height, 2))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([int(a[0]), int(b[0]), int(a[1]), int(b[1])], fill=tuple(map(int, rng.integers(0, 256, 3))))
    return picture


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--records", type=int, default=3000)
    parser.add_argument("--each", type=int, default=5, help="records of each fault and oddity")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    planted = make(options.out, options.records, options.seed, options.each)
    print(f"{options.out}: {options.records:,} records, {sum(planted.get(kind, 0) for kind in FAULTS)} of them faulty")


if __name__ == "__main__":
    main()
