"""Token-efficient vision-language models in JAX."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from deltallava_jax.inference.model import Model

__version__ = "0.1.0"


def load(path: str | Path, *, dtype: str | None = None, tensor: int = 1, template: str | None = None) -> Model:
    """The newest model of a workdir, or of a folder in Hugging Face's or the original LLaVA layout.

        model = deltallava_jax.load("runs/easy_vqa")
        model.generate("shape.png", "what color is the shape?")

    dtype: of the parameters and of computing, e.g. "bfloat16"; by default tower and projector are as they are saved
    and the decoder's matrices in the dtype of computing. tensor: devices that share every layer, each of which reads
    its share alone. template: of prompts, e.g. "chatml", in place of the model's own. Raises ConversionError,
    CheckpointError or WeightMismatch, whose messages name the file and what was expected; ConfigError for a template
    that is not known or does not fit, more devices than there are or a number that does not divide a layer."""
    from pathlib import Path

    from deltallava_jax.convert.workdir import load_model

    return load_model(Path(path), dtype, tensor, template)
