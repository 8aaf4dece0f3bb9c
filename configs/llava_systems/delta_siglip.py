"""Delta on SigLIP-SO400M/14 at 384 pixels, 81 tokens; heads of 144 and 32 divide its width of 1152."""

from configs.llava import base


def get_config(stage="finetune"):
    return base(
        "delta_siglip",
        stage,
        dict(name="delta", scale_factor=3, head_dim=144),
        tokens=81,
        vision="siglip_so400m_14_384",
    )
