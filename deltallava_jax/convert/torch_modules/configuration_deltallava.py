"""Configuration of a Delta-LLaVA model for transformers. Exported by deltallava_jax; needs no JAX."""

from transformers import AutoConfig, PretrainedConfig

DEFAULT_SELECT = {
    "last": 23,
    "levels": [12, 16, 22, 23],
    "cls_attention": None,
    "keys": None,
    "pruned": [],
    "drop_cls": True,
}


class DeltaLlavaConfig(PretrainedConfig):
    """vision_config, text_config: the tower's and the decoder's. deltallava_projector: the projector's settings.

    select: the tower's outputs that the projector uses, hidden state i being the output of layer i: {"last", "levels",
    "drop_cls"}, "cls_attention": a layer and "head_mean" or "one_head", "keys": a layer, each null if unused. "pruned":
    the layers, from 0, that the projector applies.
    budgets: visual tokens per image that the projector was trained for, largest first."""

    model_type = "deltallava"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        deltallava_projector=None,
        select=None,
        budgets=(144,),
        image_token_index=32000,
        **kwargs,
    ):
        self.vision_config = _config(vision_config, "clip_vision_model")
        self.text_config = _config(text_config, "llama")
        self.deltallava_projector = deltallava_projector or {}
        self.select = select or DEFAULT_SELECT
        self.budgets = list(budgets)
        self.image_token_index = image_token_index
        super().__init__(**kwargs)


def _config(section, default):
    if section is None or isinstance(section, dict):
        section = dict(section or {})
        return AutoConfig.for_model(section.pop("model_type", default), **section)
    return section
