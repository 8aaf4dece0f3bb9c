"""FasterVLM: the 144 patches that the CLS token looks at."""

from configs.llava import base


def get_config(stage="finetune"):
    return base("fastervlm", stage, dict(name="fastervlm", tokens=(144,)), tokens=144)
