"""The plan of a run on fake CPU devices against the step that train.py runs, and its command."""

import dataclasses
import json
import math

import jax
import pytest

from deltallava_jax import __main__ as command_line
from deltallava_jax.analysis import best, plan, plan_command, plan_report
from deltallava_jax.analysis.targets import Target, parse_target
from deltallava_jax.config import MeshConfig, ModelConfig
from deltallava_jax.errors import ConfigError
from deltallava_jax.models.names import flatten
from deltallava_jax.parallel.mesh import make_mesh
from deltallava_jax.training.step import TrainStep, batch_shapes, device_bytes
from tests import tiny

FOUR = Target("cpu", (4,))


def sharded(cfg=None):
    return dataclasses.replace(cfg or tiny.get_config(), mesh=MeshConfig(data=1, fsdp=-1))


@pytest.fixture(scope="module")
def measured():
    return plan.measure(sharded(), FOUR, text=20)


def test_memory_is_that_of_the_programs_own_analysis(measured):
    cfg = sharded()
    mesh = make_mesh(cfg, jax.devices()[:4])
    step = TrainStep(cfg, mesh, plan.STEPS)
    batch = measured["batch"]
    analysis = step.compile(batch_shapes(cfg, mesh, batch["text_tokens"], batch["images"]), 4).memory_analysis()
    size = measured["per_device"]
    assert size["temporary_bytes"] == analysis.temp_size_in_bytes
    assert size["total_bytes"] == size["parameters_bytes"] + size["optimizer_bytes"] + size["temporary_bytes"]
    assert size["gradient_bytes"] + size["activation_bytes"] == size["temporary_bytes"]
    # The program's arguments are the state and a share of the batch, but for the questions, which Delta does not read.
    shape = dataclasses.replace(batch_shapes(cfg, mesh, batch["text_tokens"], batch["images"]), questions=None)
    state = size["parameters_bytes"] + size["optimizer_bytes"] + 4
    assert state + plan.device_bytes(shape) == analysis.argument_size_in_bytes
    # float32 with Adam's two moments: gradients as large as the parameters, the moments twice.
    assert size["gradient_bytes"] == size["parameters_bytes"]
    assert size["optimizer_bytes"] == pytest.approx(2 * size["parameters_bytes"], abs=16)


def test_the_plan_has_its_documented_fields(measured):
    assert (measured["target"], measured["devices"]) == ("cpu:4", 4)
    assert measured["mesh"] == dict(data=1, fsdp=4, tensor=1)
    assert measured["fits"] and measured["per_device"]["capacity_bytes"] == FOUR.capacity
    assert measured["seconds_to_compile"] > 0 and measured["rematerialization_warnings"] == 0
    assert {"all-gather"} <= {one["kind"] for one in measured["collectives"]}
    assert all(one["count"] > 0 and one["bytes"] > 0 for one in measured["collectives"])
    step = measured["step_seconds"]  # of the CPU at hand, as it was measured
    parts = step["products"] + step["memory"] + step["collectives"] + step["overhead"]
    assert 0 < step["memory"] < step["estimate"] == pytest.approx(parts)
    assert sum(row["seconds"] for row in step["parts"]) == pytest.approx(parts)
    assert {"decoder: attention", "decoder: mlp", "optimizer", "tower"} <= {row["part"] for row in step["parts"]}
    # What runs on four devices are the operations that were traced, but for those that every device repeats.
    executed = 4 * sum(row["operations"] for row in step["parts"])
    assert measured["flops_per_step"] <= executed < 1.3 * measured["flops_per_step"]
    assert measured["model_flops_per_step"] < measured["flops_per_step"]
    assert measured["compiler_flops_per_step"] == pytest.approx(measured["flops_per_step"], rel=0.05)
    assert json.loads(json.dumps(measured)) == measured


