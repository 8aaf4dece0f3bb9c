"""Every command with missing, unreadable and bad arguments: one line, exit code 2, no traceback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import train as training
from deltallava_jax import __main__ as commands
from deltallava_jax import cli

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "testdata" / "v1"
EASY_VQA = ROOT / "configs" / "easy_vqa.py"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a trained workdir, data and pictures, and everything that can be wrong with a file."""
    home = tmp_path_factory.mktemp("home")
    for name in ("first", "pictures"):
        shutil.copytree(DATA / name, home / name)
    for name in ("records.json", "config.py"):
        shutil.copy(DATA / name, home)
    (home / "folder").mkdir()
    (home / "text").write_text("hello\n")
    (home / "binary").write_bytes(bytes(range(256)))
    (home / "cut.json").write_text('[{"id": "1", "conversations": [')
    (home / "broken.py").write_text("def get_config():\n    return 1 +\n")
    (home / "wrong.py").write_text("def get_config():\n    return nowhere\n")
    (home / "binary.py").write_bytes(bytes(range(256)))
    (home / "none.py").write_text("x = 1\n")
    (home / "bare").mkdir()
    (home / "bare" / "config.json").write_text('{"model_type": ')
    (home / "weights").mkdir()
    (home / "weights" / "config.json").write_text('{"model_type": "llama"}')
    (home / "weights" / "model.safetensors").write_bytes(bytes(range(256)))
    shutil.copy(home / "pictures" / "red_circle.png", home / "red.png")
    for name, file, content in (
        ("cut_config", "config.json", b'{"name": '),
        ("binary_config", "config.json", bytes(range(256))),
        ("no_config", "config.json", None),
        ("list_config", "config.json", b"[]"),
        ("binary_tokenizer", "tokenizer.json", bytes(range(256))),
        ("no_tokenizer", "tokenizer.json", None),
        ("no_checkpoint", "checkpoints/4", None),
        ("no_params", "checkpoints/4/params/_METADATA", None),
    ):
        broken = shutil.copytree(home / "first", home / name)
        if content is not None:
            (broken / file).write_bytes(content)
        elif (broken / file).is_dir():
            shutil.rmtree(broken / file)
        else:
            (broken / file).unlink()
    return home


def main_of(arguments: list[str]):
    """What a command line of ``python`` runs."""
    program, *rest = arguments
    if program == "train.py":
        return lambda: training.main(*training.parse(rest))
    if program == "eval.py":
        return lambda: evaluation.main(evaluation.parse(rest))
    options = commands.parse(arguments)
    return lambda: options.main(options)


TRAIN = "train.py --workdir new --config"
OWN = f"{TRAIN} config.py --config.data.rows=8"  # its data are the records and pictures of the folder
GO_ON = "train.py --config config.py --config.data.rows=8 --config.data.aspect=square --workdir"
CHECK = "data check --workers 1 --tokenizer first --template brief --json"
MODEL = "nowhere text folder bare weights cut_config binary_config no_checkpoint no_params".split()
ASK = "gradcam --prompt what? --out heat.png --image"

