"""Image files to pixels, as the towers' own processors make them."""

import dataclasses
import warnings
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from deltallava_jax.config import ASPECTS, DataConfig, VisionConfig, override, preset
from deltallava_jax.data import easy_vqa, images
from deltallava_jax.data.images import load_image
from deltallava_jax.errors import ConfigError
from deltallava_jax.evaluation import easy_vqa as evaluation
from deltallava_jax.models.vision import normalize
from tests import tiny
from tests.data.pictures import ORIENTATION, RNG, encoded, pixels, save
from tests.golden import outputs


def test_an_image_of_the_right_size_is_untouched(tmp_path):
    array = pixels(64, 64)
    file = save(tmp_path / "a.png", array)
    for aspect in ASPECTS:
        loaded = load_image(file, 64, aspect)
        assert loaded.dtype == np.uint8
        np.testing.assert_array_equal(loaded, array)
    with Image.open(easy_vqa.image_path("train", 0)) as image:
        np.testing.assert_array_equal(load_image(easy_vqa.image_path("train", 0), 64), np.asarray(image.convert("RGB")))


def test_a_source_is_a_path_text_bytes_or_an_opened_image(tmp_path, monkeypatch):
    file = save(tmp_path / "a.png", pixels(48, 100))
    expected = load_image(file, 64)
    with Image.open(file) as opened:
        for source in (str(file), file.read_bytes(), opened, opened):
            np.testing.assert_array_equal(load_image(source, 64), expected)
    remote = {"gs://bucket/a.png": file}
    monkeypatch.setattr(images.epath, "Path", lambda path: remote[path])
    np.testing.assert_array_equal(load_image("gs://bucket/a.png", 64), expected)


# ------------------------------------------------------------------ resizing


@pytest.mark.parametrize("aspect", ["square", "pad"])
@pytest.mark.parametrize("k", range(4))
def test_pixels_are_those_of_llavas_preprocessing(k, aspect):
    golden = {key.removeprefix(f"img{k}_{aspect}_"): value for key, value in outputs("image_preprocess").items()}
    loaded = load_image(golden[f"img{k}_png"].tobytes(), 336, aspect)
    np.testing.assert_array_equal(loaded[[0, 1, 167, 168, 335]].transpose(2, 0, 1), golden["u8_rows"])
    np.testing.assert_array_equal(loaded.sum((0, 1), dtype=np.int64), golden["u8_sum"])
    normalised = np.asarray(normalize(loaded[None], VisionConfig()))[0].transpose(2, 0, 1)
    np.testing.assert_allclose(normalised[:, ::4, ::4], golden["s4"].astype(np.float32), atol=2e-3)
    np.testing.assert_allclose(normalised[:, 144:192, 144:192], golden["center48"].astype(np.float32), atol=2e-3)


@pytest.fixture(scope="module")
def processors():
    """processors(aspect, size, mean): transformers' processor of that aspect, up to its uint8 pixels."""
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    def make(aspect, size, mean):
        options = {"do_rescale": False, "do_normalize": False, "image_mean": mean}
        if aspect == "squash":
            return SiglipImageProcessorPil(size={"height": size, "width": size}, **options)
        kind, options = CLIPImageProcessorPil, options | {"size": {"shortest_edge": size}, "crop_size": size}
        return kind(**options) if aspect == "square" else LlavaImageProcessorPil(do_pad=True, **options)

    return make


def random_sizes(count: int) -> list[tuple[int, int]]:
    """Most of them ordinary, some with one side many times the other."""
    ordinary = RNG.integers(1, 700, (count, 2)).tolist()
    extreme = [(short, short * int(ratio)) for short, ratio in zip((1, 2, 5, 9), RNG.integers(40, 101, 4), strict=True)]
    sizes = [size for size in ordinary if max(size) <= 100 * min(size)]
    return sizes + extreme + [size[::-1] for size in extreme] + [(1, 1), (1, 100), (336, 336), (337, 336)]


