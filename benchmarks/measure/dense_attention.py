"""Dense attention of tower and decoder, for kernels.py: XLA's form, the platform's kernel and torch's."""

from __future__ import annotations

import functools
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """``segments``: conversations in a row, which do not see each other; 0: every token sees all."""

    slots: int
    heads: int
    key_heads: int
    width: int
    segments: int
    batches: tuple[int, ...]

    def shapes(self, batch: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of queries and of keys."""
        return tuple((batch, self.slots, heads, self.width) for heads in (self.heads, self.key_heads))

    def operations(self, batch: int, mode: str) -> int:
        """Of the products that are needed, half of them where later slots are not seen."""
        whole = 4 * batch * self.heads * self.slots**2 * self.width * {"forward": 1, "both": 3}[mode]
        return whole // 2 if self.segments else whole


CASES = {
    "decoder_7b": Case(2048, 32, 32, 128, 4, (4, 16)),
    "decoder_qwen2_7b": Case(2048, 28, 4, 128, 4, (4,)),
    "tower_clip_336": Case(577, 16, 16, 64, 0, (64,)),
    "tower_siglip_384": Case(729, 16, 16, 72, 0, (64,)),
}


def rows_of_segments(case: Case, batch: int):
    """int32 [batch, slots]: equal parts, numbered from 1."""
    import jax.numpy as jnp

    return jnp.broadcast_to(1 + jnp.arange(case.slots) * case.segments // case.slots, (batch, case.slots))


def step(case: Case, mode: str, implementation: str):
    """(q, k, v, do, segments) -> the same, with results in the place of what they have the shape of."""
    import jax

    from deltallava_jax.kernels.attention import attention, causal

    def run(q, k, v, do, segments):
        mask = causal(segments) if case.segments else None
        function = functools.partial(attention, mask=mask, implementation=implementation)
        if mode == "forward":
            return function(q, k, v), k, v, do, segments
        out, pull = jax.vjp(function, q, k, v)
        return *pull(do), out, segments

    return run


def jax_calls(case: Case, batch: int, mode: str, chain: int) -> tuple[dict, dict]:
    """(the implementations that run here, why the others do not)."""
    import jax
    import jax.numpy as jnp

    from deltallava_jax.kernels.attention.dispatch import OPERATION

    dtype = jnp.float32 if jax.devices()[0].platform == "cpu" else jnp.bfloat16
    q, k = case.shapes(batch)
    draw = lambda seed, shape: jax.random.normal(jax.random.key(seed), shape, dtype)
    arrays = draw(0, q), draw(1, k), draw(2, k), draw(3, q), rows_of_segments(case, batch)
    calls, refused = {}, {}
    for name in OPERATION.implementations:
        one = step(case, mode, name)
        run = jax.jit(lambda *state, one=one: jax.lax.fori_loop(0, chain, lambda _, state: one(*state), state))
        try:
            run.lower(*arrays)
        except ValueError as error:
            refused[name] = str(error)
            continue
        calls[name] = lambda run=run: jax.block_until_ready(run(*arrays))
    return calls, refused


def torch_call(case: Case, batch: int, mode: str, chain: int, on: str):
    """torch's scaled_dot_product_attention, with a mask where there are segments, as a function."""
    import numpy as np
    import torch

    dtype, both = (torch.float32 if on == "cpu" else torch.bfloat16), mode == "both"
    q, k = ((shape[0], shape[2], shape[1], shape[3]) for shape in case.shapes(batch))
    draw = lambda shape, grad: torch.randn(shape, device=on, dtype=dtype, requires_grad=grad)
    inputs, do = (draw(q, both), draw(k, both), draw(k, both)), draw(q, False)
    mask = None
    if case.segments:
        segments = torch.from_numpy(np.array(rows_of_segments(case, batch))).to(on)
        mask = (segments[:, :, None] == segments[:, None, :]).tril()[:, None]

    def call():
        for _ in range(chain):
            out = torch.nn.functional.scaled_dot_product_attention(
                *inputs, attn_mask=mask, enable_gqa=case.heads != case.key_heads
            )
            if both:
                torch.autograd.grad(out, inputs, do)
        if on == "cuda":
            torch.cuda.synchronize()

    return call


def compiled(case: Case, batch: int, sharding, implementation: str):
    """Forward and backward through the compiler of the sharding's devices."""
    import jax

    q, k = (jax.ShapeDtypeStruct(shape, "bfloat16", sharding=sharding) for shape in case.shapes(batch))
    segments = jax.ShapeDtypeStruct((batch, case.slots), "int32", sharding=sharding)
    return jax.jit(lambda *state: step(case, "both", implementation)(*state)[:4]).lower(q, k, k, q, segments).compile()
