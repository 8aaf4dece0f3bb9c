"""LLaVA-1.5's two stages, which all 7B and 13B runs share: ``base`` makes the configuration of a system and a stage.

Stage 1 (pretrain) trains the projector on 558k captions, stage 2 (finetune) projector and decoder on 665k
conversations; 256 and 128 conversations a step, one epoch each (haotian-liu/LLaVA, scripts/v1_5).

Expected beside the working directory: data/LLaVA-Pretrain/, data/LLaVA-Tuning/ with the JSON files and images, and
runs/NAME_start, made by ``convert``; stage 1 goes to runs/NAME_pretrain, where stage 2 begins."""

from deltallava_jax import config as c
from deltallava_jax.errors import ConfigError

ROW = 3072  # slots of a row, about: long enough that few large conversations leave no gaps
MEAN_TEXT = {"pretrain": 40, "finetune": 300}  # tokens of a conversation, about: decides how large a batch is
CONVERSATIONS = {"pretrain": 256, "finetune": 128}


def base(
    name: str,
    stage: str,
    projector: dict,
    *,
    tokens: int,
    vision: str = "clip_l_14_336",
    decoder: str = "vicuna_7b",
    template: str = "vicuna_v1",
    training: dict = {},
) -> c.Config:
    """tokens: visual tokens an image, the most: rows hold as many conversations as fit."""
    if stage not in MEAN_TEXT:
        raise ConfigError(f"the configuration has the stages pretrain and finetune, not {stage!r}")
    pretrain = stage == "pretrain"
    slots = CONVERSATIONS[stage] * (MEAN_TEXT[stage] + tokens)
    rows = 16 * max(1, round(slots / ROW / 16))  # so that 8 or 16 devices share them
    data = c.DataConfig(
        dataset="llava",
        json=("data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",)
        if pretrain
        else ("data/LLaVA-Tuning/llava_v1_5_mix665k.json",),
        images="data/LLaVA-Pretrain/images" if pretrain else "data/LLaVA-Tuning",
        template="plain" if pretrain else template,
        aspect="squash" if vision.startswith("siglip") else "square" if pretrain else "pad",
        rows=rows,
        row_length=128 * round(slots / rows / 128),
        workers=8,
    )
    return c.Config(
        name=f"{name}_{stage}",
        init_from=f"runs/{name}_start" if pretrain else f"runs/{name}_pretrain",
        model=c.compose(
            c.preset(c.VisionConfig, vision),
            c.preset(c.DecoderConfig, decoder),
            projector,
            dtype="bfloat16",
            remat="full",
        ),
        data=data,
        optimizer=c.OptimizerConfig(
            lr=1e-3 if pretrain else 2e-5, frozen=("^vision/", "^decoder/") if pretrain else ("^vision/",)
        ),
        training=c.TrainingConfig(**dict(epochs=1, checkpoint_every=500) | training),
        mesh=c.MeshConfig(data=1, fsdp=-1),
    )