@pytest.mark.parametrize("aspect", ASPECTS)
def test_pixels_are_those_of_the_towers_processor_whatever_the_sizes(aspect, processors, monkeypatch):
    mean = (0.9, 0.5, 0.1)
    fill = VisionConfig(image_mean=mean).mean_color
    for index, (height, width) in enumerate(random_sizes(40)):
        monkeypatch.setattr(images, "STRIP", 2**22 if index % 2 else 1500)  # a canvas in one piece or in many
        size, array = (28, 63, 112)[index % 3], pixels(height, width)
        expected = processors(aspect, size, mean)(array, return_tensors="np", input_data_format="channels_last")
        expected = expected["pixel_values"][0].transpose(1, 2, 0)
        loaded = load_image(Image.fromarray(array), size, aspect, fill)
        np.testing.assert_array_equal(loaded, expected, err_msg=f"{height} x {width} to {size}")


@pytest.mark.parametrize(
    ("height", "width"), [(48, 100), (100, 48), (16, 40), (130, 131), (32, 32), (70, 64), (49, 98)]
)
def test_the_shortest_side_is_resized_then_the_centre_cropped(tmp_path, height, width):
    array = pixels(height, width)
    size, short = 64, min(height, width)
    wide, high = size * width // short, size * height // short
    left, top = (wide - size) // 2, (high - size) // 2
    expected = np.asarray(Image.fromarray(array).resize((wide, high), Image.Resampling.BICUBIC))
    expected = expected[top : top + size, left : left + size]
    np.testing.assert_array_equal(load_image(save(tmp_path / "a.png", array), size), expected)


@pytest.mark.parametrize(("height", "width"), [(10, 21), (21, 10), (20, 21)])
def test_padding_has_the_towers_mean_colour_and_the_image_its_centre(height, width):
    array, fill = pixels(height, width), preset(VisionConfig, "siglip_so400m_14_384").mean_color
    assert fill == (127, 127, 127) and VisionConfig().mean_color == (122, 116, 104)
    top, left = (21 - height) // 2, (21 - width) // 2
    for loaded, colour in (
        (load_image(Image.fromarray(array), 21, "pad"), (122, 116, 104)),
        (load_image(Image.fromarray(array), 21, "pad", fill), fill),
    ):
        np.testing.assert_array_equal(loaded[top : top + height, left : left + width], array)
        around = np.ones((21, 21), bool)
        around[top : top + height, left : left + width] = False
        assert (loaded[around] == colour).all()


@pytest.mark.parametrize("size", [(100, 10000), (10000, 100)])
def test_a_long_image_takes_no_memory_for_what_is_not_in_the_result(size, monkeypatch):
    made, new, resize = [], Image.new, Image.Image.resize
    monkeypatch.setattr(Image, "new", lambda *a, **k: made.append(new(*a, **k)) or made[-1])
    monkeypatch.setattr(Image.Image, "resize", lambda *a, **k: made.append(resize(*a, **k)) or made[-1])
    for aspect in ASPECTS:
        assert load_image(new("RGB", size), 224, aspect).shape == (224, 224, 3)
    assert max(image.width * image.height for image in made) < 6e6


def test_an_unknown_aspect_names_the_known_ones():
    with pytest.raises(ConfigError, match="aspect is 'anyres'; known: square, pad, squash"):
        load_image(Image.new("RGB", (8, 8)), 8, "anyres")
    with pytest.raises(ConfigError, match="data.aspect is 'anyres'; known: square, pad, squash"):
        DataConfig(aspect="anyres")


@pytest.mark.parametrize("aspect", ASPECTS)
def test_evaluation_prepares_images_as_training_did(tmp_path, monkeypatch, aspect):
    file, encoded = save(tmp_path / "a.png", pixels(40, 100)), []
    tower = dict(image_size=64, patch_size=8, width=32, image_mean=(0.9, 0.5, 0.1))
    data = DataConfig(template="brief", aspect=aspect)
    cfg = override(tiny.get_config(), {f"model.vision.{key}": str(value) for key, value in tower.items()})
    cfg = dataclasses.replace(cfg, data=data)

    def encode(engine, images, budget):
        encoded.append(images)
        raise StopIteration

    monkeypatch.setattr(easy_vqa, "image_path", lambda split, image: file)
    monkeypatch.setattr(evaluation, "Engine", lambda params, cfg: None)
    monkeypatch.setattr(evaluation, "_encode", encode)
    with pytest.raises(StopIteration):
        evaluation.evaluate(None, cfg, None, limit=2, progress=False)
    np.testing.assert_array_equal(encoded[0][0], load_image(file, 64, aspect, (229, 127, 25)))