# A command line -> words of its one line.
REFUSED = {
    f"{TRAIN} nowhere.py": "nowhere.py",
    f"{TRAIN} folder": "folder",
    f"{TRAIN} text": "text",
    f"{TRAIN} binary.py": "binary.py",
    f"{TRAIN} broken.py": "line 2",
    f"{TRAIN} wrong.py": "NameError: name 'nowhere' is not defined",
    f"{TRAIN} none.py": "get_config",
    f"{TRAIN} config.py:stage": "get_config(stage)",
    f"{OWN} --lr=1": "--lr",
    f"{OWN} --config.optimizer.lrr=1": "did you mean 'lr'",
    f"{OWN} --config.optimizer.lr=abc": "optimizer.lr",
    f"{OWN} --config.optimizer=nowhere": "no OptimizerConfig preset 'nowhere'",
    f"{OWN} --config.data.rows=0": "data.rows=0",
    f"{OWN} --config.data.template=nowhere": "nowhere",
    f"{OWN} --config.data.json=nowhere.json": "nowhere.json",
    f"{OWN} --config.data.json=folder": "folder",
    f"{OWN} --config.data.json=binary": "binary",
    f"{OWN} --config.data.json=cut.json": "cut.json",
    f"{OWN} --config.data.json=text": "text",
    f"{OWN} --config.data.images=nowhere": "data.images='nowhere'",
    f"{OWN} --config.data.images=text": "data.images='text'",
    f"{OWN} --config.data.array_record=nowhere": "nowhere",
    f"{OWN} --config.data.array_record=folder": "folder",
    f"{OWN} --config.data.turns=2": "a setting of data.dataset=easy_vqa, but data.dataset is 'llava'",
    f"{TRAIN} {EASY_VQA} --config.data.json=records.json": "is a setting of data.dataset=llava",
    f"{TRAIN} {EASY_VQA} --config.data.images=pictures": "is a setting of data.dataset=llava",
    f"{TRAIN} {EASY_VQA} --config.data.array_record=nowhere": "is a setting of data.dataset=llava",
    f"{TRAIN} {EASY_VQA} --config.data.dataset=nowhere --config.data.rows=8": "nowhere",
    f"{OWN} --config.init_from=nowhere": "config.init_from=nowhere",
    f"{OWN} --config.init_from=text": "config.init_from=text",
    f"{OWN} --config.init_from=no_checkpoint": "no_checkpoint holds no finished checkpoint",
    f"{OWN} --config.init_from=cut_config": "cut_config/config.json",
    f"{OWN} --config.init_from=no_tokenizer": "no_tokenizer/tokenizer.json is missing",
    f"{OWN} --config.mesh.tensor=3": "tensor=3",
    f"{OWN} --profile 3": "--profile 3",
    f"{GO_ON} text": "text",
    f"{GO_ON} text/new": "text/new",
    f"{GO_ON} cut_config": "cut_config/config.json",
    f"{GO_ON} binary_config": "binary_config/config.json",
    f"{GO_ON} list_config": "list_config/config.json",
    f"{GO_ON} no_config": "no_config holds no config.json",
    f"{GO_ON} binary_tokenizer": "binary_tokenizer/tokenizer.json",
    f"{GO_ON} no_tokenizer": "no_tokenizer/tokenizer.json is missing",
    f"{GO_ON} first --config.model.decoder.heads=1": "model.decoder.heads",
    f"{GO_ON} first --config.data.aspect=pad": "Resume with --config.data.aspect=square",
    "eval.py --workdir nowhere": "nowhere",
    "eval.py --workdir text": "text",
    "eval.py --workdir folder": "folder",
    "eval.py --workdir cut_config --tasks easy_vqa": "cut_config/config.json",
    "eval.py --workdir binary_config --tasks easy_vqa": "binary_config/config.json",
    "eval.py --workdir binary_tokenizer --tasks easy_vqa": "binary_tokenizer/tokenizer.json",
    "eval.py --workdir no_checkpoint --tasks easy_vqa": "holds no finished checkpoint",
    "eval.py --workdir no_params --tasks easy_vqa": "no_params",
    "eval.py --workdir first": "llava",  # what it was trained on is no task
    "eval.py --workdir first --tasks nowhere": "nowhere",
    "eval.py --workdir first --tasks easy_vqa --budgets 9": "9",
    "eval.py --workdir first --tasks easy_vqa --budgets few": "few",
    "eval.py --workdir first --tasks easy_vqa --config.data.template=nowhere": "data.template is 'nowhere'",
    "eval.py --workdir first --tasks easy_vqa --limit -5": "--limit -5",
    "eval.py --workdir first --tasks easy_vqa --batch 0": "--batch 0",
    "eval.py --workdir first --tasks easy_vqa --config.model.fastv.keep=few": "model.fastv",
    f"{CHECK} nowhere.json --images pictures": "nowhere.json",
    f"{CHECK} folder --images pictures": "folder",
    f"{CHECK} binary --images pictures": "binary",
    f"{CHECK} cut.json --images pictures": "cut.json",
    f"{CHECK} records.json --images pictures --tokenizer nowhere": "nowhere",
    f"{CHECK} records.json --images pictures --tokenizer text": "text",
    f"{CHECK} records.json --images pictures --tokenizer binary": "binary",
    f"{CHECK} records.json --images pictures --template nowhere": "nowhere",
    f"{CHECK} records.json --images pictures --row-length 3": "row_length=3",
    f"{CHECK} records.json --images pictures --report nowhere/report.json": "nowhere/report.json",
    "data build --json nowhere.json --images pictures --out new": "nowhere.json",
    "data build --json records.json --images pictures --out text": "text",
    "convert nowhere new": "nowhere",
    "convert text new": "text",
    "convert folder new": "folder",
    "convert bare new": "bare",
    "convert weights new": "weights",
    "convert binary new": "binary",
    "convert cut_config new": "cut_config/config.json",
    "convert no_checkpoint new": "holds no finished checkpoint",
    "convert no_params new": "no_params",
    "convert first text": "text",
    "convert first folder/../first": "first",
    "convert first text/new": "text",
    "convert first --vision nowhere new": "--vision",
    "convert first new --set scale_factor": "--set scale_factor",
    "convert first new --set nowhere=1": "nowhere",
    "convert first new --scale-factor 3": "3",
    "convert --vision nowhere --decoder first --projector delta new": "nowhere",
    "convert --vision first --decoder nowhere --projector delta new": "nowhere",
    "convert --vision first --decoder first --projector nowhere new": "nowhere",
    "convert --vision first --decoder first --config nowhere.py new": "nowhere.py",
    "convert first": "a source and a destination",
    "plan --target cpu:8 --config nowhere.py": "nowhere.py",
    "plan --target cpu:8 --config binary.py": "binary.py",
    "plan --target moon:8 --config config.py": "moon:8",
    "plan --target cpu:8 --mesh data=few --config config.py": "--mesh data=few",
    "plan --target cpu:8 --mesh data=3 --config config.py": "data=3",
    "plan --target cpu:8 --config config.py --config.nowhere=1": "nowhere",
    **{f"{command} {model}": model for command in ("chat", "serve") for model in ("nowhere", "text", "no_checkpoint")},
    "chat first --image nowhere.png": "nowhere.png",
    "chat first --image text": "text",
    "chat first --image folder": "folder",
    "chat first --budget 9": "9",
    "chat first --temperature -1": "temperature",
    "chat first --max-new-tokens 0": "max_new_tokens",
    "chat first --tensor 99": "99",
    "chat first --tensor 0": "tensor",
    "serve first --tensor 99": "99",
    "serve first --slots 0": "slots",
    "serve first --context 0": "context",
    "config show nowhere.py": "nowhere.py",
    "config show config.py --config.optimizer.lrr=1": "did you mean 'lr'",
    "train.py --config nowhere.py --help": "nowhere.py",
    "flops --config nowhere.py": "nowhere.py",
    "flops --config text": "text",
    "flops --config none.py": "none.py",
    "flops --tower nowhere": "nowhere",
    "flops --systems nowhere": "nowhere",
    "flops --budgets few": "few",
    "flops --budgets 7": "7",
    "flops --text 0": "--text 0",
    **{f"{ASK} red.png {model}": model for model in MODEL},
    f"{ASK} nowhere.png first": "nowhere.png",
    f"{ASK} text first": "text",
    f"{ASK} folder first": "folder",
    f"{ASK} red.png first --budgets 9": "9",
    f"{ASK} red.png first --budgets few": "few",
    f"{ASK} red.png first --out heat.jpg": "heat.jpg",
}


