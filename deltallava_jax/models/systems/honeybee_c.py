"""Honeybee's C-Abstractor (kakaobrain/honeybee, projectors.py): RegNet stages around an adaptive average pool.

It uses the tower's last layer: select_layer -1."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.config.checks import require_at_least, require_positive
from deltallava_jax.models.layers import LayerNorm, Linear, normal, torch_default, trunc_normal
from deltallava_jax.models.names import Entry, linear, norm
from deltallava_jax.models.systems import common
from deltallava_jax.models.systems.base import OnGrid, ScaleConfig
from deltallava_jax.models.vision import VisionFeatures
from deltallava_jax.products import plus

EPS = 1e-5
DEPTH = 3


class Bottleneck(nnx.Module):
    """timm's RegNet bottleneck: 1x1, depthwise 3x3, squeeze and excite, 1x1; LayerNorms per pixel; residual; SiLU."""

    def __init__(self, in_width: int, width: int, *, rngs: nnx.Rngs):
        conv = lambda a, b, bias=False: Linear(a, b, bias=bias, kernel_init=torch_default(a), rngs=rngs)
        self.reduce, self.expand = conv(in_width, width), conv(width, width)
        self.kernel = nnx.Param(torch_default(9)(rngs.params(), (3, 3, 1, width)))
        self.norm1, self.norm2, self.norm3 = (LayerNorm(width, eps=EPS) for _ in range(3))
        squeezed = round(in_width / 4)
        self.squeeze, self.excite = conv(width, squeezed, bias=True), conv(squeezed, width, bias=True)
        self.shortcut = conv(in_width, width) if in_width != width else None
        self.shortcut_norm = LayerNorm(width, eps=EPS) if in_width != width else None

    def __call__(self, x: Float[Array, "n h w C"]) -> Float[Array, "n h w E"]:
        y = jax.nn.silu(self.norm1(self.reduce(x)))
        y = jax.nn.silu(self.norm2(depthwise(y, self.kernel[...])))
        gate = self.excite(jax.nn.silu(self.squeeze(y.mean((1, 2)))))
        y = self.norm3(self.expand(y * jax.nn.sigmoid(gate)[:, None, None]))
        short = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        return jax.nn.silu(y + short)


@jax.checkpoint
def depthwise(x: Float[Array, "n h w C"], kernel: Float[Array, "3 3 1 C"]) -> Float[Array, "n h w C"]:
    """The convolution as nine shifted products, added in the wider dtype, of which none is kept."""
    h, w = x.shape[1:3]
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y = sum(padded[:, p : p + h, q : q + w] * kernel[p, q, 0] for p in range(3) for q in range(3))
    return y.astype(x.dtype)


@dataclass(frozen=True)
class HoneybeeCConfig(ScaleConfig):
    name: str = "honeybee_c"
    select_layer: int = -1  # the tower's hidden state, from the end: -1 is the last
    embed_width: int = 0  # width of the stages; 0: in_width
    depth: int = 0  # blocks of a stage; 0: as published, 3
    initializer_range: float = 0.02  # standard deviation of fresh Linear weights; small widths want more

    def __post_init__(self):
        super().__post_init__()
        require_at_least(0, "projector", self, "embed_width", "depth")
        require_positive("projector", self, "initializer_range")

    @property
    def width(self) -> int:
        return self.embed_width or self.in_width


class HoneybeeC(OnGrid):
    Config = HoneybeeCConfig
    torch_code = "projector_honeybee_c.py"
    prefix = "abstractor."

    def __init__(self, cfg: HoneybeeCConfig, *, rngs: nnx.Rngs):
        self.position = nnx.Param(normal(cfg.initializer_range)(rngs.params(), (1, cfg.grid**2, cfg.in_width)))
        for stage, block, in_width in _blocks(cfg):
            setattr(self, f"stage{stage}_block{block}", Bottleneck(in_width, cfg.width, rngs=rngs))
        make = lambda a, b: Linear(a, b, kernel_init=trunc_normal(cfg.initializer_range), rngs=rngs)
        self.up, self.down = make(cfg.width, cfg.out_width), make(cfg.out_width, cfg.out_width)
        self.cfg = cfg

    def __call__(self, features: VisionFeatures, text, budget: int, key: Array | None) -> Float[Array, "n V d"]:
        x = plus(features.last, self.position[...])
        x = common.as_grid(x, self.cfg.grid)
        pooled = False
        for stage, block, _ in _blocks(self.cfg):
            if stage == 2 and not pooled:
                x = common.pool_grid(x, round(budget**0.5))
                pooled = True
            x = getattr(self, f"stage{stage}_block{block}")(x)
        return self.down(jax.nn.silu(self.up(x.reshape(x.shape[0], budget, -1))))

    @staticmethod
    def name_table(cfg: HoneybeeCConfig) -> list[Entry]:
        table = [Entry("pos_emb", "position")]
        conv = lambda torch, path, bias=False: linear(torch, path, bias=bias, kind="conv1x1")
        for stage, block, in_width in _blocks(cfg):
            torch, path = f"net.{2 * (stage - 1)}.b{block}", f"stage{stage}_block{block}"
            table += conv(f"{torch}.conv1.conv", f"{path}/reduce") + norm(f"{torch}.conv1.bn", f"{path}/norm1")
            table += [Entry(f"{torch}.conv2.conv.weight", f"{path}/kernel", "conv")]
            table += norm(f"{torch}.conv2.bn", f"{path}/norm2")
            table += conv(f"{torch}.se.fc1", f"{path}/squeeze", True) + conv(f"{torch}.se.fc2", f"{path}/excite", True)
            table += conv(f"{torch}.conv3.conv", f"{path}/expand") + norm(f"{torch}.conv3.bn", f"{path}/norm3")
            if in_width != cfg.width:
                table += conv(f"{torch}.downsample.conv", f"{path}/shortcut")
                table += norm(f"{torch}.downsample.bn", f"{path}/shortcut_norm")
        return table + linear("readout.0", "up") + linear("readout.2", "down")

    @staticmethod
    def infer(shapes: dict[str, tuple[int, ...]]) -> dict | None:
        if "net.0.b1.conv1.conv.weight" not in shapes:
            return None
        width, in_width = shapes["net.0.b1.conv1.conv.weight"][:2]
        depth = sum(name.startswith("net.0.b") and name.endswith("conv1.conv.weight") for name in shapes)
        return dict(
            name="honeybee_c", in_width=in_width, embed_width=width, out_width=shapes["readout.2.weight"][0],
            grid=round(shapes["pos_emb"][1] ** 0.5), depth=depth, select_layer=-1,
        )  # fmt: skip


def _blocks(cfg: HoneybeeCConfig):
    """(stage, block, input width), in order; pooling happens between the stages."""
    for stage in (1, 2):
        for block in range(1, (cfg.depth or DEPTH) + 1):
            yield stage, block, cfg.in_width if (stage, block) == (1, 1) else cfg.width
