"""The PyTorch code that exports carry: the same tokens as ours, from the same tensors."""

import dataclasses
import importlib.util
import sys

import golden
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deltallava_jax.config import ABLATIONS, ProjectorConfig, to_dict  # noqa: E402
from deltallava_jax.convert.write import TORCH_MODULES, projector_code  # noqa: E402
from deltallava_jax.models import projectors  # noqa: E402

SMALL = ProjectorConfig(
    grid=8, in_width=32, out_width=48, mlp_width=40, head_dim=16, block_head_dim=16, rank=4, level_count=2,
    scale_factor=2, queries=16, depth=2,
)  # fmt: skip
ELASTIC = dict(scale_factor=(1, 2, 4, 8))
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
]


def torch_projector(cfg):
    """The module of an export, imported as the folder's code is."""
    spec = importlib.util.spec_from_loader("exported", loader=None, is_package=True)
    package = importlib.util.module_from_spec(spec)
    package.__path__ = [str(TORCH_MODULES)]
    sys.modules["exported"] = package
    return importlib.import_module(f"exported.{projector_code(cfg.name).stem}").Projector(to_dict(cfg)).eval()


@pytest.mark.parametrize("changes", CASES, ids=lambda c: "-".join(str(v) for k, v in c.items() if k != "scale_factor"))
def test_torch_and_jax_make_the_same_tokens(changes):
    cfg = dataclasses.replace(SMALL, **changes)
    state = projectors.to_torch(projectors.init_params(cfg, jax.random.key(0)), cfg)
    drawn = golden.projector_state(cfg)
    fixed = ("pos_embed", "reference_points")
    state = {name: value if name.endswith(fixed) else drawn[name] for name, value in state.items()}
    theirs = torch_projector(cfg)
    theirs.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in state.items()})  # strict
    features = golden.features(cfg)
    params = projectors.from_torch(state, cfg)
    for budget in projectors.budgets(cfg):
        ours = jax.jit(lambda p, f, b=budget: projectors.project(p, cfg, f, budget=b))(params, features)
        with torch.no_grad():
            found = theirs(torch.from_numpy(features.last), torch.from_numpy(features.levels), budget).numpy()
        np.testing.assert_allclose(found, ours, atol=2e-5 * np.abs(ours).max(), err_msg=str(budget))
