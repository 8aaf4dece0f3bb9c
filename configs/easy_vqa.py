"""easy-VQA from scratch in minutes on a laptop: tower, projector and decoder all train.

``configs/easy_vqa.py`` is Delta at 16 tokens an image; ``configs/easy_vqa.py:SYSTEM`` the same run with another system,
one of ``SYSTEMS``. The tower's grid is 8 x 8 patches."""

from deltallava_jax import config as c

# Settings of ``base`` by system.
SYSTEMS = {
    "delta": dict(projector=dict(name="delta", variant="paper", scale_factor=2)),
    "delta_release": dict(projector=dict(name="delta", variant="release", scale_factor=2)),  # as the public code has it
    "delta_elastic": dict(  # a budget is drawn each step: 64, 16, 4 or 1 tokens from one set of weights
        projector=dict(name="delta", variant="paper", scale_factor=(1, 2, 4, 8)),
        data=dict(row_length=320),  # holds two images at 64 tokens
    ),
    # The paper's ablations: without self-attention, without the low-rank updates, without the block.
    "delta_no_emhsa": dict(projector=dict(name="delta", variant="paper", scale_factor=2, ablation="no_emhsa")),
    "delta_no_delta": dict(projector=dict(name="delta", variant="paper", scale_factor=2, ablation="no_delta")),
    "delta_no_tb": dict(projector=dict(name="delta", variant="paper", scale_factor=2, ablation="no_tb")),
    # LLaVA-1.5's: every patch is a token. PruMerge, FasterVLM and FastV run on its model without training.
    "mlp": dict(projector=dict(name="mlp", select_layer=-2), data=dict(row_length=512)),
    "llavolta": dict(  # the MLP, its tokens pooled inside the decoder for the first three quarters of the training
        projector=dict(name="mlp", select_layer=-2),
        data=dict(row_length=512),
        training=dict(llavolta=((8, 1), (2, 1), (2, 2), (1, 0))),  # layers of the decoder's three
    ),
    "token_packer": dict(projector=dict(name="token_packer", scale_factor=2)),
    # Matryoshka Multimodal Models: each step averages the loss of all scales.
    "m3": dict(projector=dict(name="m3", scale_factor=(2, 4, 8)), training=dict(every_budget=True)),
    # Matryoshka Query Transformer: the number of queries is drawn each step.
    "mqt": dict(projector=dict(name="mqt", queries=64, tokens=(16, 4, 1))),
    "quecc": dict(  # reads the image anew for each question, so a conversation has one
        projector=dict(name="quecc", scale_factor=2, question_length=24),
        data=dict(turns=1, independent_rounds=False, images_per_row=8),
    ),
    "resampler": dict(projector=dict(name="resampler", queries=16)),  # Qwen-VL's
    "honeybee_c": dict(projector=dict(name="honeybee_c", scale_factor=2)),  # the C-Abstractor
    "honeybee_d": dict(projector=dict(name="honeybee_d", scale_factor=2, depth=2)),  # of the published six layers
    # The tower continues with fewer patches: 31, then 16 of 64 tokens with the CLS token's attention to choose (EViT),
    # 32, then 16 with trained predictors (DynamicViT). The tower has three layers, so two of them can drop patches.
    "evit": dict(projector=dict(name="evit", prune_layers=(1, 2), keep_ratio=0.46)),
    "dynamicvit": dict(projector=dict(name="dynamicvit", prune_layers=(1, 2), keep_ratio=0.5)),
}


def get_config(system: str | None = None) -> c.Config:
    if system is None:
        # The paper's variant of the projector learns faster from scratch than the release's, which has no residual
        # path. Rows of two conversations, which fill them better at this length than at the systems' 256.
        return base("easy_vqa", **SYSTEMS["delta"], data=dict(row_length=232))
    return base(system, **c.entry(system, SYSTEMS))


def base(name: str, projector: dict, *, data: dict = {}, training: dict = {}) -> c.Config:
    """The run with a projector and other settings of its sections."""
    # The pictures are mostly white: with these statistics the background is near zero.
    vision = c.preset(c.VisionConfig, "tiny", image_mean=(0.9, 0.9, 0.9), image_std=(0.5, 0.5, 0.5))
    small = dict(head_dim=32, mlp_width=256, select_layer=-1, drop_path=0.0, initializer_range=0.08)
    return c.Config(
        name=name,
        model=c.compose(
            vision,
            c.preset(c.DecoderConfig, "tiny"),
            c.settings_of(projector["name"], small) | projector,
            dtype="float32",
            remat="full",  # on a CPU recomputing takes no longer than storing
        ),
        data=c.DataConfig(
            **dict(
                dataset="easy_vqa",
                aspect="square",
                template="brief",
                independent_rounds=True,
                rows=8,
                row_length=256,
                images_per_row=2,
            )
            | data,
        ),  # fmt: skip
        # Colours are learned within an epoch by any optimizer; shapes take AdamW several times as long as Muon.
        optimizer=c.OptimizerConfig(
            name="muon", lr=1e-3, muon_rate=3.0, final_lr_ratio=0.02, b2=0.99, weight_decay=0.05
        ),
        training=c.TrainingConfig(**dict(epochs=5, log_every=10, eval_every=750, checkpoint_every=250) | training),
        evaluation=c.EvaluationConfig(max_new_tokens=4),
    )
