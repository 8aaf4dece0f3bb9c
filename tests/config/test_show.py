"""Every setting of a configuration as printed, with its description and a mark if it is not the default."""

import dataclasses
import typing

import pytest

import train as training
from deltallava_jax import __main__ as commands
from deltallava_jax.config import SYSTEMS, Config, ConfigError, LoraConfig, RopeScaling, load_config, override, system
from deltallava_jax.config.show import comments, settings, show
from deltallava_jax.config.values import dataclass_in

EASY = "configs/easy_vqa.py"
OWN_SYSTEM = """
from dataclasses import dataclass, replace
from configs.easy_vqa import base
from deltallava_jax import config as c

@dataclass(frozen=True)
class Config(c.ProjectorConfig):
    name: str = "of_a_file"
    taps: int = 3

class OfAFile:
    Config = Config

def get_config():
    c.register("of_a_file", OfAFile)
    cfg = base("mine", dict(name="mlp"))
    sizes = dict(grid=8, in_width=128, out_width=128)
    return replace(cfg, model=replace(cfg.model, projector=c.system_config("of_a_file", **sizes)))
"""


def kinds(kind: type) -> set[type]:
    """A dataclass and all that its fields hold."""
    parts = {part for hint in typing.get_type_hints(kind).values() if (part := dataclass_in(hint))}
    return {kind}.union(*(kinds(part) for part in parts))


def values(config, path: str = "") -> dict[str, tuple]:
    """{dotted key: (value, default)} of all settings, those of parts that are off aside."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= values(value, f"{path}{field.name}.")
        elif value is not None:
            found[f"{path}{field.name}"] = (value, field.default)
    return found


def printed(lines: list[str]) -> dict[str, str]:
    """{dotted key: its line}, of lines wide enough for a setting each."""
    found = [line for line in lines if line[:2] in ("  ", "* ") and line[2:3] not in ("", " ")]
    return {line[2:].partition(": ")[0]: line for line in found}


@pytest.mark.parametrize("kind", sorted(kinds(Config), key=lambda kind: kind.__name__))
def test_every_setting_has_a_description(kind):
    assert [field.name for field in dataclasses.fields(kind) if not comments(kind).get(field.name)] == []


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_setting_of_a_system_has_a_description(name):
    test_every_setting_has_a_description(system(name).Config)


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_setting_is_printed_with_its_value(name):
    cfg = load_config(f"configs/llava.py:{name}-pretrain")
    lines = printed(settings(cfg, 1000))
    for key, (value, default) in values(cfg).items():
        end = f" = {value!r}" if value == default else f" = {value!r} (default {default!r})"
        assert lines[key].endswith(end) and lines[key].startswith("  " if value == default else "* ")
    off = {f"model.fastv.{key}" for key in ("layer", "keep")}
    off |= {f"lora.{field.name}" for field in dataclasses.fields(LoraConfig)}
    off |= {f"model.decoder.rope_scaling.{field.name}" for field in dataclasses.fields(RopeScaling)}
    assert set(lines) == set(values(cfg)) | off
    assert "model.fastv = None: " in "\n".join(settings(cfg, 1000))


def test_a_part_that_is_on_though_off_by_default_is_marked():
    cfg = override(load_config("configs/finetune_7b.py"), {"model.fastv.keep": "36"})
    lines = settings(cfg, 200)
    assert [line for line in lines if line.startswith("* model.fastv: ")]
    assert printed(lines)["model.fastv.keep"] == "* model.fastv.keep: int = 36 (default 144)"


def test_a_setting_without_a_default():
    """Llama 3's rotary embedding: each of its numbers is given, or the part is off."""
    scaling = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
    changes = {f"model.decoder.rope_scaling.{key}": str(value) for key, value in scaling.items()}
    cfg = override(load_config("configs/finetune_7b.py"), changes)
    assert printed(settings(cfg, 200))["model.decoder.rope_scaling.factor"].endswith("factor: float = 8.0")


@pytest.mark.parametrize("width", [40, 72, 120])
def test_lines_are_as_wide_as_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = show("configs/llava.py:llavolta-finetune").splitlines()
    assert max(map(len, lines)) <= width
    # Nothing but breaks is lost.
    text = "".join("".join(line.strip("* ").split()) for line in lines)
    for key in values(load_config("configs/llava.py:llavolta-finetune")):
        assert f"{key}:" in text


def test_a_system_of_a_configuration_file_has_its_settings_too(tmp_path, monkeypatch):
    monkeypatch.setattr("deltallava_jax.config.systems.SYSTEMS", dict(SYSTEMS))
    (tmp_path / "mine.py").write_text(OWN_SYSTEM)
    text = show(tmp_path / "mine.py")
    assert "  model.projector.taps: int = 3\n" in text
    assert "model.projector.grid: int = 8 (default 24)\n      patches per side" in text


# ------------------------------------------------------------------ the commands


def test_the_command_prints_them_with_overrides(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    options = commands.parse(["config", "show", f"{EASY}:mqt", "--config.optimizer.lr=0.5"])
    options.main(options)
    assert capsys.readouterr().out.strip() == show(f"{EASY}:mqt", {"optimizer.lr": "0.5"}).strip()
    assert "\n* optimizer.lr: float = 0.5 (default 2e-05)\n" in show(f"{EASY}:mqt", {"optimizer.lr": "0.5"})


@pytest.mark.parametrize("arguments", [["--config", EASY, "--help"], ["-h", f"--config={EASY}"]])
def test_help_of_training_prints_them_after_the_options(capsys, monkeypatch, arguments):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as stopped:
        training.parse(arguments)
    options, _, rest = capsys.readouterr().out.partition(f"Settings of {EASY}")
    assert stopped.value.code == 0 and "--workdir WORKDIR" in options
    assert rest.strip() == show(EASY).partition(f"Settings of {EASY}")[2].strip()


def test_without_a_configuration_help_is_of_the_options_alone(capsys):
    with pytest.raises(SystemExit):
        training.parse(["--help"])
    assert "Settings of" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "configs/llava.py:mtq"], "did you mean 'mqt'"),
        (["show", EASY, "--config.optimizer.lrr=1"], "did you mean 'lr'"),
        (["show", EASY, "--lr=1"], "unknown argument '--lr'; see .* config show --help"),
    ],
)
def test_what_cannot_be_shown_is_refused(arguments, words):
    options = commands.parse(["config", *arguments])
    with pytest.raises(ConfigError, match=words):
        options.main(options)
