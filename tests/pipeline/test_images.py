"""Image files to pixels, and files that are no images."""

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.data import easy_vqa
from deltallava_jax.data.conversation import BadSample
from deltallava_jax.data.images import load_image

RNG = np.random.default_rng(0)


def pixels(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


def test_an_image_of_the_right_size_is_untouched(tmp_path):
    array = pixels(64, 64)
    loaded = load_image(save(tmp_path / "a.png", array), 64)
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, array)
    with Image.open(easy_vqa.image_path("train", 0)) as image:
        np.testing.assert_array_equal(load_image(easy_vqa.image_path("train", 0), 64), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize(
    ("height", "width"),
    [(48, 100), (100, 48), (16, 40), (130, 131), (32, 32), (70, 64), (49, 98)],
)
def test_the_shortest_side_is_resized_then_the_centre_cropped(tmp_path, height, width):
    array = pixels(height, width)
    size, short = 64, min(height, width)
    wide, high = size * width // short, size * height // short
    left, top = (wide - size) // 2, (high - size) // 2
    expected = np.asarray(Image.fromarray(array).resize((wide, high), Image.Resampling.BICUBIC))
    expected = expected[top : top + size, left : left + size]
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", array), size), expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(pixels(64, 64)).convert(mode)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 64)
    assert loaded.shape == (64, 64, 3) and loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, np.asarray(image.convert("RGB")))
    if mode == "L":
        assert (loaded == loaded[..., :1]).all()


# ------------------------------------------------------------------ bad files


def assert_refused(path, *words):
    with pytest.raises(BadSample) as caught:
        load_image(path, 64)
    assert all(word in str(caught.value) for word in (str(path), *words))


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path / "none.png", "FileNotFoundError")
    assert_refused(tmp_path)


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    assert_refused(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_file_cut_short_anywhere_is_named(tmp_path, kind):
    whole = save(tmp_path / f"whole.{kind}", pixels(64, 64)).read_bytes()
    file = tmp_path / f"cut.{kind}"
    for length in np.linspace(0, len(whole) - 100, 30).astype(int):
        file.write_bytes(whole[:length])
        assert_refused(file)


def test_a_flipped_byte_in_the_pixels_of_a_png_is_named(tmp_path):
    file = save(tmp_path / "a.png", pixels(64, 64))
    content = bytearray(file.read_bytes())
    for at in np.linspace(60, len(content) - 40, 20).astype(int):
        broken = content.copy()
        broken[at] ^= 0xFF
        file.write_bytes(broken)
        assert_refused(file)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", pixels(64, 64))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    assert_refused(file, "DecompressionBombError")
