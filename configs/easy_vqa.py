"""easy-VQA from scratch in minutes on a laptop: tower, Delta projector at 16 tokens an image, and decoder all train."""

from deltallava_jax import config as c


def get_config() -> c.Config:
    # The paper's variant of the projector learns faster from scratch than the release's, which has no residual path.
    # Rows of two conversations, which fill them better at this length than at the systems' 256.
    return base("easy_vqa", dict(name="delta", variant="paper", scale_factor=2), data=dict(row_length=232))


def base(name: str, projector: dict, *, data: dict = {}, training: dict = {}) -> c.Config:
    """The run with another projector and other settings of its sections: configs/systems/ are made of it."""
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
