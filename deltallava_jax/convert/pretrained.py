"""A model from a checkpoint, as the converter passes it on: its parts, its adapters, and how it was written."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import jax

from deltallava_jax.arrays import Array
from deltallava_jax.config import (
    DecoderConfig,
    LoraConfig,
    ModelConfig,
    ProjectorConfig,
    VisionConfig,
    from_dict,
    renamed,
    to_dict,
)
from deltallava_jax.convert.chat_template import FALLBACK
from deltallava_jax.convert.families import decoder_family, tower_family
from deltallava_jax.convert.tensors import Tensor
from deltallava_jax.errors import ConfigError, ConversionError
from deltallava_jax.models import lora, systems
from deltallava_jax.models.layers import Params
from deltallava_jax.models.names import Entry, flatten, linear, prefixed, require_match, unflatten
from deltallava_jax.models.vision import check_needs


@dataclass(frozen=True)
class CheckpointLayout:
    """The prefix of each part's tensors in a checkpoint, None for a part that the checkpoint lacks.

    hf_projector: the MLP's layers are linear_1 and linear_2, as in Hugging Face models, not 0 and 2."""

    vision: str | None = None
    projector: str | None = None
    decoder: str | None = None
    head: str | None = None
    hf_projector: bool = False

    def name_table(self, cfg: ModelConfig) -> list[Entry]:
        """The name table of the whole checkpoint."""
        table = []
        if cfg.vision:
            table += prefixed(tower_family(cfg.vision).name_table(cfg.vision), self.vision, "vision/")
        if cfg.projector:
            if systems.system(cfg.projector).is_llava and self.hf_projector:
                names = linear("linear_1", "up") + linear("linear_2", "down")
            else:
                names = systems.name_table(cfg.projector)
            table += prefixed(names, self.projector, "projector/")
        if cfg.decoder:
            family = decoder_family(cfg.decoder)
            table += prefixed(family.name_table(cfg.decoder), self.decoder, "decoder/")
            table += prefixed(family.head_name_table(cfg.decoder), self.head, "decoder/")
        return table


@dataclass
class Pretrained:
    """A model from a checkpoint: ``cfg`` and ``params`` hold the parts that it has.

    layout, hf (config.json), origin and origin_aspect (config.json in our terms): as the checkpoint was written. kept:
    the files beside the weights. extra: tensors that the model does not use, such as SigLIP's pooling head, kept for
    exports in the same layout. template, aspect: of the training data, as in DataConfig. lora, adapters: float32
    adapters beside ``params``, {path: array}; base_name: what ``params`` were called where they were trained;
    trained_whole: parameters that were trained beside adapters and projector, and so are not the base's."""

    cfg: ModelConfig
    params: Params
    layout: CheckpointLayout | None = None
    origin: ModelConfig | None = None
    hf: dict = field(default_factory=dict)
    kept: list[Path] = field(default_factory=list)
    extra: dict[str, Tensor] = field(default_factory=dict)
    template: str = FALLBACK
    aspect: str = "square"
    origin_aspect: str = "square"
    lora: LoraConfig | None = None
    adapters: dict[str, Array] = field(default_factory=dict)
    base_name: str = ""
    trained_whole: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        """Number of parameters, those of the adapters included."""
        return sum(leaf.size for leaf in jax.tree.leaves((self.params, self.adapters)))

    @property
    def base(self) -> Pretrained:
        """The model without its adapters."""
        return dataclasses.replace(self, lora=None, adapters={}, trained_whole=[])

    def require_base(self, what: str) -> None:
        """Raises ConversionError where adapters belong to another model than their base with another projector."""
        if self.trained_whole:
            raise ConversionError(
                f"{what} holds adapters and projector alone, but {len(self.trained_whole)} other parameters were "
                f"trained, e.g. {self.trained_whole[0]}; --to peft writes them into its base, --merge a whole model"
            )

    def merged(self) -> Pretrained:
        """The model with its adapters, if it has any, in its matrices: added in float32, in the matrices' dtypes."""
        if self.lora is None:
            return self
        dtypes = {path: leaf.dtype for path, leaf in flatten(self.params).items()}
        params = lora.quantize(self.params, self.lora.base)  # what the adapters were trained with
        params = lora.merged(unflatten(flatten(params) | self.adapters), self.lora, dtypes.__getitem__)
        return dataclasses.replace(self.base, params=params)

    def cast(self, dtype: str) -> Pretrained:
        """The model with parameters of another dtype; adapters stay float32."""
        return dataclasses.replace(self, params=jax.tree.map(lambda leaf: leaf.astype(dtype), self.params))

    def with_projector(self, settings: dict) -> Pretrained:
        """The same weights with other settings of the projector, such as scale_factor. Raises ConfigError."""
        if self.cfg.projector is None:
            raise ConfigError(f"the model has no projector, so {', '.join(settings)} cannot be set")
        projector = renamed(self.cfg.projector, settings)
        validate_projector(projector, self.params["projector"])
        cfg = dataclasses.replace(self.cfg, projector=projector)
        validate_tower(cfg)
        return dataclasses.replace(self, cfg=cfg)


def validate_projector(cfg: ProjectorConfig, params: Params) -> None:
    """Raises WeightMismatch with both sides if the parameters' names or shapes are not those of the config."""
    ours = shapes_of({"projector": jax.eval_shape(lambda: systems.init_params(cfg, jax.random.key(0)))})
    require_match([Entry(path, path) for path in ours], shapes_of({"projector": params}), ours)


def shapes_of(params: Params) -> dict[str, tuple[int, ...]]:
    return {path: leaf.shape for path, leaf in flatten(params).items()}


def validate_tower(cfg: ModelConfig) -> None:
    """Raises ConfigError if the tower lacks what the projector reads: a layer, the CLS token's attention."""
    if cfg.vision and cfg.projector:
        check_needs(cfg.vision, systems.needs(cfg.projector, cfg.vision.layers))


def fitted(
    cfg: ProjectorConfig, vision: VisionConfig, decoder: DecoderConfig, settings: dict, where: str
) -> ProjectorConfig:
    """The config of a trained projector between that tower and that decoder, with ``settings``.

    Raises ConversionError, naming ``where`` it is from, if its widths are others; ConfigError."""
    for key, value in (("in_width", vision.width), ("out_width", decoder.width)):
        if getattr(cfg, key) != value:
            raise ConversionError(f"{where} has {key}={getattr(cfg, key)}, but the model needs {value}")
    return from_dict(ProjectorConfig, to_dict(cfg) | {"grid": vision.grid} | settings, "projector.")


def joined(tower: Pretrained, text: Pretrained, cfg: ProjectorConfig, weights: Params) -> Pretrained:
    """The model of one checkpoint's tower, another's decoder, and a projector. Raises ConfigError, WeightMismatch."""
    validate_projector(cfg, weights)
    params = {"vision": tower.params["vision"], "projector": weights, "decoder": text.params["decoder"]}
    whole = ModelConfig(tower.cfg.vision, cfg, text.cfg.decoder, dtype=text.cfg.dtype)
    validate_tower(whole)
    kept = [file for file in text.kept if file.name not in ("config.json", "preprocessor_config.json")]
    kept += [file for file in tower.kept if file.name == "preprocessor_config.json"]
    return Pretrained(whole, params, None, None, text.hf, kept, aspect=tower.aspect)