def assert_one_line(code: int, err: str, words: str) -> None:
    lines = [line for line in err.splitlines() if not line.startswith("loading ")]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0], err


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_wrong_is_one_line(home, monkeypatch, capfd, line):
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "stdin", None)  # no interactive input
    before = sorted(home.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        cli.run(main_of(line.split()))
    assert_one_line(stopped.value.code, capfd.readouterr().err, REFUSED[line])
    shutil.rmtree(home / "new", ignore_errors=True)  # a run's own folder may have been begun
    assert sorted(home.rglob("*")) == before, "something was made"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("line", ["eval.py --workdir closed", f"{TRAIN} closed/config.py", "convert closed new"])
def test_what_may_not_be_read_is_one_line(home, tmp_path, monkeypatch, capfd, line):
    monkeypatch.chdir(home)
    closed = home / "closed"
    closed.mkdir(mode=0)
    try:
        with pytest.raises(SystemExit) as stopped:
            cli.run(main_of(line.split()))
    finally:
        closed.rmdir()
    assert_one_line(stopped.value.code, capfd.readouterr().err, "closed")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (f"train.py --config {EASY_VQA} --workdir text", "text"),
        ("eval.py --workdir binary_config", "binary_config/config.json"),
        ("-m deltallava_jax demo nowhere", "error: "),  # also where gradio is not installed
        ("-m deltallava_jax gradcam first --prompt what? --image nowhere.png --out heat.png", "nowhere.png"),
    ],
)
def test_in_a_separate_process(home, line, words):
    program, *rest = line.split()
    command = [sys.executable, str(ROOT / program) if program.endswith(".py") else program, *rest]
    done = subprocess.run(
        command, cwd=home, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert_one_line(done.returncode, done.stderr, words)


@pytest.mark.parametrize(
    "line", ["serve first --port 99999", "demo first --port -1", "chat first --tensor few", "moon"]
)
def test_a_value_of_another_kind_is_the_parsers_to_refuse(line, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.parse(line.split())
    *_, last = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "error: " in last
