"""Images from whatever people hold, and the errors for what cannot be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flashmaps.diffusion.images import fit_size, load_image, resize, to_model_input
from PIL import Image

COLOURS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
FLOATS = COLOURS.astype(np.float32) / 255


@pytest.mark.parametrize(
    "image",
    [
        COLOURS,
        FLOATS,
        FLOATS.astype(np.float64),
        Image.fromarray(COLOURS),
        torch.from_numpy(COLOURS),
        torch.from_numpy(COLOURS).permute(2, 0, 1),
        torch.from_numpy(FLOATS).permute(2, 0, 1)[None],
    ],
    ids=["uint8", "float32", "float64", "pil", "torch-hwc", "torch-chw", "torch-bchw"],
)
def test_every_form_gives_the_same_image(image):
    loaded = load_image(image)
    assert loaded.dtype == np.float32 and loaded.shape == (20, 30, 3)
    np.testing.assert_allclose(loaded, FLOATS, atol=1e-6)


def test_path_with_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying; to be turned clockwise by 90 degrees
    path = tmp_path / "photo.png"
    Image.fromarray(COLOURS).save(path, exif=exif)
    for given in (path, str(path)):
        np.testing.assert_allclose(load_image(given), np.rot90(FLOATS, -1), atol=1e-6)


def test_grey_alpha_palette_and_16_bits():
    grey = COLOURS[:, :, 0]
    assert (load_image(grey) == load_image(Image.fromarray(grey))).all()
    clear = np.dstack((COLOURS, np.zeros((20, 30), np.uint8)))
    assert (load_image(clear) == 1).all() and (load_image(Image.fromarray(clear)) == 1).all()
    palette = Image.fromarray(COLOURS).quantize(8)
    np.testing.assert_allclose(load_image(palette), load_image(palette.convert("RGB")))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    np.testing.assert_allclose(load_image(deep), load_image(grey), atol=1e-6)


NUMBERS = COLOURS[:, :, 0].astype(np.int32)


@pytest.mark.parametrize("ending", ["tiff", "png", "pgm"])
def test_files_of_16_bits_keep_their_range(ending, tmp_path):
    path = tmp_path / f"deep.{ending}"
    Image.fromarray((NUMBERS * 257).astype(np.uint16)).save(path)
    want = np.repeat(NUMBERS[..., None], 3, 2) / 255
    np.testing.assert_allclose(load_image(path), want, atol=1e-6)
    np.testing.assert_allclose(load_image((NUMBERS * 257).astype(np.uint16)), want, atol=1e-6)


def test_float_tiffs_are_floats_from_0_to_1(tmp_path):
    path = tmp_path / "float.tiff"
    Image.fromarray(FLOATS[:, :, 0]).save(path)
    np.testing.assert_allclose(load_image(path), np.repeat(FLOATS[:, :, :1], 3, 2), atol=1e-6)
    Image.fromarray(255 * FLOATS[:, :, 0]).save(path)
    with pytest.raises(ValueError, match=r"left is floating point with values from .*; wanted 0"):
        load_image(path, "left")


@pytest.mark.parametrize("scale", [1, 1000, 8_000_000])
def test_32_bit_integers_are_refused(scale, tmp_path):
    path = tmp_path / "int.tiff"
    Image.fromarray(NUMBERS * scale).save(path)
    for image in (path, Image.fromarray(NUMBERS * scale)):
        with pytest.raises(ValueError, match=r"left holds 32-bit integers from \d+ to \d+, and wh"):
            load_image(image, "left")


def test_black_and_white_and_every_mode_of_pillow():
    bits = COLOURS[:, :, 0] > 99
    for image in (bits, torch.from_numpy(bits), Image.fromarray(bits)):
        assert (load_image(image) == bits[..., None]).all()
    for mode in ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        assert load_image(Image.new(mode, (20, 20))).shape == (20, 20, 3), mode
    with pytest.raises(ValueError, match=r"left has the colours 'La' of Pillow.*convert it to RGB"):
        load_image(Image.new("La", (20, 20)), "left")


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("nowhere.png", r"left: there is no file 'nowhere\.png'"),
        (
            np.zeros((15, 40, 3), np.uint8),
            r"left is 40 x 15 pixels; both sides must be at least 16",
        ),
        (np.zeros((40, 40, 2), np.uint8), r"left has shape \(40, 40, 2\); wanted \[height"),
        (np.zeros((2, 3, 40, 40), np.uint8), r"left has shape \(2, 3, 40, 40\)"),
        (np.full((40, 40, 3), 200.0), r"from 200 to 200; wanted 0\.\.1"),
        (np.full((40, 40, 3), np.nan), r"left holds NaN"),
        (np.zeros((40, 40, 3), np.int64), r"left has dtype int64; wanted uint8"),
        (12, r"left is a int; wanted a path"),
    ],
)
def test_bad_images_are_named(image, text):
    with pytest.raises((ValueError, FileNotFoundError), match=text):
        load_image(image, "left")


def test_unreadable_files_are_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ValueError, match="is a folder; wanted an image file"):
        load_image(folder)
    text = tmp_path / "text.png"
    text.write_text("not an image")
    with pytest.raises(ValueError, match=r"text\.png' is not an image that Pillow can read"):
        load_image(text)
    cut = tmp_path / "cut.png"
    Image.fromarray(COLOURS).save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut\.png' cannot be read"):
        load_image(cut)


def test_sizes_are_multiples_and_keep_the_aspect():
    assert fit_size(500, 741, 288, 16) == (192, 288)
    assert fit_size(741, 500, 288, 16) == (288, 192)
    assert fit_size(500, 741, (100, 40), 16) == (96, 48)
    assert fit_size(16, 1000, 128, 16) == (16, 128)
    with pytest.raises(ValueError, match=r"size=8 is too small.*at least 16"):
        fit_size(500, 741, 8, 16)


def test_sizes_may_be_integers_of_any_type():
    assert fit_size(500, 741, np.int64(288), 16) == (192, 288)
    assert fit_size(500, 741, [np.int32(96), 48], 16) == (96, 48)


@pytest.mark.parametrize("size", [64.0, (64,), (64, 32.0), (64, 64, 64), True, "64", None])
def test_a_size_is_one_or_two_whole_numbers(size):
    with pytest.raises(ValueError, match="must be a whole number of pixels, or"):
        fit_size(64, 64, size, 16)


def test_resize_and_model_input():
    grown = resize(FLOATS, (40, 60))
    assert grown.shape == (40, 60, 3) and 0 <= grown.min() and grown.max() <= 1
    assert resize(FLOATS, (20, 30)) is FLOATS
    flat = np.full((32, 48, 3), 0.25, np.float32)
    np.testing.assert_allclose(resize(flat, (16, 24)), 0.25, atol=1e-6)
    shown = to_model_input(flat)
    assert shown.shape == (1, 3, 32, 48)
    torch.testing.assert_close(shown, torch.full_like(shown, -0.5))
