"""The PyTorch code that exports carry: the same tokens as ours, from the same tensors."""

import dataclasses
import importlib.util
import sys

import jax
import numpy as np
import pytest

from tests import golden

torch = pytest.importorskip("torch")

from deltallava_jax.config import settings_of, system_config, to_dict  # noqa: E402
from deltallava_jax.convert.export import TORCH_MODULES, projector_code  # noqa: E402
from deltallava_jax.models import systems  # noqa: E402
from deltallava_jax.models.systems.delta import ABLATIONS  # noqa: E402

SMALL = dict(
    grid=8, in_width=32, out_width=48, mlp_width=40, head_dim=16, block_head_dim=16, rank=4, level_count=2,
    scale_factor=2, queries=16, depth=2,
)  # fmt: skip
ELASTIC = dict(scale_factor=(1, 2, 4, 8))
PRUMERGES = ("prumerge", "prumerge_plus")
CASES = [
    *(dict(name="delta", variant=v, ablation=a, **ELASTIC) for v in ("release", "paper") for a in ABLATIONS),
    dict(name="delta", variant="paper", window=2, reduction=2, embed_width=64),
    dict(name="token_packer", **ELASTIC),
    dict(name="token_packer", embed_width=64),
    dict(name="m3", **ELASTIC),
    dict(name="mqt", tokens=(16, 7, 1)),
    dict(name="resampler"),
    dict(name="resampler", closing=True, queries=64),
    dict(name="resampler", out_width=32),
    dict(name="honeybee_c", **ELASTIC),
    dict(name="honeybee_c", embed_width=64),
    dict(name="honeybee_d"),
    dict(name="honeybee_d", scale_factor=(4,)),
    dict(name="quecc"),
    dict(name="quecc", scale_factor=(4,), embed_width=64, text_width=24),
    dict(name="fastervlm"),
    dict(name="fastervlm", tokens=(64, 7)),
    dict(name="random", tokens=(64, 7), seed=3),
    dict(name="average_pooling", **ELASTIC),
    *(dict(name=name, keep_ratio=ratio) for name in PRUMERGES for ratio in (0.0, 0.25, 0.125)),
    *(dict(name=name, keep_ratio=0.0, tokens=(3,)) for name in PRUMERGES),  # fewer than have outlying attention
    *(dict(name="prumerge_plus", keep_ratio=r, reproduce_duplicates=True) for r in (0.0, 0.125, 0.25)),
]


def small(name, **changes):
    return system_config(name, **settings_of(name, SMALL) | changes)


def torch_module(name):
    """A file of an export, imported as the folder's code is."""
    spec = importlib.util.spec_from_loader("exported", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(TORCH_MODULES)]
    sys.modules["exported"] = package
    return importlib.import_module(f"exported.{name}")


def both(cfg, features, text=None):
    """(ours, theirs) with the same parameters: functions of a budget that give tokens and the valid mask or None."""
    state = systems.to_torch(systems.init_params(cfg, jax.random.key(0)), cfg)
    drawn = golden.projector_state(cfg)
    fixed = ("pos_embed", "reference_points")
    state = {name: value if name.endswith(fixed) else drawn[name] for name, value in state.items()}
    module = torch_module(projector_code(cfg).stem).Projector(to_dict(cfg)).eval()
    module.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})  # strict
    arrays = [torch.tensor(getattr(features, name)) for name in ("last", "levels", "cls_attention", "keys")]
    inputs = torch_module("projector_parts").Features(*arrays, None if text is None else torch.tensor(text))
    params = systems.from_torch(state, cfg)
    jitted = jax.jit(systems.project_valid, static_argnames=("cfg", "budget"))

    def theirs(budget):
        with torch.no_grad():
            made = module(inputs, budget)
        return made if isinstance(made, tuple) else (made, None)

    return lambda budget: jitted(params, cfg, features, text, budget=budget), theirs


def assert_same_tokens(ours, theirs, message=""):
    """Equal masks, and close tokens where they are live."""
    (ours, valid), (theirs, live) = ours, theirs
    ours, theirs = np.asarray(ours), theirs.numpy()
    assert ours.shape == theirs.shape and (valid is None) == (live is None)
    if valid is not None:
        np.testing.assert_array_equal(valid, live.numpy(), err_msg=message)
        ours, theirs = ours[np.asarray(valid)], theirs[np.asarray(valid)]
    np.testing.assert_allclose(theirs, ours, atol=2e-5 * np.abs(ours).max(), err_msg=message)


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(str(v) for k, v in c.items() if k != "scale_factor"))
def test_torch_and_jax_make_the_same_tokens(changes):
    cfg = small(**changes)
    text = golden.inputs("text", (2, cfg.text_width or cfg.out_width)) if systems.reads_question(cfg) else None
    ours, theirs = both(cfg, golden.features(cfg), text)
    for budget in systems.budgets(cfg):
        assert_same_tokens(ours(budget), theirs(budget), str(budget))


@pytest.mark.parametrize("name", PRUMERGES)
def test_images_with_as_many_tokens_as_their_attention_has_outliers(name):
    """None, one, and more than the most that are kept, in one batch."""
    cfg = small(name, keep_ratio=0.0, tokens=(12,))
    features = golden.features(cfg, 3)
    attention = np.random.default_rng(0).uniform(0.9, 1.1, (3, 64)).astype(np.float32)
    attention[1, 40] = 9
    attention[2, 5:20] = np.arange(15) + 20
    features = dataclasses.replace(features, cls_attention=attention / attention.sum(1, keepdims=True))
    ours, theirs = both(cfg, features)
    assert_same_tokens(ours(12), theirs(12))
    assert theirs(12)[1].sum(1).tolist() == {"prumerge": [1, 2, 12], "prumerge_plus": [4, 5, 12]}[name]
