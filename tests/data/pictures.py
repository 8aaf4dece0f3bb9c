"""Pictures for tests: random pixels, saved or encoded."""

from io import BytesIO

import numpy as np
from PIL import Image

RNG = np.random.default_rng(0)
ORIENTATION = 0x0112


def pixels(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
