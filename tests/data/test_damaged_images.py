"""Files that are not images, are damaged or too large: refused by name, or loaded with all their pixels."""

import os
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from deltallava_jax.data.images import load_image
from deltallava_jax.errors import BadSample
from tests.data.pictures import encoded, pixels, save

# ------------------------------------------------------------------ bad files


def assert_refused(path, *words):
    with pytest.raises(BadSample) as caught:
        load_image(path, 64)
    message = str(caught.value)
    named = () if isinstance(path, (bytes, Image.Image)) else (str(path),)
    assert all(word in message for word in (*named, *words)), message
    assert len(message.splitlines()) == 1


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path / "none.png", "FileNotFoundError")
    assert_refused("", "FileNotFoundError")
    assert_refused(tmp_path / ("a" * 300), "too long")


def test_what_is_no_file_is_named(tmp_path):
    assert_refused(tmp_path, "not a file")
    os.mkfifo(tmp_path / "pipe.png")
    assert_refused(tmp_path / "pipe.png", "not a file")
    for name in ("two\nlines.png", "nul\0.png", "\udcff.png"):
        with pytest.raises(BadSample) as caught:
            load_image(f"{tmp_path}/{name}", 64)
        assert repr(name)[1:-1] in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert_refused(tmp_path / "a.png", "JPEG, PNG, GIF")
    assert_refused(content, f"image of {len(content)} bytes: not an image of a known format")


def test_a_reason_of_several_lines_becomes_one(monkeypatch):
    def load(image):
        raise RuntimeError("first line\n\tsecond line")

    monkeypatch.setattr(Image.Image, "load", load)
    assert_refused(Image.new("RGB", (8, 8)), "image of mode RGB: RuntimeError: first line second line")


def test_formats_that_start_other_programs_are_refused(tmp_path):
    """EPS would be given to Ghostscript."""
    file = tmp_path / "a.jpg"
    Image.fromarray(pixels(16, 16)).save(file, "EPS")
    assert_refused(file, "not an image of a known format")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_file_cut_short_anywhere_is_named(tmp_path, kind):
    whole = save(tmp_path / f"whole.{kind}", pixels(64, 64)).read_bytes()
    file = tmp_path / f"cut.{kind}"
    for length in np.linspace(0, len(whole) - 100, 30).astype(int):
        file.write_bytes(whole[:length])
        assert_refused(file)


KINDS = {
    "JPEG": ("JPEG", {}),
    "progressive JPEG": ("JPEG", {"progressive": True}),
    "PNG": ("PNG", {}),
    "GIF": ("GIF", {}),
    "WebP": ("WEBP", {}),
    "lossless WebP": ("WEBP", {"lossless": True}),
    "TIFF": ("TIFF", {"compression": "tiff_lzw"}),
    "BMP": ("BMP", {}),
}


