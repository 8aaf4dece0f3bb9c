from deltallava_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        name="v1",
        model=c.compose(
            c.VisionConfig(image_size=16, patch_size=4, width=16, layers=2, heads=2, mlp_width=32),
            c.DecoderConfig(
                vocab_size=300, width=16, layers=2, heads=2, kv_heads=1, mlp_width=32, tied_head=True,
                initializer_range=0.2,
            ),
            dict(scale_factor=(2, 4), head_dim=8, block_head_dim=8, rank=2, initializer_range=0.2),
            dtype="float32",
        ),
        data=c.DataConfig(
            dataset="llava", json=("records.json",), images="pictures", template="brief", rows=4, row_length=64,
            workers=0,
        ),
        optimizer=c.OptimizerConfig(lr=1e-2),
        training=c.TrainingConfig(steps=4, log_every=1, checkpoint_every=2, keep_checkpoints=1),
    )  # fmt: skip