# ------------------------------------------------------------------ what files hold


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(pixels(64, 64)).convert(mode)
    image.save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 64)
    assert loaded.shape == (64, 64, 3) and loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, np.asarray(image.convert("RGB")))
    if mode == "L":
        assert (loaded == loaded[..., :1]).all()


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "TIFF"), ("CMYK", "JPEG"), ("YCbCr", "TIFF"), ("LA", "TIFF")])
def test_modes_that_png_does_not_have_become_rgb(mode, kind):
    image = Image.fromarray(np.full((16, 16, 3), (200, 100, 40), np.uint8)).convert(mode)
    expected = np.asarray(image.convert("RGB"), int)
    assert abs(load_image(encoded(image, kind), 16) - expected).max() <= 3


@pytest.mark.parametrize("mode", ["PA", "RGBX", "RGBa", "HSV"])
def test_modes_of_opened_images_become_rgb(mode):
    image = Image.fromarray(pixels(16, 16)).convert("RGBA" if mode == "RGBa" else "RGB").convert(mode)
    np.testing.assert_array_equal(load_image(image, 16), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("transparency", [3, bytes(range(0, 256, 2)), None])
def test_transparency_of_a_palette_leaves_its_colours(transparency):
    image = Image.fromarray(pixels(16, 16)).quantize(128)
    options = {} if transparency is None else {"transparency": transparency}
    with warnings.catch_warnings(action="error"):
        loaded = load_image(encoded(image, "PNG", **options), 16)
    np.testing.assert_array_equal(loaded, np.asarray(image.convert("RGB")))


def test_colours_below_alpha_show():
    array = np.concatenate([pixels(16, 16), RNG.integers(0, 2, (16, 16, 1), dtype=np.uint8) * 255], -1)
    np.testing.assert_array_equal(load_image(encoded(Image.fromarray(array), "PNG"), 16), array[..., :3])


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_16_bit_grey_is_scaled_to_8(kind):
    grey = pixels(16, 16)[..., 0]
    image = Image.fromarray(grey.astype(np.uint16) * 257)
    loaded = load_image(encoded(image, kind), 16)
    np.testing.assert_array_equal(loaded, np.broadcast_to(grey[..., None], (16, 16, 3)))
    np.testing.assert_array_equal(load_image(image, 16), loaded)


def test_an_animation_gives_its_first_frame():
    frames = [Image.fromarray(pixels(16, 16)).quantize(64) for _ in range(3)]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(load_image(content, 16), np.asarray(frames[0].convert("RGB")))
    colours = [Image.fromarray(pixels(16, 16)) for _ in range(2)]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        content = encoded(colours[0], kind, save_all=True, append_images=colours[1:], **options)
        np.testing.assert_array_equal(load_image(content, 16), np.asarray(colours[0]))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_jpg_that_is_something_else_is_read(tmp_path, kind):
    content = encoded(Image.fromarray(pixels(16, 16)), kind)
    (tmp_path / "a.jpg").write_bytes(content)
    np.testing.assert_array_equal(load_image(tmp_path / "a.jpg", 16), load_image(content, 16))


# From the stored array to the upright one, by the EXIF standard: where row 0 and column 0 lie in the picture.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
    9: lambda a: a,  # no such orientation
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_an_image_is_upright(orientation, kind):
    image, exif = Image.fromarray(pixels(16, 24)), Image.Exif()
    exif[ORIENTATION] = orientation
    content = encoded(image, kind, exif=exif)
    stored = np.asarray(Image.open(BytesIO(encoded(image, kind))))
    upright = Image.fromarray(np.ascontiguousarray(UPRIGHT[orientation](stored)))
    for aspect in ASPECTS:
        np.testing.assert_array_equal(load_image(content, 20, aspect), load_image(upright, 20, aspect))
    with Image.open(BytesIO(content)) as opened:
        for _ in range(2):
            np.testing.assert_array_equal(load_image(opened, 20), load_image(upright, 20))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\xff", b"no exif", bytes(range(256))])
def test_broken_exif_leaves_the_image_as_it_is(exif, kind):
    image = Image.fromarray(pixels(16, 16))
    expected = load_image(encoded(image, kind), 16)
    np.testing.assert_array_equal(load_image(encoded(image, kind, exif=exif), 16), expected)
