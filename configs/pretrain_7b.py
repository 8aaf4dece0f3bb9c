"""Stage 1 of Delta-LLaVA-7B: 558k captions, the projector alone trains, 144 tokens an image."""

from configs.llava import base


def get_config():
    # A quarter of the 576 patches, in cells of 2 x 2: of the budgets in the paper's Table 4 the largest below LLaVA's.
    # The projector is the release's, so that its published code can run the weights.
    return base("delta", "pretrain", dict(name="delta", scale_factor=2), tokens=144)