def test_the_bound_of_the_search_holds_for_what_was_compiled(measured):
    bounds = best.Bounds(sharded(), FOUR, 20)
    bound = bounds(best.Setting(1, 4, 1, sharded().model.remat, 1))
    assert 0 < bound.seconds < measured["step_seconds"]["estimate"]
    assert device_bytes(TrainStep(sharded(), make_mesh(sharded(), jax.devices()[:4]), 9).shapes) < bound.bytes
    assert bound.bytes < measured["per_device"]["program_bytes"]


def test_parameters_lie_where_the_rules_say(measured):
    step = TrainStep(sharded(), make_mesh(sharded(), jax.devices()[:4]), plan.STEPS)
    count = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape))
    assert measured["per_device"]["parameters_bytes"] == 4 * sum(map(count, flatten(step.shapes.trained).values()))


def test_the_first_batch_is_laid_out_for_the_length_of_text():
    cfg = tiny.get_config()  # rows of 96 tokens, 4 tokens an image
    budget, T, I, conversations = plan.first_batch(cfg, 20)
    assert budget == 4 and T + I * (budget - 1) == 96 and 3 <= I <= 4  # 96 / (20 + 3) = 4.2
    assert cfg.data.rows * 3 <= conversations <= cfg.data.rows * I
    assert plan.first_batch(cfg, 40)[2] < I
    fixed = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, images_per_row=7))
    assert plan.first_batch(fixed, 20)[2] == 7


def test_a_model_with_parts_missing_is_refused():
    cfg = dataclasses.replace(tiny.get_config(), model=ModelConfig(vision=None, projector=None))
    with pytest.raises(ConfigError, match="no vision"):
        plan.measure(cfg, FOUR)


def test_the_size_of_a_program_that_the_tpu_compiler_refuses_is_parsed_from_its_message():
    class Refused:
        def __init__(self, message):
            self.message = message

        def compile(self, options):
            raise jax.errors.JaxRuntimeError(self.message)

    whole = Refused(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G."
    )
    assert plan.compile_or_size(whole, {}, 100) == (None, int(20.5 * 2**30))
    temporaries = Refused(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (17.90G) exceeds "
        "available HBM (15.75G)."
    )
    assert plan.compile_or_size(temporaries, {}, 100) == (None, int(17.9 * 2**30) + 100)
    with pytest.raises(jax.errors.JaxRuntimeError):
        plan.compile_or_size(Refused("INTERNAL: something else"), {}, 100)


# ------------------------------------------------------------------ the command


def fake(total, capacity=100, **more):
    memory = dict(
        parameters_bytes=10, optimizer_bytes=20, temporary_bytes=total - 30, gradient_bytes=10,
        activation_bytes=total - 40, total_bytes=total, program_bytes=total, capacity_bytes=capacity,
    )  # fmt: skip
    return dict(fits=total <= capacity, per_device=memory, **{"remat": "none", **more})


def options(*more):
    arguments = ["plan", "--config", str(tiny.FILE), "--target", "cpu:4", *more]
    return command_line.parse(arguments)


def test_the_command_prints_one_object_or_a_table(monkeypatch, capsys, measured):
    calls = []
    monkeypatch.setattr(plan_command, "prepare", lambda target: None)
    monkeypatch.setattr(plan, "measure", lambda cfg, target, text: calls.append((cfg, target, text)) or measured)
    chosen = options("--mesh", "data=1,fsdp=4", "--text", "20", "--json", "--config.optimizer.lr=0.5")
    chosen.main(chosen)
    assert json.loads(capsys.readouterr().out) == measured
    ((cfg, target, text),) = calls
    assert (cfg.optimizer.lr, cfg.mesh, text) == (0.5, MeshConfig(data=1, fsdp=4), 20) and target == FOUR
    chosen = options()
    chosen.main(chosen)
    printed = capsys.readouterr().out
    assert " 0.0 " not in printed and " 0.00 " not in printed
    step = ("a step: about", "by part", "decoder: attention", "the dearest operations")
    for part in ("4 devices, mesh data=1, fsdp=4", "parameters", "fits", "all-gather", "FLOP", "compiled in", *step):
        assert part in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--mesh", "data=2,model=2"], "--mesh data=2,model=2: expected axes"),
        (["--mesh", "fsdp=3,data=1"], "uses 3 of 4 devices|does not fit"),
        (["--config.optimizer.lrr=1"], "did you mean 'lr'"),
        (["--config.data.rows=6"], "data.rows=6 is not divisible"),
        (["--config.model.vision=None"], "a plan needs a whole model; this one has no vision"),
        (["--memory", "-1"], "--memory -1: expected GiB"),
        (["--tries", "3"], "--tries 3: expected 1 or more settings to compile, with --best"),
        (["--text", "-5"], "--text -5: expected a number of tokens, 0 or more"),
    ],
)
def test_bad_options_are_one_line(more, message):
    chosen = options(*more)
    with pytest.raises(ConfigError, match=message):
        chosen.main(chosen)


