"""Reading photographs and masks that may be anything."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from vlmdiff.core.errors import InputError
from vlmdiff.data.images import fit, load_mask, load_rgb, read_image, resolve, to_rgb

LIMIT = 1_000_000


def save(path, array, **options):
    Image.fromarray(array).save(path, **options)
    return path


@pytest.fixture
def photograph(tmp_path):
    return save(tmp_path / "photo.png", np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))


def bomb(path, side=60_000):
    """A PNG of a few bytes whose header claims side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


def test_a_photograph_is_read_as_it_is(photograph):
    array = load_rgb(photograph, None, LIMIT)
    assert array.shape == (20, 30, 3)
    np.testing.assert_array_equal(array, np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    assert load_rgb(photograph, 8, LIMIT).shape == (8, 8, 3)


def test_a_truncated_image_is_named(photograph):
    photograph.write_bytes(photograph.read_bytes()[:-300])
    with pytest.raises(InputError, match=r"photo\.png cannot be decoded"):
        read_image(photograph, LIMIT)


def test_a_text_file_named_png_is_named(tmp_path):
    (tmp_path / "note.png").write_text("not a picture")
    with pytest.raises(InputError, match=r"note\.png is not an image"):
        read_image(tmp_path / "note.png", LIMIT)


@pytest.mark.parametrize("kind", ["EPS", "AVIF", "DDS", "GIF", "PPM", "JPEG2000"])
def test_a_format_is_judged_by_content_whatever_the_name_says(tmp_path, kind):
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png", kind)
    with pytest.raises(InputError, match=r"photo\.png is not an image of PNG, JPEG, BMP, TIFF, WEBP"):
        read_image(tmp_path / "photo.png", LIMIT)


@pytest.mark.parametrize("kind", [2, 5])
def test_whatever_a_decoder_raises_names_the_file(tmp_path, kind):
    file = save(tmp_path / "photo.tif", np.zeros((4, 4, 3), np.uint8))
    # The tag that says where the pixels are has text or a fraction instead of a number: Pillow raises TypeError.
    whole, damaged = file.read_bytes(), [struct.pack("<HH", 273, number) for number in (4, kind)]
    assert whole.count(damaged[0]) == 1
    file.write_bytes(whole.replace(*damaged))
    with pytest.raises(InputError, match=r"photo\.tif cannot be decoded \(.+\): replace or remove it"):
        read_image(file, LIMIT)


def test_a_folder_is_not_a_photograph(tmp_path):
    with pytest.raises(InputError, match=r"photo\.png is not a regular file"):
        (tmp_path / "photo.png").mkdir()
        read_image(tmp_path / "photo.png", LIMIT)


@pytest.mark.parametrize("side", [2_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, side):
    with pytest.raises(InputError, match=r"bomb\.png (has|cannot be decoded .*decompression bomb)"):
        read_image(bomb(tmp_path / "bomb.png", side), LIMIT)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png does not exist"):
        read_image(tmp_path / "gone.png", LIMIT)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    path = save(tmp_path / "deep.png", np.full((4, 4), 32768, np.uint16))
    assert np.unique(load_rgb(path, None, LIMIT)).tolist() == [128]


def test_transparency_is_laid_on_white(tmp_path):
    path = save(tmp_path / "clear.png", np.zeros((4, 4, 4), np.uint8))
    assert np.unique(load_rgb(path, None, LIMIT)).tolist() == [255]


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    grey = Image.new("RGB", (6, 5), (200, 200, 200))
    grey.convert(mode, palette=Image.Palette.ADAPTIVE).save(path)
    array = load_rgb(path, None, LIMIT)
    assert array.shape == (5, 6, 3)
    if mode != "1":  # a dithered grey
        assert abs(array.astype(int) - 200).max() <= 3


ALL_MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"]
ALL_MODES += ["I;16", "I;16L", "I;16B", "I;16N"]


@pytest.mark.parametrize("mode", ALL_MODES)
def test_a_pil_image_in_any_mode_becomes_rgb(mode):
    assert to_rgb(Image.new(mode, (6, 5))).mode == "RGB"
    assert fit(Image.new(mode, (6, 5)), 4).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (np.zeros((4, 4, 3), np.float32), r"float32 \(4, 4, 3\)"),
        (np.zeros((4, 4, 3), np.uint16), r"uint16 \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"uint8 \(4, 4\)"),
        (np.zeros((4, 4, 4), np.uint8), r"uint8 \(4, 4, 4\)"),
        (np.zeros((3, 4, 4), np.uint8), r"uint8 \(3, 4, 4\)"),
        (np.zeros((1, 4, 4, 3), np.uint8), r"uint8 \(1, 4, 4, 3\)"),
        (np.zeros((0, 4, 3), np.uint8), r"uint8 \(0, 4, 3\)"),
        ("photo.png", "str"),
    ],
    ids=str,
)
def test_another_array_or_type_is_refused_with_a_sentence(image, found):
    with pytest.raises(InputError, match=rf"PIL image or an array of uint8 \(H, W, 3\), not {found}"):
        fit(image, 4)


def test_the_callers_image_stays_as_it_is():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (6, 5)).save(buffer, "PNG", exif=exif)
    image = Image.open(buffer)
    assert to_rgb(image).size == (5, 6) and image.size == (6, 5)
    to_rgb(image).thumbnail((2, 2))
    assert image.size == (6, 5) and image.getexif()[0x0112] == 6


def test_a_rotated_photograph_stands_upright(tmp_path):
    array = np.zeros((10, 20, 3), np.uint8)
    array[:, :10] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    Image.fromarray(array).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright = load_rgb(tmp_path / "turned.jpg", None, LIMIT)
    assert upright.shape == (20, 10, 3)
    assert upright[:8].mean() > 200 and upright[-8:].mean() < 55


def test_a_mask_is_cut_at_its_own_size_then_at_one_half(tmp_path):
    mask = np.zeros((4, 4), np.uint8)
    mask[0, 1] = 255  # one of the four pixels that become one: a quarter, and a part of what is beside it
    mask[2:, 2:] = 1  # any value above zero is anomalous
    mask[0:2, 2] = 255  # one half
    path = save(tmp_path / "mask.png", mask)
    np.testing.assert_array_equal(load_mask(path, 2, LIMIT), [[False, True], [False, True]])
    np.testing.assert_array_equal(load_mask(path, 4, LIMIT), mask > 0)


def test_a_path_inside_the_root_is_resolved(photograph):
    assert resolve(photograph.parent, "photo.png") == photograph.resolve()


@given(st.sampled_from(["../x.png", "a/../../x.png", "/etc/passwd", "a/../x.png"]))
def test_a_path_that_leaves_the_root_is_refused(tmp_path_factory, path):
    with pytest.raises(InputError, match="leaves the dataset's root"):
        resolve(tmp_path_factory.mktemp("root"), path)


def test_a_link_that_leaves_the_root_is_refused(tmp_path):
    (tmp_path / "outside.png").touch()
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(InputError, match="leaves the dataset's root"):
        resolve(root, "link.png")
