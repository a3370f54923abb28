"""Reading photographs and masks that may be anything."""

import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlmdiff.core.errors import InputError
from vlmdiff.data.images import load_mask, load_rgb, read_image, resolve

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


@pytest.mark.parametrize("side", [2_000, 12_000, 60_000])
def test_a_decompression_bomb_is_refused_from_its_header(tmp_path, side):
    with pytest.raises(InputError, match=r"bomb\.png (has|is a decompression bomb)"):
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
    mask[0, 0] = 255  # one of the four pixels that become one: a quarter
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
