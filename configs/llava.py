"""LLaVA-1.5's two stages with any system, CLIP-L/14 at 336 pixels (24 x 24 patches) and Vicuna-7B.

``configs/llava.py:SYSTEM-STAGE``: a system of ``SYSTEMS``, and a stage. Stage 1 (pretrain) trains the projector on 558k
captions, stage 2 (finetune) projector and decoder on 665k conversations; 256 and 128 conversations a step, one epoch
each (haotian-liu/LLaVA, scripts/v1_5). Without a stage it is finetune, without a system Delta.

Expected beside the working directory: data/LLaVA-Pretrain/, data/LLaVA-Tuning/ with the JSON files and images, and
runs/SYSTEM_start, made by ``convert``; stage 1 goes to runs/SYSTEM_pretrain, where stage 2 begins."""

from dataclasses import replace

from deltallava_jax import config as c
from deltallava_jax.errors import ConfigError

# Settings of ``base`` by system. What the projector does not set is as published with it.
SYSTEMS = {
    "delta": dict(projector=dict(name="delta", scale_factor=2), tokens=144),  # as the public code has it
    "delta_paper": dict(projector=dict(name="delta", variant="paper", scale_factor=2), tokens=144),  # by its equations
    "delta_elastic": dict(  # a budget is drawn each step: 576, 144, 64, 36, 16, 4 or 1 tokens from one set of weights
        projector=dict(name="delta", scale_factor=(1, 2, 3, 4, 6, 12, 24)),
        tokens=64,  # between the mean of the budgets and their median
    ),
    # The paper's ablations: without self-attention, without the low-rank updates, without the block.
    "delta_no_emhsa": dict(projector=dict(name="delta", scale_factor=2, ablation="no_emhsa"), tokens=144),
    "delta_no_delta": dict(projector=dict(name="delta", scale_factor=2, ablation="no_delta"), tokens=144),
    "delta_no_tb": dict(projector=dict(name="delta", scale_factor=2, ablation="no_tb"), tokens=144),
    # Other towers: 16 x 16 and 27 x 27 patches.
    "delta_clip_224": dict(projector=dict(name="delta", scale_factor=2), tokens=64, vision="clip_l_14_224"),
    "delta_siglip": dict(  # heads of 144, and 32 in the block, divide its width of 1152
        projector=dict(name="delta", scale_factor=3, head_dim=144), tokens=81, vision="siglip_so400m_14_384"
    ),
    "mlp": dict(projector=dict(name="mlp"), tokens=576),  # LLaVA-1.5's: every patch is a token
    "llavolta": dict(  # the MLP, its tokens pooled inside the decoder for the first three quarters of stage 2
        projector=dict(name="mlp"), tokens=576, training=dict(llavolta=((8, 2), (2, 2), (2, 16), (1, 0)))
    ),
    "token_packer": dict(projector=dict(name="token_packer", scale_factor=2), tokens=144),
    # Matryoshka Multimodal Models: from LLaVA-1.5, each step averages the loss of five scales.
    "m3": dict(projector=dict(name="m3"), tokens=576, training=dict(every_budget=True)),
    "mqt": dict(projector=dict(name="mqt"), tokens=256),  # one of eight numbers of queries is drawn each step
    "quecc": dict(projector=dict(name="quecc", scale_factor=4), tokens=36),  # reads the question
    "resampler": dict(projector=dict(name="resampler", queries=144), tokens=144),  # Qwen-VL's
    "honeybee_c": dict(projector=dict(name="honeybee_c", scale_factor=2), tokens=144),  # the C-Abstractor
    "honeybee_d": dict(projector=dict(name="honeybee_d", scale_factor=2), tokens=144),  # the D-Abstractor
    # What leaves the tower with the published ratios.
    "evit": dict(projector=dict(name="evit"), tokens=201),
    "dynamicvit": dict(projector=dict(name="dynamicvit"), tokens=197),
    # Patches selected by the CLS token's attention; PruMerge's 72 with the published ratio, and one token of the rest.
    "prumerge": dict(projector=dict(name="prumerge"), tokens=73),
    "prumerge_plus": dict(projector=dict(name="prumerge_plus"), tokens=145),
    "fastervlm": dict(projector=dict(name="fastervlm", tokens=(144,)), tokens=144),
    # Controls: of every projector, each cell's patches averaged before the MLP; of every selection, random patches,
    # others in each step of the training.
    "average_pooling": dict(projector=dict(name="average_pooling", scale_factor=2), tokens=144),
    "random": dict(projector=dict(name="random", tokens=(144,)), tokens=144),
}
# What stage 1 has otherwise: MQT all of its queries, LLaVolta no pooling.
PRETRAIN = {"mqt": dict(projector=dict(name="mqt", tokens=(256,))), "llavolta": dict(training={})}

ROW = 3072  # slots of a row, about: long enough that few large conversations leave no gaps
MEAN_TEXT = {"pretrain": 40, "finetune": 300}  # tokens of a conversation, about: decides how large a batch is
CONVERSATIONS = {"pretrain": 256, "finetune": 128}


def get_config(which: str = "finetune") -> c.Config:
    system, stage = c.system_and_stage(which, SYSTEMS)
    changes = PRETRAIN.get(system, {}) if stage == "pretrain" else {}
    return base(system, stage, **SYSTEMS[system] | changes)


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
    """tokens: visual tokens an image that the batch is sized for: its rows hold as many conversations as fit."""
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
        template="plain" if pretrain else template,  # captions alone: stage 1 has no instructions
        # CLIP's processor crops, and LLaVA pads in stage 2 so that nothing is cut off; SigLIP's processor squashes.
        aspect="squash" if vision.startswith("siglip") else "square" if pretrain else "pad",
        rows=rows,
        row_length=128 * round(slots / rows / 128),  # a multiple of 128: whole tiles of an attention kernel
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
            remat="auto",  # what the devices have room for
            loss_chunk=2048,  # two parts of a row: 0.9 GiB of logits for two rows of a device
        ),
        data=data,
        # LLaVA's rates: a fresh projector alone takes a larger one than a pretrained decoder with it.
        optimizer=c.OptimizerConfig(
            lr=1e-3 if pretrain else 2e-5, frozen=("^vision/", "^decoder/") if pretrain else ("^vision/",)
        ),
        training=c.TrainingConfig(**dict(epochs=1, checkpoint_every=500) | training),
        mesh=c.MeshConfig(data=1, fsdp=-1),  # 7B parameters in float32 with AdamW's moments are 81 GB
    )


def adapted(cfg: c.Config, name: str, *, lr: float = 2e-4, **lora) -> c.Config:
    """The same with adapters on the decoder's layers in place of its full tuning, as LLaVA-1.5 publishes them
    (haotian-liu/LLaVA, scripts/v1_5/finetune_lora.sh): rank 128, alpha 256, dropout 0.05; the projector trains whole
    beside them, at stage 2's rate. lora: other settings of ``LoraConfig``."""
    optimizer = replace(cfg.optimizer, lr=lr, frozen=("^vision/", "^decoder/"), rates={"^projector/": 2e-5})
    return replace(cfg, name=name, lora=c.LoraConfig(**lora), optimizer=optimizer)
