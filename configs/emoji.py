"""Emoji and their names through LLaVA's two stages, with a small tower and SmolLM2-135M, on a CPU.

``configs/emoji.py:pretrain`` trains the projector alone on names, ``configs/emoji.py:finetune`` projector and decoder
on conversations; with Delta at 16, 4 or 1 tokens, drawn for each step. ``SYSTEM-STAGE`` takes another projector:
``configs/emoji.py:mqt-pretrain``. Expected beside the working directory: data/emoji (benchmarks/recipes/emoji.py) and
runs/emoji_SYSTEM_start, made by ``convert``; stage 1 goes to runs/emoji_SYSTEM_pretrain, where stage 2 begins.
benchmarks/recipes/emoji_recipe.py makes all of it, tower included, and evaluates the style that is held out."""

from deltallava_jax import config as c

# The pictures are mostly white.
TOWER = c.preset(c.VisionConfig, "tiny", layers=4, image_mean=(0.8,) * 3, image_std=(0.35,) * 3)
DECODER = c.DecoderConfig(  # SmolLM2-135M
    vocab_size=49152, width=576, layers=30, heads=9, kv_heads=3, mlp_width=1536, rope_base=1e5, tied_head=True
)
SMALL = dict(head_dim=32, drop_path=0.0, initializer_range=0.08)  # the tower is 128 wide
SYSTEMS = {
    "delta": dict(name="delta", variant="paper", scale_factor=(2, 4, 8), mlp_width=512),
    "mqt": dict(name="mqt", queries=16, tokens=(16, 4, 1)),
    "pool": dict(name="m3", scale_factor=(2, 4, 8)),  # M3's MLP and average pooling, a budget drawn for each step
    "token_packer": dict(name="token_packer", scale_factor=2),
}


def get_config(which: str = "pretrain") -> c.Config:
    system, stage = c.system_and_stage(which, SYSTEMS)
    pretrain = stage == "pretrain"
    return c.Config(
        name=f"emoji_{system}_{stage}",
        init_from=f"runs/emoji_{system}_{'start' if pretrain else 'pretrain'}",
        model=c.compose(
            TOWER, DECODER, c.settings_of(SYSTEMS[system]["name"], SMALL) | SYSTEMS[system], dtype="float32"
        ),
        data=c.DataConfig(
            dataset="llava",
            json=(f"data/emoji/{stage}.json",),
            images="data/emoji/images",
            aspect="square",
            template="plain" if pretrain else "chatml",
            rows=1,
            row_length=128,
            workers=0,
        ),
        optimizer=c.OptimizerConfig(
            lr=1e-3 if pretrain else 1e-4, frozen=("^vision/", "^decoder/") if pretrain else ("^vision/",)
        ),
        training=c.TrainingConfig(
            steps=600 if pretrain else 300, log_every=5, checkpoint_every=100, keep_checkpoints=1
        ),
    )
