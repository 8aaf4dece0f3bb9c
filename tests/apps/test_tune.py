"""Training measures the implementations of attention before its first step, and the command tune does so alone: on a
CPU, with planted candidates."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

import train
from deltallava_jax import __main__ as command
from deltallava_jax.apps import tune
from deltallava_jax.config import override
from deltallava_jax.data import sources
from deltallava_jax.data.packing import plan_for
from deltallava_jax.errors import ConfigError
from deltallava_jax.kernels import tuning
from deltallava_jax.parallel import mesh
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.step import TrainStep, batch_shapes
from tests import tiny
from tests.kernels import planted
from tests.training.processes import ROOT, as_one_run, environment, finish

SMALL = {
    "model.vision.image_size": "16", "model.vision.layers": "1", "model.projector.name": "mlp",
    "model.projector.grid": "2", "model.projector.select_layer": "-1", "model.decoder.layers": "1",
    "training.steps": "1",
}  # fmt: skip

SLOW = f"length={planted.TIMES}"  # of the loop in the slow kernel


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The cache folder."""
    monkeypatch.setenv("DELTALLAVA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mesh, "make_mesh", lambda cfg: make_mesh(cfg, jax.devices()[:1]))
    yield tmp_path / "cache"
    planted.uproot()


def start(log, again=False, **settings):
    """Tunes one program; the step and what was measured."""
    changes = SMALL | {f"model.{name}": value for name, value in settings.items()}
    cfg = override(tiny.get_config(), changes)
    step = TrainStep(cfg, make_mesh(cfg, jax.devices()[:1]), 10)
    return step, tune.tune(step, [tune.Program(30, 1, 4)], log, again=again)


def program(step):
    return str(step.trace(batch_shapes(step.cfg, step.mesh, 30, 1), 4).jaxpr)


class Few:
    """The first records of easy-VQA."""

    def __init__(self, source):
        self.source = source

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return self.source[index]

    def texts(self):
        return self.source.texts()[:64]


REASONS = {"wrong": "differs from XLA by", "raising": "raises NotImplementedError", "nan": "gives NaN"}


def test_a_run_goes_on_without_the_faulty_candidates(tmp_path, monkeypatch, capfd):
    training_source = sources.training_source
    monkeypatch.setattr(sources, "training_source", lambda cfg: Few(training_source(cfg)))
    planted.plant(planted.wrong, planted.raising, planted.nan, planted.slow)
    arguments = ["--config", str(tiny.FILE), "--workdir", str(tmp_path / "run")]
    train.main(*train.parse([*arguments, *(f"--config.{key}={value}" for key, value in SMALL.items())]))
    lines = capfd.readouterr().err.splitlines()
    chosen = [line for line in lines if line.endswith(" -> xla")]
    assert len(chosen) >= 2 and all(" ms, slow " in line for line in chosen)
    for name, reason in REASONS.items():
        warnings = [line for line in lines if line.startswith("warning: ") and f": {name} is left out, it " in line]
        assert len(warnings) == len(chosen) and all(reason in line for line in warnings)
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["loss"] > 0


def test_the_second_start_measures_nothing_and_another_version_everything(folder, monkeypatch):
    planted.plant(planted.slow, planted.raising)
    first, second, third, fourth = [], [], [], []
    step, measured = start(first.append)
    assert len(measured) >= 2 and {result.choice for result in measured.values()} == {"xla"}
    assert first[0] == f"measuring {len(measured)} calls of attention on cpu"
    monkeypatch.setattr(tuning, "measure", lambda *_: pytest.fail("measured again"))
    assert start(second.append)[1] == measured
    (line,) = second
    assert line.startswith(f"attention as measured before ({folder / 'kernels.json'}): ")
    assert all(f"{call} -> xla" in line for call in measured)
    monkeypatch.undo()
    monkeypatch.setenv("DELTALLAVA_CACHE", str(folder))
    monkeypatch.setattr(tuning.metadata, "version", lambda name: "99")
    start(third.append)
    assert third[0] == first[0]
    monkeypatch.undo()
    monkeypatch.setenv("DELTALLAVA_CACHE", str(folder))
    start(fourth.append)  # the first version's measurements are still there
    assert fourth == second


def test_the_choice_is_what_the_step_runs(folder):
    planted.plant(planted.slow)
    step, measured = start(lambda line: None)
    assert SLOW not in program(step)
    kept = {call: tuning.Result("slow", {}) for call in measured}
    tuning.file(folder).write_text(tuning.text({tuning.environment(): kept}))
    step, _ = start(lambda line: None)
    assert SLOW in program(step)


def test_an_unreadable_table_is_reported_and_made_again(folder):
    planted.plant(planted.nan)
    folder.mkdir()
    tuning.file(folder).write_text("{")
    lines = []
    _, measured = start(lines.append)
    assert lines[0].startswith("warning: the measured choices of kernels cannot be read and are measured again: ")
    assert "kernels.json: " in lines[0] and sum("cannot be read" in line for line in lines) == 1
    assert tuning.read(tuning.file(folder))[tuning.environment()] == measured
    assert [file.name for file in folder.iterdir()] == ["kernels.json"]


def test_a_kernel_that_ends_the_process_is_not_tried_again(folder, monkeypatch):
    planted.plant(planted.raising)
    end = lambda *_: (_ for _ in ()).throw(SystemExit(139))
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "measure", end)
        with pytest.raises(SystemExit):
            start(lambda line: None)
    lines = []
    _, measured = start(lines.append)
    (call, ended), *others = measured.items()
    assert ended.choice == "xla" and not ended.seconds and all(result.seconds for _, result in others)
    (warning,) = [line for line in lines if line.startswith(f"warning: {call}: measuring it did not end")]
    assert "tune --again" in warning
    _, again = start(lines.append, again=True)
    assert again[call].seconds


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, monkeypatch):
    planted.plant(planted.nan)
    (tmp_path / "file").touch()
    monkeypatch.setenv("DELTALLAVA_CACHE", str(tmp_path / "file" / "cache"))
    lines = []
    assert start(lines.append)[1]
    assert sum(line.startswith("warning: the measured choices of kernels cannot be kept: ") for line in lines) == 1


