"""Image files -> uint8 pixels of the tower's size."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from deltallava_jax.data.conversation import BadSample


def load_image(source: str | Path | Image.Image, size: int) -> np.ndarray:
    """RGB uint8 [size, size, 3] of a file or an opened image: shortest side resized to ``size`` (bicubic), centre
    crop, as CLIP's processor does.

    Raises BadSample, naming the file, for one that is missing, unreadable or a decompression bomb."""
    try:
        with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
            image = image.convert("RGB")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadSample(f"image {source}: {type(error).__name__}: {error}") from error
    width, height = image.size
    if (width, height) != (size, size):
        shortest = min(width, height)
        wide, high = size * width // shortest, size * height // shortest
        left, top = (wide - size) // 2, (high - size) // 2
        image = image.resize((wide, high), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return np.asarray(image)
