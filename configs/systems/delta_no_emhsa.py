"""Delta without the self-attention of the block and of the refinement."""

from configs.easy_vqa import base


def get_config():
    return base("delta_no_emhsa", dict(name="delta", variant="paper", scale_factor=2, ablation="no_emhsa"))