def test_the_nearest_setting_that_fits_is_found(monkeypatch):
    cfg, tried = tiny.get_config(), []

    def measure(cfg, target, text):
        tried.append((cfg.model.remat, cfg.optimizer.accumulation, target.count))
        return fake(90 if cfg.optimizer.accumulation == 2 else 120)

    monkeypatch.setattr(plan, "measure", measure)
    found = plan_command.nearest(cfg, FOUR, fake(150, remat="none"), 0)
    assert tried == [("full", 1, 4), ("full", 2, 4)]
    assert found["change"] == "--config.model.remat=full --config.optimizer.accumulation=2"
    assert found["per_device"]["total_bytes"] == 90


def test_the_ladder_names_the_least_recomputation_that_leaves_room(monkeypatch, capsys):
    compiled = []
    needs = dict(none=200, dots=95, attention=90, full=80)

    def one(cfg, target, text):
        compiled.append(cfg.model.remat)
        used = needs[cfg.model.remat]
        return fake(used, remat=cfg.model.remat, flops_per_step=7, step_seconds=dict(estimate=used / 10))

    monkeypatch.setattr(plan, "one", one)
    monkeypatch.setattr(plan, "step_and_batch", lambda cfg, target, text: (needs[cfg.model.remat],))
    monkeypatch.setattr(plan.remat, "least_bytes", lambda used: 0.9 * used)
    cfg = dataclasses.replace(tiny.get_config(), model=dataclasses.replace(tiny.get_config().model, remat="auto"))
    found = plan.ladder(cfg, dataclasses.replace(FOUR, memory=100))
    assert compiled == ["dots", "attention", "full"]  # "none" needs more than there is, whatever the compiler does
    assert found["remat"] == "attention"
    assert [(row["remat"], row["total_bytes"], row["fits"]) for row in found["ladder"]] == [
        ("none", None, False), ("dots", 95, False), ("attention", 90, True), ("full", 80, True),
    ]  # fmt: skip
    text = "\n".join(plan_report.format_ladder(found))
    assert "more than 180 bytes" in text and "chosen" in next(line for line in text.splitlines() if "attention" in line)
    found = plan.ladder(cfg, dataclasses.replace(FOUR, memory=50))
    assert found["remat"] == "full"  # the last one, though it does not fit


def test_where_the_state_alone_does_not_fit_more_devices_are_tried(monkeypatch):
    tried = []

    def measure(cfg, target, text):
        tried.append((str(target), cfg.mesh.fsdp, cfg.data.rows))
        return fake(30 if target.count == 16 else 90, capacity=35)

    monkeypatch.setattr(plan, "measure", measure)
    found = plan_command.nearest(tiny.get_config(), FOUR, fake(90, capacity=35, remat="none"), 0)
    assert tried == [("cpu:4", -1, 8), ("cpu:8", -1, 8), ("cpu:16", -1, 16)]
    assert found["target"] == "cpu:16" and "--config.data.rows=16" in found["change"]
    assert parse_target(found["target"]).count == 16
