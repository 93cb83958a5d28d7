"""common/pictures.py: images and masks are read exactly or rejected with the reason."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import GREYS, write_pairs
from PIL import Image

from common.console import UserError
from common.pictures import ORIENTATION, count_classes, picture_size, read_image, read_mask


def test_images_are_rgb_or_opaque_rgba(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    path = tmp_path / "i.png"
    for mode in ("RGB", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(path)
        assert (read_image(path) == pixels).all()
    Image.fromarray(np.dstack([pixels, np.full((5, 6), 9, np.uint8)])).save(path)
    with pytest.raises(UserError, match="mode RGBA"):
        read_image(path)
    Image.fromarray(pixels[..., 0]).save(path)
    with pytest.raises(UserError, match="mode L"):
        read_image(path)


def test_masks_are_read_exactly_from_grey_and_equal_rgb(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (7, 9))
    path = tmp_path / "m.png"
    for picture in (Image.fromarray(GREYS[labels]), Image.fromarray(np.stack([GREYS[labels]] * 3, -1))):
        picture.save(path)
        assert (read_mask(path, GREYS.tolist()) == labels).all()


@pytest.mark.parametrize(("make", "expected"), [
    (lambda a: Image.fromarray(np.where(np.arange(16).reshape(4, 4) < 3, 99, a).astype(np.uint8)),
     r"99 \(3 pixels\).*data.mask_values"),
    (lambda a: Image.fromarray(a).convert("P"), "mode P"),
    (lambda a: Image.fromarray(a.astype(np.uint16)), "16"),
    (lambda a: Image.fromarray(a).convert("RGBA"), "mode RGBA"),
    (lambda a: Image.fromarray(a > 30), "mode 1"),
    (lambda a: Image.fromarray(np.dstack([a, a, a + 1])), "coloured"),
])
def test_masks_that_cannot_be_read_exactly_are_rejected(tmp_path, make, expected):
    path = tmp_path / "m.png"
    make(np.full((4, 4), 26, np.uint8)).save(path)
    with pytest.raises(UserError, match=expected) as error:
        read_mask(path, GREYS.tolist())
    assert str(path) in str(error.value)


def test_pixels_are_counted_by_class_and_unknown_values_are_named(tmp_path):
    counts = np.bincount([77, 77, 26], minlength=256)
    assert count_classes(tmp_path / "m.png", counts, [26, 51, 77]).tolist() == [1, 0, 2]
    with pytest.raises(UserError, match=r"m.png.* 77 \(2 pixels\).*\[26, 51\]"):
        count_classes(tmp_path / "m.png", counts, [26, 51])


@pytest.mark.parametrize("name", ["JPEG", "WEBP"])
def test_formats_that_change_values_are_rejected(tmp_path, name):
    path = tmp_path / "m.png"
    Image.new("RGB", (16, 16), (26, 26, 26)).save(path, format=name)
    with pytest.raises(UserError, match=name):
        read_mask(path, GREYS.tolist())


def test_16_bit_colour_is_rejected(tmp_path):
    """Pillow would reduce it to 8 bits silently."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + bytes(4 * 6) for _ in range(4))
    path = tmp_path / "deep.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))
    with pytest.raises(UserError, match="16 bits"):
        read_image(path)


def test_pages_and_rotation_flags_are_rejected(tmp_path):
    picture = Image.new("RGB", (16, 16), (26, 26, 26))
    picture.save(tmp_path / "pages.tif", save_all=True, append_images=[picture])
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(tmp_path / "rotated.jpg", exif=exif)
    for name in ("pages.tif", "rotated.jpg"):
        with pytest.raises(UserError, match=f"{name}.*pages.*rotation"):
            read_image(tmp_path / name)
    picture.save(tmp_path / "plain.tif")
    assert read_image(tmp_path / "plain.tif").shape == (16, 16, 3)


@pytest.mark.parametrize("spoil", [lambda b: b[:len(b) // 2], lambda b: b"not an image", lambda b: b""])
def test_unreadable_images_are_named(tmp_path, spoil):
    write_pairs(tmp_path, 1)
    path = tmp_path / "frames/frame#0.png"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(UserError, match="frame#0.png.*readable"):
        read_image(path)


def test_a_small_file_with_a_huge_picture_is_rejected_before_decoding(tmp_path):
    path = tmp_path / "bomb.png"
    Image.new("L", (20_000, 20_000)).save(path)
    with pytest.raises(UserError, match="bomb.png.*20000 x 20000 pixels"):
        read_image(path)


def test_threads_leave_pillows_limit_as_it_was(tmp_path):
    write_pairs(tmp_path, 1)
    limit, path = Image.MAX_IMAGE_PIXELS, tmp_path / "frames/frame#0.png"
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: picture_size(path), range(600)))
    assert limit == Image.MAX_IMAGE_PIXELS
