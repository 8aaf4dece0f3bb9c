"""Loads a model for inference from any folder that holds one. Imported with the package, so it imports lazily."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from deltallava_jax.inference.model import Model


def load(
    path: str | Path,
    *,
    dtype: str | None = None,
    tensor: int = 1,
    template: str | None = None,
    base: str | Path | None = None,
) -> Model:
    """The newest model of a workdir, or of a folder in Hugging Face's or the original LLaVA layout, or of a LoRA
    adapter of peft or LLaVA, merged into its base model.

        model = deltallava_jax.load("runs/easy_vqa")
        model.generate("shape.png", "what color is the shape?")

    dtype: of the parameters and of computing, e.g. "bfloat16"; by default tower and projector keep the saved dtype and
    the decoder's matrices get the compute dtype. tensor: devices to shard every layer over; each reads only its shard.
    template: prompt template, e.g. "chatml", in place of the model's; a decoder alone has none and continues the text.
    base: of an adapter, the folder of its base model, in place of the one that it names.
    Raises ConversionError, CheckpointError or WeightMismatch, naming the file and what was expected; ConfigError for
    an unknown or unfit template, more devices than there are, or a number of devices that does not divide a layer."""
    import dataclasses

    import jax
    from jax.sharding import NamedSharding, SingleDeviceSharding

    from deltallava_jax.config import DTYPES, dtype_name
    from deltallava_jax.convert.read import read
    from deltallava_jax.convert.tensors import is_adapter
    from deltallava_jax.convert.workdir import open_model
    from deltallava_jax.data import tokens
    from deltallava_jax.data.conversation import known_template
    from deltallava_jax.errors import ConfigError, ConversionError
    from deltallava_jax.inference.model import Model
    from deltallava_jax.models.decoder import MATRICES, unstacked
    from deltallava_jax.models.names import flatten, unflatten
    from deltallava_jax.parallel import rules
    from deltallava_jax.parallel.mesh import tensor_mesh
    from deltallava_jax.workdir import Workdir

    if template is not None:
        known_template(template)
    path = Path(path)
    dtype = dtype_name(dtype)
    if tensor < 1:
        raise ConfigError(f"tensor={tensor}; expected a number of devices, 1 or more")
    mesh = tensor_mesh(tensor) if tensor > 1 else None
    first = SingleDeviceSharding(jax.local_devices()[0])

    def shard(name: str, shape: tuple[int, ...]):
        return NamedSharding(mesh, rules.spec_for(name, shape, mesh)) if mesh else first

    def kind(cfg, name: str, saved):
        matrix = name.startswith("decoder/") and name.endswith(MATRICES)
        return dtype or (cfg.dtype if matrix else saved)

    home = Workdir(path)
    folder = path if path.is_dir() else path.parent  # of the tokenizer
    if base is not None and not is_adapter(path):
        raise ConversionError(f"base={base} is for a LoRA adapter; {path} is none")
    if home.exists:
        config = home.config
        cfg = config.model
        own_template = config.data.template
        aspect = config.data.aspect

        def place(name, saved):
            sharding = shard(name, saved.shape)
            return jax.ShapeDtypeStruct(saved.shape, kind(cfg, name, saved.dtype), sharding=sharding)

        params = home.params(place)
    else:
        if is_adapter(path):
            model = open_model(path, base=base and Path(base), merge=True, shard=shard)
            params = {
                name: jax.device_put(leaf.astype(kind(model.cfg, name, leaf.dtype)), shard(name, leaf.shape))
                for name, leaf in flatten(model.params).items()
            }
            model = dataclasses.replace(model, params=unflatten(params))
            folder = next((file.parent for file in model.kept if file.name in tokens.FILES), folder)
        else:
            model = read(path, dtype=dtype, shard=shard, unstacked=True)
        cfg = model.cfg
        params = model.params
        own_template = model.template
        aspect = model.aspect
    if cfg.decoder:
        params["decoder"] = unstacked(params["decoder"], cfg.decoder, donate=True)
    if dtype in DTYPES:
        cfg = dataclasses.replace(cfg, dtype=dtype)
    tokenizer = tokens.load(folder) if any((folder / name).is_file() for name in tokens.FILES) else None
    model = Model(cfg, params, tokenizer, own_template if cfg.whole else None, aspect)
    return model if template is None else model.with_template(template)
