"""Training with adapters beside peft on transformers' Llava: gradients, and the losses of twenty steps of AdamW."""

import dataclasses

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

from deltallava_jax.config import Config, DataConfig, LoraConfig, OptimizerConfig  # noqa: E402
from deltallava_jax.convert.read import read  # noqa: E402
from deltallava_jax.models.names import flatten  # noqa: E402
from deltallava_jax.parallel.mesh import make_mesh, put_rows  # noqa: E402
from deltallava_jax.training.step import TrainStep, gradients, init_state  # noqa: E402
from tests.convert import checkpoints  # noqa: E402

TOKENS, STEPS, LR, PROJECTOR_LR = 16, 20, 3e-3, 3e-4
MATRICES = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llava whose weights bfloat16 holds exactly, as frozen parameters are kept in it."""
    return checkpoints.save("llava", tmp_path_factory.mktemp("peft") / "base", "bfloat16")


@pytest.fixture(scope="module")
def batch():
    """Rows of one, two and no images, their later half supervised."""
    rows = checkpoints.rows_of([1, 2, 0], [12, 9, 20])
    made = checkpoints.our_batch(rows, checkpoints.pixels(3))
    mask = np.zeros(made.tokens.shape, bool)
    for row, one in enumerate(rows):
        mask[row, len(one.ids) // 2 + 1 : len(one.ids)] = True
    inputs = checkpoints.torch_rows(rows, TOKENS) | {"pixel_values": checkpoints.torch_pixels(checkpoints.pixels(3))}
    labels = torch.full_like(inputs["input_ids"], -100)
    for row, one in enumerate(rows):
        opened = np.repeat(mask[row, : len(one.ids)], np.where(one.ids == 0, TOKENS, 1))
        labels[row, : len(opened)] = torch.where(
            torch.tensor(opened), inputs["input_ids"][row, : len(opened)], torch.tensor(-100)
        )
    return dataclasses.replace(made, loss_mask=mask), inputs | {"labels": labels}


@pytest.fixture(scope="module")
def ours(folder):
    """(config, the model read in float32, a fresh state)"""
    model = read(folder, dtype="float32")
    cfg = Config(
        model=dataclasses.replace(model.cfg, dtype="float32"),
        data=DataConfig(rows=3),
        optimizer=OptimizerConfig(
            lr=LR, warmup_ratio=0.0, final_lr_ratio=1.0, frozen=("^vision/", "^decoder/"),
            rates={"^projector/": PROJECTOR_LR},
        ),
        lora=LoraConfig(rank=4, alpha=8, dropout=0.0),
    )  # fmt: skip
    mesh = make_mesh(cfg, jax.devices()[:1])
    return cfg, TrainStep(cfg, mesh, STEPS), init_state(cfg, mesh, STEPS, model.params)


@pytest.fixture
def theirs(folder, ours):
    """peft's model with our fresh adapters, the projector trained whole beside them, as LLaVA's script does."""
    from transformers import LlavaForConditionalGeneration

    base = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pattern = rf".*language_model.*\.({MATRICES})"
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=pattern))
    ab = flatten(ours[2].trained)
    count = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            words = name.split(".")
            layer, module = int(words[words.index("layers") + 1]), words[-4].removesuffix("_proj")
            leaf = "lora_a" if "lora_A" in name else "lora_b"
            value = np.array(ab[f"decoder/layers/{module}/{leaf}"][layer]).T
            with torch.no_grad():
                parameter.copy_(torch.tensor(value))
            count += 1
        parameter.requires_grad_("lora_" in name or "multi_modal_projector" in name)
    assert count == 2 * 7 * 2
    return model.train()


def test_gradients_are_pefts(ours, theirs, batch):
    cfg, _, state = ours
    loss, _, found = jax.jit(lambda t, f, b: gradients(cfg, t, f, b, jax.random.key(0), TOKENS))(
        state.trained, state.frozen, batch[0]
    )
    reference = theirs(**batch[1]).loss
    reference.backward()
    assert float(loss) == pytest.approx(float(reference), rel=1e-5)
    found, compared = flatten(found), 0
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            words = name.split(".")
            module = words[-4].removesuffix("_proj")
            leaf = "lora_a" if "lora_A" in name else "lora_b"
            mine = found[f"decoder/layers/{module}/{leaf}"][int(words[words.index("layers") + 1])]
            np.testing.assert_allclose(mine, parameter.grad.numpy().T, atol=1e-5, rtol=1e-4, err_msg=name)
            compared += float(np.abs(mine).max()) > 1e-4
    assert compared == 14  # those of B; A's are zero as long as B is


def test_losses_of_twenty_steps_are_pefts(ours, theirs, batch):
    _, step, state = ours
    state = jax.tree.map(lambda leaf: leaf.copy(), state)  # the step donates it
    groups = {True: [], False: []}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            groups["lora_" in name].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[True], "lr": LR}, {"params": groups[False], "lr": PROJECTOR_LR}],
        betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0,
    )  # fmt: skip
    mine, reference = [], []
    placed = put_rows(batch[0], step.mesh)
    for _ in range(STEPS):
        state, metrics = step(state, placed, TOKENS)
        mine.append(float(metrics["loss"]))
        optimizer.zero_grad()
        loss = theirs(**batch[1]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups.values() for p in group], 1.0)
        optimizer.step()
        reference.append(loss.item())
    assert reference[-1] < 0.8 * reference[0]
    np.testing.assert_allclose(mine, reference, atol=1e-4, rtol=0)
