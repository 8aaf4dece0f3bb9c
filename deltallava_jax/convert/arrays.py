"""Loads a checkpoint's tensors onto the devices: to each device its shard only, in chunks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from deltallava_jax.convert.tensors import Tensor
from deltallava_jax.models.decoder import MATRICES
from deltallava_jax.models.names import TRANSFORMS, Entry

ROWS = {"same": 0, "linear": 1}  # our axis of a torch matrix's rows
READERS = 4  # threads that read
CHUNK = 64 * 2**20  # about the bytes that are read at a time


def load_array(entry: Entry, parts: list[Tensor], sharding: Sharding, dtype: str | None) -> jax.Array:
    """One parameter. Each device gets its shard in the layout of the file, and transposes it there: on the host that
    takes longer than reading. Stacks are filled some layers at a time and large matrices some rows at a time, so that
    memory holds little more than the parameter."""
    kind = functools.reduce(np.promote_types, (part.dtype for part in parts))
    wanted = jnp.dtype(dtype) if dtype and jnp.issubdtype(kind, jnp.floating) else kind
    source = _source_sharding(entry, sharding)
    shape = _our_shape(entry, parts)
    if entry.stacked:
        total = len(parts)
        size = parts[0].bytes
        put = functools.partial(_put_layers, parts, kind, source)
    else:
        total = max((*parts[0].shape, 1)[0], 1)
        size = parts[0].bytes // total
        put = functools.partial(_put_rows, parts[0], kind, source)
        if entry.kind not in ROWS or parts[0].bytes <= CHUNK or not isinstance(sharding, SingleDeviceSharding):
            return to_ours(entry, wanted, sharding)(put(slice(None)))
    whole = jax.jit(lambda: jnp.zeros(shape, wanted), out_shardings=sharding)()
    insert = inserter(entry, wanted, sharding)
    count = max(1, CHUNK // size)
    for first in range(0, total, count):
        chunk = put(slice(first, min(first + count, total)))
        whole = jax.block_until_ready(insert(whole, chunk, first))  # so that chunks do not accumulate
    return whole


def unstacked_arrays(
    entry: Entry, parts: list[Tensor], sharding: Sharding, dtype: str | None, compute: str
) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of one of the decoder's parameters in the form of ``decoder.unstacked``, which is the file's: a
    stack layer by layer, as "decoder/layers/3/q/kernel", and matrices not transposed, in the compute dtype."""
    kind = functools.reduce(np.promote_types, (part.dtype for part in parts))
    wanted = dtype or (compute if entry.path.endswith(MATRICES) else kind)
    sharding = _source_sharding(entry, sharding)
    if entry.stacked and isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))
    cast = _to_ours("same", jnp.dtype(wanted), sharding)
    for number, part in enumerate(parts):
        path = entry.path.replace("layers/", f"layers/{number}/") if entry.stacked else entry.path
        yield path, jax.block_until_ready(cast(_put_rows(part, kind, sharding, slice(None))))


def _our_shape(entry: Entry, parts: list[Tensor]) -> tuple[int, ...]:
    shape = TRANSFORMS[entry.kind][0](np.broadcast_to(False, parts[0].shape)).shape
    return (len(parts), *shape) if entry.stacked else shape


def _put_rows(part: Tensor, kind, sharding: Sharding, cut: slice) -> jax.Array:
    """A tensor (or some of its rows, on one device) in the layout of the file, with ``sharding``."""
    if cut != slice(None):
        return jax.device_put(part.read((cut,)).astype(kind, copy=False), sharding)
    return jax.make_array_from_callback(part.shape, sharding, lambda index: part.read(index).astype(kind, copy=False))


def _put_layers(parts: list[Tensor], kind, sharding: Sharding, cut: slice) -> jax.Array:
    """Some layers of a stack in the layout of the file, with ``sharding``."""
    layers = parts[cut]
    shape = (len(layers), *layers[0].shape)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        chosen = layers[index[0]]
        block = np.empty([len(range(*c.indices(size))) for c, size in zip(index, shape, strict=True)], kind)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda row: chosen[row].read_into(block[row], index[1:]), range(len(chosen))))
        return block

    return jax.make_array_from_callback(shape, sharding, shard)


def to_ours(entry: Entry, dtype, sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """The compiled function from a tensor to our array, with ``sharding``."""
    return _to_ours(entry.kind, jnp.dtype(dtype), sharding)


@functools.lru_cache(maxsize=256)
def _to_ours(kind: str, dtype, sharding: Sharding):
    return jax.jit(lambda x: TRANSFORMS[kind][0](x).astype(dtype), out_shardings=sharding)


def inserter(entry: Entry, dtype, sharding: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The compiled function that writes some layers or rows into our array, in place."""
    return _inserter(entry.kind, entry.stacked, jnp.dtype(dtype), sharding)


@functools.lru_cache(maxsize=256)  # one compilation for equal shapes
def _inserter(kind: str, stacked: bool, dtype, sharding: Sharding):
    transform = jax.vmap(TRANSFORMS[kind][0]) if stacked else TRANSFORMS[kind][0]
    axis = 0 if stacked else ROWS[kind]

    def insert(whole, x, at):
        return jax.lax.dynamic_update_slice_in_dim(whole, transform(x).astype(dtype), at, axis)

    return jax.jit(insert, donate_argnums=0, out_shardings=sharding)


def _source_sharding(entry: Entry, sharding: Sharding) -> Sharding:
    """The sharding of the tensors in torch's axes; replicated if the transform does more than swap two axes."""
    if not isinstance(sharding, NamedSharding) or entry.kind == "same":
        return sharding
    spec = list(sharding.spec)
    if entry.kind == "linear" and len(spec) >= 2:
        return NamedSharding(sharding.mesh, P(*spec[:-2], spec[-1], spec[-2]))
    return NamedSharding(sharding.mesh, P())
