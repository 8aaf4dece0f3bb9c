"""Emoji with their names as LLaVA data.

    python -m benchmarks.recipes.emoji --out data/emoji

From the npm packages emoji-datasource-google, -twitter and -facebook (MIT), which draw the same signs in three styles.
Two styles train, the third is the test (--held-out facebook). Writes OUT/images, and as LLaVA's records
    pretrain.json   stage 1: a picture and its name
    finetune.json   stage 2: its name, and its group or whether it is a thing that is named
    test.json       [{"image", "question", "answer"}]: the names of the held-out style
What is there already is kept: the same command goes on. emoji_recipe.py takes them through both stages; any other
configuration does with --config.data.json=data/emoji/pretrain.json --config.data.images=data/emoji/images.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.program import argument_parser
from deltallava_jax.progress import progress_bar

STYLES = ("google", "twitter", "facebook")
VERSION = "16.0.0"
NAME, GROUP, WHETHER = "What is this?", "Which group does it belong to?", "Is this {}?"


def package(style: str, folder: Path) -> Path:
    """The package's archive, fetched by npm unless it is there."""
    name = f"emoji-datasource-{style}-{VERSION}.tgz"
    path, partial = folder / name, folder / "partial"
    if not path.exists():
        partial.mkdir(parents=True, exist_ok=True)
        print(f"fetching {name}", file=sys.stderr, flush=True)
        command = ["npm", "pack", "--silent", f"emoji-datasource-{style}@{VERSION}", "--pack-destination", str(partial)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            sys.exit(f"npm is not installed; put {name} (npmjs.com) into {folder}")
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr[-500:]}")
        (partial / name).rename(path)
    return path


def signs(archive: Path) -> list[dict]:
    """{"file", "name", "group"} of every sign that all styles draw, each name once, in a fixed order."""
    with tarfile.open(archive) as tar:
        listed = json.load(tar.extractfile("package/emoji.json"))
    found = {}
    for sign in listed:
        if all(sign[f"has_img_{style}"] for style in STYLES) and sign["name"] and sign["category"] != "Component":
            name, group = sign["name"].lower(), sign["category"].lower()
            found.setdefault(name, dict(file=sign["image"], name=name, group=group))
    return sorted(found.values(), key=lambda sign: sign["file"])


def draw(style: str, archive: Path, wanted: list[dict], folder: Path) -> None:
    """FOLDER/STYLE/FILE: the pictures of 64 x 64 on white; what they show where they are transparent is anything."""
    target = folder / style
    target.mkdir(parents=True, exist_ok=True)
    missing = {f"package/img/{style}/64/{sign['file']}": sign["file"] for sign in wanted}
    missing = {member: file for member, file in missing.items() if not (target / file).exists()}
    if not missing:
        return
    with tarfile.open(archive) as tar:
        for member in progress_bar(tar, style, unit="files"):
            if member.name not in missing:
                continue
            image = Image.open(io.BytesIO(tar.extractfile(member).read())).convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            partial = target / "partial.png"
            Image.alpha_composite(white, image).convert("RGB").resize((64, 64), Image.Resampling.BICUBIC).save(partial)
            partial.rename(target / missing.pop(member.name))
    if missing:
        sys.exit(f"{archive} lacks {len(missing)} pictures, {next(iter(missing))} among them")


def records(wanted: list[dict], styles: list[str], seed: int) -> tuple[list[dict], list[dict]]:
    """(stage 1, stage 2): LLaVA's records. The second question of stage 2 is in turn one of three."""
    rng = np.random.default_rng(seed)
    captions, talks = [], []
    for style in styles:
        for number, sign in enumerate(wanted):
            image, key = f"{style}/{sign['file']}", f"{style}-{sign['file'].removesuffix('.png')}"
            ask = lambda *pairs: [
                {"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)
            ]
            captions.append(dict(id=key, image=image, conversations=ask((f"<image>\n{NAME}", sign["name"]))))
            other = wanted[(number + int(rng.integers(1, len(wanted)))) % len(wanted)]["name"]
            others = [(GROUP, sign["group"]), (WHETHER.format(sign["name"]), "yes"), (WHETHER.format(other), "no")]
            pairs = [(NAME, sign["name"]), others[number % 3]]
            pairs = [pairs[place] for place in rng.permutation(len(pairs))]
            pairs[0] = (f"<image>\n{pairs[0][0]}", pairs[0][1])
            talks.append(dict(id=key, image=image, conversations=ask(*pairs)))
    return captions, talks


def build(out: Path, held_out: str, seed: int = 0, limit: int = 0) -> dict[str, int]:
    """Writes the data set; how many records each file has. limit: only so many signs, spread over all."""
    archives = {style: package(style, out / "packages") for style in STYLES}
    wanted = signs(archives[STYLES[0]])
    if limit and limit < len(wanted):
        wanted = [wanted[place] for place in np.linspace(0, len(wanted) - 1, limit).astype(int)]
    for style, archive in archives.items():
        draw(style, archive, wanted, out / "images")
    captions, talks = records(wanted, [style for style in STYLES if style != held_out], seed)
    test = [dict(image=f"{held_out}/{sign['file']}", question=NAME, answer=sign["name"]) for sign in wanted]
    written = dict(pretrain=captions, finetune=talks, test=test)
    for name, content in written.items():
        (out / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")
    return {name: len(content) for name, content in written.items()}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--held-out", choices=STYLES, default="facebook")
    parser.add_argument("--limit", type=int, default=0, metavar="N", help="only so many signs")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    print(build(options.out, options.held_out, options.seed, options.limit))


if __name__ == "__main__":
    main()
