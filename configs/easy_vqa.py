"""easy-VQA from scratch in minutes on a laptop: tower, Delta projector at 16 tokens an image, and decoder all train."""

from deltallava_jax import config as c


def get_config() -> c.Config:
    return c.Config(
        name="easy_vqa",
        model=c.compose(
            c.preset(c.VisionConfig, "tiny"),
            c.preset(c.DecoderConfig, "tiny"),
            dict(name="delta", scale_factor=2, head_dim=32, select_layer=-1),
            dtype="float32",
        ),
        data=c.DataConfig(dataset="easy_vqa", template="brief", independent_rounds=True, rows=8, row_length=512),
        optimizer=c.OptimizerConfig(lr=1e-3, warmup_ratio=0.1, final_lr_ratio=0.02, b2=0.99, weight_decay=0.05),
        training=c.TrainingConfig(epochs=8, log_every=10, eval_every=400, checkpoint_every=200),
        evaluation=c.EvaluationConfig(max_new_tokens=4),
    )
