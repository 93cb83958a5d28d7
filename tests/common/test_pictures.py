"""common/pictures.py: images are read exactly or rejected with the reason."""

import struct
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import write_pairs
from PIL import Image, ImageCms

from common.console import UserError
from common.pictures import ORIENTATION, picture_size, read_image


def test_images_are_read_exactly_or_rejected(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    path = tmp_path / "i.png"
    for mode in ("RGB", "RGBA"):
        Image.fromarray(pixels).convert(mode).save(path)
        assert (read_image(path) == pixels).all()
    Image.fromarray(np.dstack([pixels, np.full((5, 6), 9, np.uint8)])).save(path)
    with pytest.raises(UserError, match="mode RGBA"):
        read_image(path)
    grey = pixels[..., 0]
    for mode in ("L", "LA"):
        Image.fromarray(grey).convert(mode).save(path)
        assert (read_image(path) == grey[..., None]).all()
    Image.fromarray(grey > 99).save(path)
    assert (read_image(path) == 255 * (grey > 99)[..., None]).all()
    few = pixels // 86 * 86
    Image.fromarray(few).quantize(27).save(path)
    assert (read_image(path) == few).all()
    for picture, mode in ((Image.fromarray(pixels).convert("CMYK"), "CMYK"), (Image.fromarray(grey * 255.0), "F")):
        picture.save(tmp_path / "i.tif")
        with pytest.raises(UserError, match=f"i.tif.*{mode}"):
            read_image(tmp_path / "i.tif")
    Image.fromarray(grey.astype(np.uint16) * 255).save(path)
    with pytest.raises(UserError, match="16 bits"):
        read_image(path)


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


def test_pages_and_turned_pictures_are_rejected(tmp_path):
    picture = Image.new("RGB", (16, 20), (26, 26, 26))
    picture.save(tmp_path / "pages.tif", save_all=True, append_images=[picture])
    with pytest.raises(UserError, match=r"pages.tif.*several pages"):
        read_image(tmp_path / "pages.tif")
    exif = Image.Exif()
    for flag in range(2, 9):
        exif[ORIENTATION] = flag
        picture.save(tmp_path / "turned.jpg", exif=exif)
        with pytest.raises(UserError, match=r"turned.jpg.*EXIF"):
            read_image(tmp_path / "turned.jpg")


@pytest.mark.parametrize("flag", [0, 1, 9, 255])
def test_an_exif_flag_without_a_meaning_and_a_colour_profile_change_nothing(tmp_path, flag):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ORIENTATION] = flag
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "i.png", exif=exif, icc_profile=profile)
    assert (read_image(tmp_path / "i.png") == pixels).all()


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
