"""Windowed attention for NVIDIA GPUs from Hopper on: ROWS windows per block, one key of each per step.

With one query per window each key belongs to one query, so the operation is a sum over the s * s places (p, r) inside
a window. In the patch grid [B, g, g, H * D], viewed as [B * gq, s, gq, s, H * D], the keys at one place of neighbouring
windows are one strided box, which the tensor memory accelerator fetches during the step before. Scores are elementwise
products summed over a head's 128 numbers in float32; nothing is masked or computed for another window. Tensor cores
would not help: the kernel is bound by memory, and the products of one query with s * s keys fill none of their 64-row
tiles.

Where there are few windows, several blocks split the rows of a window's keys, and XLA joins their parts."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Float

from deltallava_jax.arrays import Array
from deltallava_jax.kernels import devices

ROWS = 32  # windows per block: their accumulators stay in the registers of its 128 threads
FETCH_BYTES = 2**16  # of keys and values in flight
BLOCKS = 264  # two for each of the 132 multiprocessors of an H100
WIDTH = 128  # of a head
THREADS = 128  # of a block


def refusal(q, k, window: int, source: int | None = None) -> str | None:
    """Why the kernel cannot run on the target GPU or on these arrays; None where it can."""
    if not devices.from_hopper_on():
        return f"needs a GPU from Hopper on, not {devices.device()[1]}"
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"takes float32 or bfloat16, not {q.dtype}"
    if window != 1:
        return f"takes windows of one query, not {window} x {window}"
    if q.shape[-1] != WIDTH:
        return f"takes heads of {WIDTH}, not {q.shape[-1]}"
    return None


@dataclass(frozen=True)
class _Tiles:
    """How the windows are divided among blocks: each has ROWS rows of the grids [B * gq, gq] of windows, one column,
    one head, and one of ``splits`` parts of its windows' rows of keys."""

    rows: int
    gq: int
    s: int
    heads: int

    @property
    def down(self) -> int:
        return pl.cdiv(self.rows, ROWS)

    @property
    def splits(self) -> int:
        blocks = self.heads * self.gq * self.down
        return next(n for n in range(1, self.s + 1) if self.s % n == 0 and (blocks * n >= BLOCKS or n == self.s))

    @property
    def grid(self) -> dict:
        return dict(grid=(self.down * self.splits, self.gq, self.heads), grid_names=("row_split", "column", "head"))

    @property
    def steps(self) -> tuple[int, int]:
        """Rows and columns of a window's keys that a block takes one after another."""
        return self.s // self.splits, self.s

    def here(self):
        """Of this block: the index of its windows in an array over the queries and in one over the windows' sums, its
        part of the keys, and the BlockSpec of keys and values by step."""
        row_split, column, head = (jax.lax.axis_index(name) for name in ("row_split", "column", "head"))
        row, split = jax.lax.div(row_split, self.splits), jax.lax.rem(row_split, self.splits)
        rows, first = pl.ds(row * ROWS, ROWS), split * self.steps[0]
        keys = plgpu.BlockSpec((ROWS, None, None, None, WIDTH), lambda p, r: (row, first + p, column, r, head))
        return (rows, column, pl.ds(head * WIDTH, WIDTH)), (head, column, rows), split, keys

    def queries(self, x):
        return x.reshape(self.rows, self.gq, -1)

    def keys(self, x):
        return x.reshape(self.rows, self.s, self.gq, self.s, -1)

    def parts(self, dtype) -> jax.ShapeDtypeStruct:
        """An output over the queries, in the ``splits`` parts that XLA sums."""
        dtype = dtype if self.splits == 1 else jnp.float32
        return jax.ShapeDtypeStruct((self.splits, self.rows, self.gq, self.heads * WIDTH), dtype)

    def sums(self) -> tuple[int, int, int]:
        """The shape of one float per window and head, padded to whole blocks."""
        return self.heads, self.gq, self.down * ROWS

    def by_query(self, x):
        """[..., *sums] -> [..., rows, gq, H, 1]."""
        return rearrange(x, "... h j i -> ... i j h 1")[..., : self.rows, :, :, :]

    def by_block(self, x):
        """[rows, gq, H] -> [*sums]."""
        return jnp.pad(rearrange(x, "i j h -> h j i"), ((0, 0), (0, 0), (0, self.down * ROWS - self.rows)))


