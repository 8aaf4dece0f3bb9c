"""Image files -> uint8 pixels of the tower's size, bit-identical to the towers' own image processors (Pillow's).

``square``: the shortest side resized to ``size``, then a centre crop, as CLIP's processor does. ``pad``: padded to a
square with the tower's mean colour first, as in LLaVA-1.5's finetuning and evaluation. ``squash``: both sides resized
to ``size``, as SigLIP's processor does."""

from __future__ import annotations

import os
import stat
from contextlib import nullcontext
from io import BytesIO
from pathlib import Path

import numpy as np
from etils import epath
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError

from deltallava_jax.config import ASPECTS, VisionConfig
from deltallava_jax.errors import BadSample, ConfigError

# Limits of an image, which together bound the memory and time that it takes. Pillow warns of a decompression bomb above
# MAX_PIXELS, and refuses twice as many.
MAX_PIXELS = 89_478_485
MAX_SIDE = 2**15
MAX_RATIO = 100
# Bytes of a PNG's text and colour profile: of one chunk, and of all. Pillow's own limit, 1 MB unpacked, refuses images
# that some editors and image generators write.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26
PngImagePlugin.MAX_TEXT_MEMORY = 2**27
# Pillow reads more formats, some through other programs (EPS starts Ghostscript), which is unsafe for untrusted files.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
STRIP = 2**22  # pixels of the padded canvas in memory at a time
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    source: str | Path | bytes | np.ndarray | Image.Image,
    size: int,
    aspect: str = "square",
    fill: tuple[int, int, int] = VisionConfig().mean_color,
) -> np.ndarray:
    """RGB uint8 [size, size, 3] of a file (local, or gs://...), a file's bytes, pixels (uint8 [H, W, 3]) or an
    opened image.

    aspect: square, pad or squash. fill: the padding's colour, by default CLIP's. Of an animation the first frame is
    taken. Alpha is dropped, not blended, as in LLaVA's code. Unlike there, an EXIF orientation is applied (questions
    are about upright images) and 16-bit grey is scaled to 8 bits, not clipped.

    Raises ConfigError for an unknown aspect, and BadSample, naming the file in one line, for a source that is missing
    (kind "missing"), not an image, damaged, truncated, or beyond MAX_PIXELS, MAX_SIDE or MAX_RATIO ("unreadable")."""
    if aspect not in ASPECTS:
        raise ConfigError(f"aspect is {aspect!r}; known: {', '.join(ASPECTS)}")
    image = _read(source)
    if aspect == "square":
        image = _cropped(image, size)
    elif aspect == "pad":
        image = _padded(image, size, fill)
    else:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def size_of(source: str | Path | bytes | np.ndarray | Image.Image) -> tuple[int, int]:
    """(width, height) of an upright image. Raises BadSample as ``load_image`` does."""
    return _read(source).size


# ------------------------------------------------------------------ reading


def _read(source) -> Image.Image:
    """In RGB and upright."""
    try:
        with _open(source) as image:
            return _upright_rgb(image)
    except Exception as error:  # on broken data Pillow's decoders raise nearly any type
        kind = "missing" if isinstance(error, (FileNotFoundError, NotADirectoryError)) else "unreadable"
        raise BadSample(f"image {_name(source)}: {_reason(error)}", kind) from error


def _open(source):
    if isinstance(source, Image.Image):
        return nullcontext(source)
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[2] != 3:
            raise BadSample("expected uint8 [height, width, 3]")
        return nullcontext(Image.fromarray(source))
    if isinstance(source, bytes):
        return Image.open(BytesIO(source), formats=FORMATS)
    if "://" in os.fspath(source):
        return Image.open(BytesIO(epath.Path(source).read_bytes()), formats=FORMATS)
    if not stat.S_ISREG(os.stat(source).st_mode):
        raise BadSample("not a file")  # reading a pipe could block
    return Image.open(source, formats=FORMATS)


def _upright_rgb(image: Image.Image) -> Image.Image:
    """The (first) frame in RGB, rotated by its EXIF orientation."""
    long, short = max(image.size), min(image.size)
    if short < 1 or long * short > MAX_PIXELS or long > MAX_SIDE or long > MAX_RATIO * short:
        raise BadSample(
            f"{image.width} x {image.height} pixels; expected at most {MAX_PIXELS:,} in all, {MAX_SIDE:,} per side "
            f"and an aspect ratio of {MAX_RATIO}"
        )
    image.load()
    transpose = _transpose(image)
    if image.mode.startswith("I"):
        image = _to_8_bits(image)
    elif image.mode == "F":
        raise BadSample("pixels are floating-point numbers of unknown range; expected integers")
    elif "transparency" in image.info:  # unused in RGB, and Pillow refuses or warns of some values
        image = image.copy()
        del image.info["transparency"]
    if image.mode != "RGB":  # convert would copy
        image = image.convert("RGB")
    return image if transpose is None else image.transpose(transpose)


def _transpose(image: Image.Image) -> Image.Transpose | None:
    try:
        return UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # the pixels may be intact where the EXIF data is broken
        return None


def _to_8_bits(image: Image.Image) -> Image.Image:
    """The high bytes of 16-bit grey, as Pillow reads 16-bit colour; its convert would clip at 255."""
    grey = np.asarray(image.convert("I"))
    if grey.min() < 0 or grey.max() >= 2**16:
        raise BadSample(f"grey values from {grey.min()} to {grey.max()}; expected 16 bits")
    return Image.fromarray((grey >> 8).astype(np.uint8))


def _name(source) -> str:
    if isinstance(source, bytes):
        return f"of {len(source):,} bytes"
    if isinstance(source, np.ndarray):
        return f"{source.dtype} {list(source.shape)}"
    if isinstance(source, Image.Image):
        source = getattr(source, "filename", "") or f"of mode {source.mode}"
    name = str(source)
    return name if name.isprintable() else repr(name)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"not an image of a known format ({', '.join(FORMATS)})"
    text = str(error) if isinstance(error, BadSample) else f"{type(error).__name__}: {error}"
    return " ".join(text.split())


# ------------------------------------------------------------------ resizing


def _cropped(image: Image.Image, size: int) -> Image.Image:
    short = min(image.size)
    wide, high = size * image.width // short, size * image.height // short
    left, top = (wide - size) // 2, (high - size) // 2
    image = image.resize((wide, high), Image.Resampling.BICUBIC)
    return image.crop((left, top, left + size, top + size))


def _padded(image: Image.Image, size: int, fill: tuple[int, int, int]) -> Image.Image:
    """Identical to resizing the whole padded canvas. Pillow resizes the width before the height, each row separately,
    so the canvas is built in strips: that of a long image would take gigabytes."""
    side = max(image.size)
    left, top = (side - image.width) // 2, (side - image.height) // 2
    narrow = Image.new("RGB", (size, side), fill)
    step = max(1, STRIP // side)
    for start in range(0, image.height, step):
        stop = min(start + step, image.height)
        strip = image if stop - start == image.height else image.crop((0, start, image.width, stop))
        if image.width < side:
            strip, bare = Image.new("RGB", (side, stop - start), fill), strip
            strip.paste(bare, (left, 0))
        narrow.paste(strip.resize((size, stop - start), Image.Resampling.BICUBIC), (0, top + start))
    return narrow.resize((size, size), Image.Resampling.BICUBIC)
