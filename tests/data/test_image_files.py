"""Image files that would take all memory or all time are refused before they are decoded."""

from __future__ import annotations

import io
import resource
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from hostile import (
    black_png,
    chunk,
    cut_and_closed,
    image,
    in_a_fork,
    jpeg_with_header,
    noise,
    pixels_of,
    png_header,
    png_with_header,
    webp_with_header,
)
from symbiotic.data.bad import Refused
from symbiotic.data.image_files import decode_image, decode_rgb, read_header
from symbiotic.data.image_parts import check_unpacked, jpeg_pixels, orientation_of, png_bytes, png_pixels

BOMBS = {
    "PNG of 90 MP": lambda: black_png(9_000, 10_000),
    "PNG of 400 MP": lambda: black_png(20_000, 20_000),
    "PNG header of 400 MP": lambda: png_header(20_000, 20_000),
    "PNG header of 2 ** 62 pixels": lambda: png_with_header(2**31 - 1, 2**31 - 1),
    "JPEG header of 3600 MP": lambda: jpeg_with_header(60_000, 60_000),
    "WebP header of 268 MP": lambda: webp_with_header(16_383, 16_383),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_before_they_are_decoded(name: str) -> None:
    body = BOMBS[name]()

    def act() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for look in (read_header, decode_image):
            with pytest.raises(Refused, match=r"image_too_large: it announces .* more than 64,000,000; not decoded"):
                look(body)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # kB

    in_a_fork(act)


def test_the_real_bombs_are_real_and_the_measurement_sees_them() -> None:
    def act() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pixels = decode_image(black_png(4_000, 5_000))
        assert pixels.shape == (5_000, 4_000, 3)
        assert not pixels.any()
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before > 50 * 1024

    in_a_fork(act)
    with pytest.raises(Refused, match="more than 1,999,999"):
        decode_image(black_png(1_000, 2_000), 1_999_999)


def test_texts_in_a_png_are_not_unpacked_and_endless_scans_are_refused() -> None:
    packed = zlib.compress(bytes(1_000_000))
    texts = b"".join(chunk(b"zTXt", b"%d\0\0" % i + packed) for i in range(200))
    body = image(3)[:33] + texts + image(3)[33:]

    def act() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert read_header(body) == (8, 8, "RGB", 1)
        assert np.array_equal(decode_image(body), pixels_of(3))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024

    in_a_fork(act)
    with pytest.raises(Refused, match="a JPEG of 201 scans"):
        decode_image(image(1, "jpeg") + b"\xff\xda" * 200)


def test_a_jpeg_that_is_cut_off_is_refused_though_a_library_bears_such(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for cut in (2, 4, 6):
        with pytest.raises(Refused, match="image_truncated: a JPEG that ends at byte"):
            decode_image(image(1, "jpeg")[:-cut])


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 2}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("share", range(5, 100, 10))
def test_a_jpeg_that_was_cut_and_closed_is_refused_and_whole_ones_are_not(options: dict[str, Any], share: int) -> None:
    with pytest.raises(Refused, match=r"image_truncated: .*closed by an end mark"):
        decode_image(cut_and_closed(share - 5, **options), checked=True)
    whole = noise(**options)
    assert np.array_equal(decode_image(whole, checked=True), decode_image(whole))
    flat = image(7, "jpeg", side=12)  # of one colour, as what is missing is painted
    assert decode_image(flat, checked=True).shape == (12, 12, 3)


@pytest.mark.parametrize(
    ("mode", "bits", "side"), [("RGB", 8, 8), ("L", 8, 5), ("1", 1, 13), ("P", 8, 3), ("RGBA", 8, 1), ("LA", 8, 9)]
)
def test_what_a_png_announces_is_what_it_unpacks_to(mode: str, bits: int, side: int) -> None:
    body = png_pixels(image(3, "png", mode, side))
    packed = b"".join(part[:-4] for part in body.split(b"IDAT")[1:])
    assert png_bytes(body[16:29]) == len(zlib.decompressobj().decompress(packed))
    check_unpacked(body)


def test_a_png_with_fewer_pixels_than_it_announces_is_refused() -> None:
    """Decoders put zeros in their place: 5 rows of 8 pixels, where 8 are announced."""
    data = zlib.compress((b"\0" + bytes([1] * 24)) * 5)
    header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
    body = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    with pytest.raises(Refused, match=r"image_truncated: it unpacks to 125 of the 200 bytes it announces"):
        decode_image(body, checked=True)


def test_an_interlaced_png_announces_its_seven_passes() -> None:
    """5 x 5 pixels of 3 bytes: passes of 1x1, 1x1, 2x1, 1x2 (w x h: 1 2), 3x1, 2x3 and 5x2 pixels."""
    header = struct.pack(">IIBBBBB", 5, 5, 8, 2, 0, 0, 1)
    passes = [(1, 1), (1, 1), (2, 1), (1, 2), (3, 1), (2, 3), (5, 2)]
    assert sum(w * h for w, h in passes) == 25
    assert png_bytes(header) == sum(h * (1 + 3 * w) for w, h in passes)


def test_pixels_beyond_those_that_a_png_announces_take_no_memory() -> None:
    """100 MB that a file of 100 kB unpacks to are refused as soon as they are more than announced."""
    row = bytes(1 << 20)
    packed = zlib.compressobj(9)
    data = b"".join(packed.compress(row) for _ in range(100)) + packed.flush()
    body = image(1)[:33] + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    def act() -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(Refused, match=r"image_undecodable: it unpacks to more than the 200 bytes it announces"):
            decode_image(body, checked=True)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB

    in_a_fork(act)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_that_its_exif_turns_is_upright_where_it_is_fitted(orientation: int) -> None:
    """As Pillow's own `exif_transpose` has it, which reads the EXIF by itself."""
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8, 0], pixels[8:, 16:, 1] = 255, 255
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, "jpeg", exif=exif, quality=95)
    body = buffer.getvalue()
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(body)))
    assert np.array_equal(np.asarray(decode_rgb(body)), np.asarray(expected))
    header = read_header(body)
    assert header.orientation == orientation
    assert header.upright == np.asarray(expected).shape[:2]
    assert (header.width, header.height) == (24, 16)


@pytest.mark.parametrize(
    "exif",
    [
        b"", b"II*\0", b"MM\0*" + b"\xff" * 4, b"II*\0\x08\0\0\0" + b"\xff" * 99, b"XX*\0" + bytes(60),
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHIHH", 0x0112, 3, 1, 9, 0),
        b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHII", 0x0112, 4, 1, 6),
    ],
)  # fmt: skip
def test_an_exif_that_cannot_be_understood_turns_nothing(exif: bytes) -> None:
    assert orientation_of(exif) == 1


def test_what_applications_write_into_a_jpeg_is_not_read() -> None:
    """Hundreds of EXIF segments, 20 MB, which Pillow would put together one by one; what is left is the plain image."""
    plain = noise()
    segment = b"\xff\xe1\xff\xff" + b"Exif\0\0" + bytes(65_527)
    body = plain[:2] + segment * 320 + b"\xff\xfe\x00\x08secret" + plain[2:]
    assert jpeg_pixels(body).body == jpeg_pixels(plain).body
    assert np.array_equal(decode_image(body), decode_image(plain))
