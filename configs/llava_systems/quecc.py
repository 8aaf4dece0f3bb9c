"""QueCC, which reads the question, 36 tokens."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("quecc", stage, dict(name="quecc", scale_factor=4), tokens=36)