def test_forced_settings_are_not_measured(folder):
    planted.plant(planted.slow)
    step, measured = start(lambda line: pytest.fail(line), attention="xla")
    assert not measured and not folder.exists() and SLOW not in program(step)
    with pytest.raises(ConfigError, match="model.attention=cudnn: runs on gpu, not on cpu"):
        start(print, attention="cudnn")


def test_a_cpu_has_nothing_to_measure(capsys, folder):
    assert start(lambda line: pytest.fail(line))[1] == {}
    command.main(["tune", "--config", str(tiny.FILE)])
    out, err = capsys.readouterr()
    assert (
        out == "nothing to choose for the attention of tiny here: on cpu nothing is measured\n"
        and "measuring" not in err
    )


def test_the_command_prints_the_table(capsys, folder):
    planted.plant(planted.raising, planted.slow)
    settings = [f"--config.{key}={value}" for key, value in SMALL.items()]
    command.main(["tune", "--config", str(tiny.FILE), "--config.mesh.data=8", *settings])
    out, err = capsys.readouterr()
    assert out.startswith(f"attention of tiny on cpu, forward and backward; kept in {folder / 'kernels.json'}\n")
    assert "measuring " in err and "  raising  left out: raises NotImplementedError: no plan found\n" in out
    (xla, slow), *_ = [part.splitlines()[1:3] for part in out.split("\n\n")[1:]]
    assert xla.startswith("  xla ") and xla.endswith(" ms  <- taken") and slow.startswith("  slow ")


def test_the_programs_of_a_run():
    cfg = override(tiny.get_config(), {"training.llavolta": "((4,1),(1,0))"})
    lengths = np.arange(2, 40).repeat(20)
    plan = plan_for(cfg.data, lengths, np.ones_like(lengths), (16, 4), cfg.seed)
    found = tune.programs(cfg, plan, 20)
    assert {one.budget for one in found} == {16, 4} and {one.pooling for one in found} == {(4, 1), None}
    of = lambda step: (step.text, step.images, step.budget)
    assert {one[:3] for one in found} == {of(plan.step(number)) for number in range(20)}
    assert tune.programs(cfg, plan, 1) == [tune.Program(*of(plan.step(0)), (4, 1))]


def test_two_processes_agree_on_the_first_ones_choice(tmp_path):
    def begin(number, *explicit):
        command = [sys.executable, "-m", "tests.apps.agreeing", tmp_path, explicit[1], 2, number]
        own = {"DELTALLAVA_CACHE": str(tmp_path / f"cache{number}")}
        return subprocess.Popen(
            [*map(str, command)], cwd=ROOT, env=environment() | own, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    explicit = as_one_run(2)
    for process in [begin(number, *explicit) for number in range(2)]:
        finish(process)
    first, second = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert first["choices"] == second["choices"] and set(first["choices"].values()) == {"xla"}
    assert not first["slow"] and not second["slow"] and first["lines"] and not second["lines"]