def file_of(kind: str) -> bytes:
    coarse = np.random.default_rng(3).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    kind, options = KINDS[kind]
    return encoded(Image.fromarray(coarse).resize((60, 44)), kind, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_file_cut_short_is_refused_or_had_all_its_pixels(kind):
    whole = file_of(kind)
    expected, refused = load_image(whole, 16), 0
    for length in np.unique(np.linspace(0, len(whole) - 1, 150).astype(int)):
        try:
            np.testing.assert_array_equal(load_image(whole[:length], 16), expected)
        except BadSample as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused >= 140


def assert_loads_or_is_refused(content: bytes):
    try:
        loaded = load_image(content, 16, "pad")
    except BadSample as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert loaded.shape == (16, 16, 3) and loaded.dtype == np.uint8


STARTS = [
    b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"GIF89a", b"RIFF\0\0\0\0WEBP",
    b"BM", b"II*\0", b"MM\0*", b"P6 ", b"P5 9 9 65535\n", b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x1cftypavif",
]  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(start=st.sampled_from(STARTS), rest=st.binary(max_size=400))
@pytest.mark.filterwarnings("ignore")
def test_random_bytes_are_loaded_or_refused(start, rest):
    assert_loads_or_is_refused(start + rest)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_loaded_or_refused(kind):
    rng, whole = np.random.default_rng(4), file_of(kind)
    for index in range(300):
        content = bytearray(whole)
        for place in rng.integers(0, len(content) if index % 2 else 100, rng.integers(1, 4)):
            content[place] = rng.integers(256)
        assert_loads_or_is_refused(bytes(content))


def test_a_flipped_byte_in_the_pixels_of_a_png_is_named(tmp_path):
    file = save(tmp_path / "a.png", pixels(64, 64))
    content = bytearray(file.read_bytes())
    for at in np.linspace(60, len(content) - 40, 20).astype(int):
        broken = content.copy()
        broken[at] ^= 0xFF
        file.write_bytes(broken)
        assert_refused(file)


def test_an_opened_image_whose_file_is_cut_short_is_named(tmp_path):
    file = tmp_path / "cut.png"
    file.write_bytes(encoded(Image.fromarray(pixels(64, 64)), "PNG")[:2000])
    with Image.open(file) as opened:
        assert_refused(opened, str(file), "truncated")


def test_pixels_without_a_range_are_refused():
    assert_refused(Image.fromarray(np.zeros((8, 8), np.float32)), "floating-point")
    for value in (-1, 2**16):
        assert_refused(encoded(Image.fromarray(np.full((8, 8), value, np.int32)), "TIFF"), f"from {value} to {value}")


# ------------------------------------------------------------------ bad sizes


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", pixels(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    assert_refused(file, "DecompressionBombError")


def test_what_pillow_only_warns_of_is_refused_before_its_pixels_are_decoded(tmp_path, monkeypatch):
    file = tmp_path / "a.png"
    Image.new("1", (12000, 8000)).save(file)
    monkeypatch.setattr(Image.Image, "convert", None)
    with pytest.warns(Image.DecompressionBombWarning):
        assert_refused(file, "12000 x 8000 pixels; expected at most 89,478,485 in all")
    with warnings.catch_warnings(action="error"):
        assert_refused(file, "DecompressionBombWarning")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries switch it off
    assert_refused(file, "12000 x 8000 pixels")


@pytest.mark.parametrize("size", [(1, 20000), (20000, 1), (1, 101), (400, 40001), (0, 5), (5, 0), (400, 2**15 + 1)])
def test_an_extreme_size_is_refused(size):
    words = f"{size[0]} x {size[1]} pixels; expected at most", "32,768 per side and an aspect ratio of 100"
    assert_refused(Image.new("RGB", size), *words)


def test_a_thin_file_is_refused():
    assert_refused(encoded(Image.new("RGB", (1, 20000)), "PNG"), "1 x 20000 pixels")


# ------------------------------------------------------------------ metadata


def png_with(array: np.ndarray, kind: str, size: int) -> bytes:
    """A PNG with compressed metadata of so many bytes."""
    info = PngImagePlugin.PngInfo()
    if kind == "zTXt":
        info.add_text("workflow", "x" * size, zip=True)
    if kind == "iTXt":
        info.add_itxt("workflow", "x" * size, zip=True)
    profile = bytes(size) if kind == "iCCP" else None
    return encoded(Image.fromarray(array), "PNG", pnginfo=info, icc_profile=profile)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_much_metadata_does_not_hide_sound_pixels(kind):
    array = pixels(16, 16)
    content = png_with(array, kind, 5_000_000)
    assert len(content) < 50_000
    np.testing.assert_array_equal(load_image(content, 16), array)
    start = content.index(kind.encode()) - 4
    stop = start + 12 + int.from_bytes(content[start : start + 4])
    chunk, rest = content[start:stop], content[:start] + content[stop:]
    behind = rest.index(b"IEND") - 4  # the pixels
    np.testing.assert_array_equal(load_image(rest[:behind] + chunk + rest[behind:], 16), array)


def test_metadata_without_bounds_is_refused():
    with pytest.raises(BadSample, match="too large"):
        load_image(png_with(pixels(8, 8), "zTXt", 2**26 + 1), 8)


def test_missing_and_unreadable_images_are_distinguished(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    for name, kind in (("none.png", "missing"), ("text.png/none.png", "missing"), ("text.png", "unreadable")):
        with pytest.raises(BadSample) as caught:
            load_image(tmp_path / name, 8)
        assert caught.value.kind == kind
    with pytest.raises(BadSample) as caught:
        load_image(np.zeros((1, 200, 3), np.uint8), 8)
    assert caught.value.kind == "unreadable"
