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


def load_array(entry: Entry, parts: list[Tensor], place: Sharding, dtype: str | None) -> jax.Array:
    """One parameter. Each device gets its shard in the layout of the file, and transposes it there: on the host that
    takes longer than reading. Stacks are filled some layers at a time and large matrices some rows at a time, so that
    memory holds little more than the parameter."""
    kind = functools.reduce(np.promote_types, (part.dtype for part in parts))
    wanted = jnp.dtype(dtype) if dtype and jnp.issubdtype(kind, jnp.floating) else kind
    source = _source_sharding(entry, place)
    shape = _our_shape(entry, parts)
    if entry.stacked:
        total = len(parts)
        size = parts[0].bytes
        put = functools.partial(_put_layers, parts, kind, source)
    else:
        total = max((*parts[0].shape, 1)[0], 1)
        size = parts[0].bytes // total
        put = functools.partial(_put_rows, parts[0], kind, source)
        if entry.kind not in ROWS or parts[0].bytes <= CHUNK or not isinstance(place, SingleDeviceSharding):
            return to_ours(entry, wanted, place)(put(slice(None)))
    whole = jax.jit(lambda: jnp.zeros(shape, wanted), out_shardings=place)()
    insert = inserter(entry, wanted, place)
    count = max(1, CHUNK // size)
    for first in range(0, total, count):
        chunk = put(slice(first, min(first + count, total)))
        whole = jax.block_until_ready(insert(whole, chunk, first))  # so that chunks do not accumulate
    return whole


def unstacked_arrays(
    entry: Entry, parts: list[Tensor], place: Sharding, dtype: str | None, compute: str
) -> Iterator[tuple[str, jax.Array]]:
    """(path, array) of one of the decoder's parameters in the form of ``decoder.unstacked``, which is the file's: a
    stack layer by layer, as "decoder/layers/3/q/kernel", and matrices not transposed, in the compute dtype."""
    kind = functools.reduce(np.promote_types, (part.dtype for part in parts))
    wanted = dtype or (compute if entry.path.endswith(MATRICES) else kind)
    place = _source_sharding(entry, place)
    if entry.stacked and isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, P(*place.spec[1:]))
    cast = _to_ours("same", jnp.dtype(wanted), place)
    for number, part in enumerate(parts):
        path = entry.path.replace("layers/", f"layers/{number}/") if entry.stacked else entry.path
        yield path, jax.block_until_ready(cast(_put_rows(part, kind, place, slice(None))))


def _our_shape(entry: Entry, parts: list[Tensor]) -> tuple[int, ...]:
    shape = TRANSFORMS[entry.kind][0](np.broadcast_to(False, parts[0].shape)).shape
    return (len(parts), *shape) if entry.stacked else shape


def _put_rows(part: Tensor, kind, place: Sharding, cut: slice) -> jax.Array:
    """A tensor (or some of its rows, on one device) in the layout of the file, sharded as ``place``."""
    if cut != slice(None):
        return jax.device_put(part.read((cut,)).astype(kind, copy=False), place)
    return jax.make_array_from_callback(part.shape, place, lambda index: part.read(index).astype(kind, copy=False))


def _put_layers(parts: list[Tensor], kind, place: Sharding, cut: slice) -> jax.Array:
    """Some layers of a stack in the layout of the file, sharded as ``place``."""
    layers = parts[cut]
    shape = (len(layers), *layers[0].shape)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        chosen = layers[index[0]]
        block = np.empty([len(range(*c.indices(size))) for c, size in zip(index, shape, strict=True)], kind)
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda row: chosen[row].read_into(block[row], index[1:]), range(len(chosen))))
        return block

    return jax.make_array_from_callback(shape, place, shard)


def to_ours(entry: Entry, dtype, place: Sharding) -> Callable[[jax.Array], jax.Array]:
    """The compiled function from a tensor to our array, sharded as ``place``."""
    return _to_ours(entry.kind, jnp.dtype(dtype), place)


@functools.lru_cache(maxsize=256)
def _to_ours(kind: str, dtype, place: Sharding):
    return jax.jit(lambda x: TRANSFORMS[kind][0](x).astype(dtype), out_shardings=place)


def inserter(entry: Entry, dtype, place: Sharding) -> Callable[[jax.Array, jax.Array, int], jax.Array]:
    """The compiled function that writes some layers or rows into our array, in place."""
    return _inserter(entry.kind, entry.stacked, jnp.dtype(dtype), place)


@functools.lru_cache(maxsize=256)  # one compilation for equal shapes
def _inserter(kind: str, stacked: bool, dtype, place: Sharding):
    transform = jax.vmap(TRANSFORMS[kind][0]) if stacked else TRANSFORMS[kind][0]
    axis = 0 if stacked else ROWS[kind]

    def insert(whole, x, at):
        return jax.lax.dynamic_update_slice_in_dim(whole, transform(x).astype(dtype), at, axis)

    return jax.jit(insert, donate_argnums=0, out_shardings=place)


def _source_sharding(entry: Entry, place: Sharding) -> Sharding:
    """The sharding of the tensors in torch's axes; replicated if the transform does more than swap two axes."""
    if not isinstance(place, NamedSharding) or entry.kind == "same":
        return place
    spec = list(place.spec)
    if entry.kind == "linear" and len(spec) >= 2:
        return NamedSharding(place.mesh, P(*spec[:-2], spec[-1], spec[-2]))
    return NamedSharding(place.mesh, P())