def _layout(dtype):
    """[ROWS, WIDTH] over the threads: 16 bytes each, so that neighbouring threads read a row whole."""
    vector = 16 // jnp.dtype(dtype).itemsize
    rows = THREADS // (WIDTH // vector)  # at once
    if vector == 8:  # two rows a warp
        return plgpu.Layout.TILED(
            plgpu.Tiling(((rows, WIDTH), (2, WIDTH), (vector,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
        )
    return plgpu.Layout.TILED(plgpu.Tiling(((rows, WIDTH), (vector,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)


def _fetched_ahead(dtype) -> int:
    """Steps whose keys and values are fetched ahead."""
    return FETCH_BYTES // (2 * ROWS * WIDTH * jnp.dtype(dtype).itemsize)


def _read(ref, layout):
    return plgpu.layout_cast(ref[...], layout).astype(jnp.float32)


def _wide(x, layout):
    """[ROWS] along the rows of [ROWS, WIDTH]."""
    return plgpu.layout_cast(jax.lax.broadcast_in_dim(x, (ROWS, WIDTH), (0,)), layout)


def _slices(spec: plgpu.BlockSpec, *step):
    """Of an array in device memory: a step's block."""
    index = zip(spec.index_map(*step), spec.block_shape, strict=True)
    return tuple(i if size is None else pl.ds(i * size, size) for i, size in index)


def _fetch(pairs, barrier):
    for source, target in pairs:
        plgpu.copy_gmem_to_smem(source, target, barrier)
    plgpu.barrier_wait(barrier)


def _forward_kernel(q_ref, k_ref, v_ref, o_ref, lse_ref, q_smem, o_smem, lse_smem, barrier, *, tiles: _Tiles):
    box, windows, split, spec = tiles.here()
    layout = _layout(q_ref.dtype)
    wide = functools.partial(_wide, layout=layout)
    _fetch([(q_ref.at[box], q_smem)], barrier)
    q = _read(q_smem, layout) * WIDTH**-0.5

    def step(_, k_smem, v_smem, carry):
        top, total, out = carry
        scores = (q * _read(k_smem, layout)).sum(axis=1)
        v = _read(v_smem, layout)
        plgpu.commit_smem()  # all threads have read: later keys may overwrite these
        new = jnp.maximum(top, scores)
        old, weights = jnp.exp(top - new), jnp.exp(scores - new)
        return new, total * old + weights, out * wide(old) + wide(weights) * v

    full = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), layout.reduce(1))
    zeros = plgpu.layout_cast(jnp.zeros((ROWS, WIDTH), jnp.float32), layout)
    pipeline = plgpu.emit_pipeline(
        step,
        grid=tiles.steps,
        in_specs=[spec, spec],
        max_concurrent_steps=_fetched_ahead(q_ref.dtype),
        init_carry=(full(-jnp.inf), full(0.0), zeros),
    )
    top, total, out = pipeline(k_ref, v_ref)
    o_smem[...] = (out / wide(total)).astype(o_smem.dtype)
    lse_smem[...] = top + jnp.log(total)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(o_smem, o_ref.at[(split, *box)])
    plgpu.copy_smem_to_gmem(lse_smem, lse_ref.at[(split, *windows)])
    plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
    q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, dq_ref, dk_ref, dv_ref,
    q_smem, do_smem, lse_smem, delta_smem, dq_smem, dk_smem, dv_smem, barrier, *, tiles: _Tiles,
):  # fmt: skip
    box, windows, split, spec = tiles.here()
    layout = _layout(q_ref.dtype)
    wide = functools.partial(_wide, layout=layout)
    place = lambda p, r: _slices(spec, p, r)
    _fetch(
        [
            (q_ref.at[box], q_smem),
            (do_ref.at[box], do_smem),
            (lse_ref.at[windows], lse_smem),
            (delta_ref.at[windows], delta_smem),
        ],
        barrier,
    )
    q, do = _read(q_smem, layout) * WIDTH**-0.5, _read(do_smem, layout)
    lse, delta = (plgpu.layout_cast(ref[...], layout.reduce(1)) for ref in (lse_smem, delta_smem))

    def step(indices, k_smem, v_smem, dq):
        k, v = _read(k_smem, layout), _read(v_smem, layout)
        weights = jnp.exp((q * k).sum(axis=1) - lse)
        d_scores = weights * ((do * v).sum(axis=1) - delta)
        buffer = jax.lax.rem(indices[0] * tiles.steps[1] + indices[1], 2)
        plgpu.wait_smem_to_gmem(2, wait_read_only=True)  # only copies of the step before may still read
        dk_smem[buffer] = (wide(d_scores) * q).astype(dk_smem.dtype)
        dv_smem[buffer] = (wide(weights) * do).astype(dv_smem.dtype)
        plgpu.commit_smem()  # all threads have written these, and read the step's keys and values
        plgpu.copy_smem_to_gmem(dk_smem.at[buffer], dk_ref.at[place(*indices)])
        plgpu.copy_smem_to_gmem(dv_smem.at[buffer], dv_ref.at[place(*indices)])
        return dq + wide(d_scores) * k

    pipeline = plgpu.emit_pipeline(
        step,
        grid=tiles.steps,
        in_specs=[spec, spec],
        max_concurrent_steps=_fetched_ahead(q_ref.dtype),
        init_carry=plgpu.layout_cast(jnp.zeros((ROWS, WIDTH), jnp.float32), layout),
    )
    dq = pipeline(k_ref, v_ref)
    dq_smem[...] = (dq * WIDTH**-0.5).astype(dq_smem.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(dq_smem, dq_ref.at[(split, *box)])
    plgpu.wait_smem_to_gmem(0)


def _tiles(q, k) -> _Tiles:
    batch, gq, _, heads, _ = q.shape
    return _Tiles(batch * gq, gq, k.shape[1] // gq, heads)


def forward(
    q: Float[Array, "B gq gq H D"], k: Float[Array, "B g g H D"], v: Float[Array, "B g g H D"], window: int, interpret
):
    """(the output, shaped as q; residuals of the backward pass besides q, k and v). ``interpret``: False, or
    plgpu.InterpretGPUParams to run on a CPU."""
    tiles = _tiles(q, k)
    part, block = tiles.parts(q.dtype), (ROWS, WIDTH)
    out, lse = plgpu.kernel(
        functools.partial(_forward_kernel, tiles=tiles),
        out_type=[part, jax.ShapeDtypeStruct((tiles.splits, *tiles.sums()), jnp.float32)],
        scratch_types=[
            plgpu.SMEM(block, q.dtype),
            plgpu.SMEM(block, part.dtype),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(),
        ],
        interpret=interpret,
        kernel_name="windowed_attention_forward",
        **tiles.grid,
    )(tiles.queries(q), tiles.keys(k), tiles.keys(v))
    whole = jax.nn.logsumexp(lse, axis=0)
    if tiles.splits > 1:
        shares = tiles.by_query(jnp.exp(lse - whole))
        out = (out.reshape(*shares.shape[:-1], WIDTH) * shares).sum(0, keepdims=True).astype(q.dtype)
    out = out.reshape(q.shape)
    return out, (out, whole)


def backward(q, k, v, residuals, do, window: int, interpret):
    """Gradients of q, k and v."""
    tiles = _tiles(q, k)
    out, lse = residuals
    delta = (do.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).reshape(tiles.rows, tiles.gq, tiles.heads)
    part, block, row = tiles.parts(q.dtype), (ROWS, WIDTH), plgpu.SMEM((ROWS,), jnp.float32)
    k_rows, v_rows = tiles.keys(k), tiles.keys(v)
    dq, dk, dv = plgpu.kernel(
        functools.partial(_backward_kernel, tiles=tiles),
        out_type=[part, jax.ShapeDtypeStruct(k_rows.shape, k.dtype), jax.ShapeDtypeStruct(v_rows.shape, v.dtype)],
        scratch_types=[
            plgpu.SMEM(block, q.dtype),
            plgpu.SMEM(block, q.dtype),
            row,
            row,
            plgpu.SMEM(block, part.dtype),
            plgpu.SMEM((2, *block), k.dtype),
            plgpu.SMEM((2, *block), v.dtype),
            plgpu.Barrier(num_arrivals=4),
        ],
        interpret=interpret,
        kernel_name="windowed_attention_backward",
        **tiles.grid,
    )(tiles.queries(q), k_rows, v_rows, tiles.queries(do), lse, tiles.by_block(delta))
    return dq.sum(0).astype(q.dtype).reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
