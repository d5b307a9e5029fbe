"""Image files that may be hostile: PNG, JPEG and WebP, the header first, and pixels only where it announces few enough.

The three decoders are called by what a file begins with; no other decoder of Pillow can be reached. Of a PNG and a JPEG
only the parts that make pixels are handed on (`image_parts`).
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from symbiotic.data.bad import Refused
from symbiotic.data.image_parts import JPEG, JPEG_END, PNG, Jpeg, check_unpacked, jpeg_pixels, png_pixels
from symbiotic.data.packing import Array

MAX_PIXELS = 64_000_000
"""Of an image: 8,000 x 8,000, 192 MB of RGB."""

_MAX_SCANS = 200  # of a progressive JPEG; each is a pass over all pixels, and encoders write about ten
_DECODERS: dict[bytes, type[ImageFile.ImageFile]] = {
    PNG: PngImagePlugin.PngImageFile,
    JPEG: JpegImagePlugin.JpegImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}
_PNG_MODES = {(8, 2): "RGB", (8, 6): "RGBA", (8, 0): "L", (8, 4): "LA", (8, 3): "P"}
_CONVERTED = ("RGB", "RGBA", "L", "LA", "P", "1", "CMYK")
_MORE = bytes(range(1, 129))
_MORE += b"".join(b"\xff" + bytes([0xD0 + n]) + _MORE for n in range(8))
"""What a decoder takes for pixels where some are missing, also where it looks for any of the eight restart marks."""
_TURNS = (
    *(None, Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM),
    *(Image.Transpose.TRANSPOSE, Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90),
)
"""What puts an image upright, by its orientation from 1 on."""


class Header(NamedTuple):
    """What an image announces."""

    width: int  # pixels
    height: int
    mode: str  # as Pillow has it; RGB is the one that is trained on
    orientation: int = 1  # of its EXIF; 1 is upright

    @property
    def upright(self) -> tuple[int, int]:
        """(height, width) of the image as it is to be looked at."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def read_header(body: bytes, max_pixels: int = MAX_PIXELS) -> Header:
    """Size and mode of an image, without decoding it.

    Raises:
        Refused: not one of the three formats, too many pixels, or no readable header.
    """
    header = _check_announced(body, max_pixels)
    if header is None:
        parts = jpeg_pixels(body) if body.startswith(JPEG) else Jpeg(body)
        image = _open(parts.body, max_pixels)
        header = Header(*image.size, image.mode, parts.orientation)
    return header


def decode_rgb(body: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """An image of any mode as RGB, upright; what is transparent is white.

    Raises:
        Refused: as `decode_image`, or a mode that is not read.
    """
    image = _loaded(body, max_pixels, checked=True)
    if image.mode not in _CONVERTED:
        raise Refused("image_mode", f"its mode is {image.mode}; must be one of {', '.join(_CONVERTED)}")
    if image.mode in ("RGBA", "LA") or "transparency" in image.info:
        clear = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear).convert("RGB")
    turn = _TURNS[(jpeg_pixels(body).orientation if body.startswith(JPEG) else 1) - 1]
    rgb = image.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def decode_image(body: bytes, max_pixels: int = MAX_PIXELS, checked: bool = False) -> Array:
    """All pixels: uint8 [H, W, 3] of an RGB image (other modes as Pillow has them).

    checked: also look for pixels that decoders overlook, too many in a PNG and too few in a JPEG; where that has been
    done, and a checksum says that the file is the same, it need not be.

    Raises:
        Refused: as `read_header`, or the image is cut off, damaged or animated.
    """
    return np.asarray(_loaded(body, max_pixels, checked))


def _loaded(body: bytes, max_pixels: int, checked: bool) -> ImageFile.ImageFile:
    _check_announced(body, max_pixels)
    jpeg = None
    if body.startswith(PNG):
        body = png_pixels(body)
        if checked:
            check_unpacked(body)
    if body.startswith(JPEG):
        jpeg = jpeg_pixels(body)
        body = jpeg.body
        _check_scans(body)
    image = _open(body, max_pixels)
    if getattr(image, "is_animated", False):
        raise Refused("image_animated", "it has several frames")
    try:
        image.load()
    except Exception as error:  # a decoder may raise anything on hostile bytes
        raise _refused(error) from error
    if checked and jpeg is not None:
        _check_closed(jpeg, image)
    return image


def _check_closed(jpeg: Jpeg, image: ImageFile.ImageFile) -> None:
    """A decoder paints blocks whose bytes are missing in one grey, without a word, where an end mark follows. So where
    the last block is of one colour (or the image comes in passes), it is decoded once more with bytes put before the
    end mark: a whole image does not need them.

    Raises:
        Refused: it takes them for pixels.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    corner = pixels[(height - 1) // 8 * 8 :, (width - 1) // 8 * 8 :]
    if jpeg.sequential and (corner != corner[0, 0]).any():
        return
    end = jpeg.body.rfind(JPEG_END)
    other = JpegImagePlugin.JpegImageFile(io.BytesIO(jpeg.body[:end] + _MORE + jpeg.body[end:]))
    try:
        same = np.array_equal(np.asarray(other), pixels)
    except Exception:  # as above
        same = False
    if not same:
        raise Refused("image_truncated", "a JPEG whose last pixels are missing, closed by an end mark")


def _check_scans(body: bytes) -> None:
    """Raises Refused: a JPEG of endless passes, or one that does not end, which Pillow bears where a library asks it to
    (`ImageFile.LOAD_TRUNCATED_IMAGES`)."""
    scans = body.count(b"\xff\xda")
    if scans > _MAX_SCANS:
        raise Refused("image_undecodable", f"a JPEG of {scans} scans, more than {_MAX_SCANS}")
    if body.rfind(JPEG_END) < body.rfind(b"\xff\xda"):
        raise Refused("image_truncated", f"a JPEG that ends at byte {len(body)} without its end mark")


def _open(body: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Opened, not decoded. Not by `Image.open`: its own limit on pixels is a warning, and of the whole process."""
    kind = next((kind for magic, kind in _DECODERS.items() if body.startswith(magic)), None)
    if kind is None:
        raise Refused("image_format", f"it begins with {body[:8]!r}; must be PNG, JPEG or WebP")
    try:
        image = kind(io.BytesIO(body))
    except Exception as error:  # as above
        raise _refused(error) from error
    _check_pixels(image.size, max_pixels)
    return image


def _refused(error: Exception) -> Refused:
    cut_off = "truncated" in str(error).lower()
    return Refused("image_truncated" if cut_off else "image_undecodable", str(error) or type(error).__name__)


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    if size[0] * size[1] > max_pixels:
        pixels = f"{size[0]} x {size[1]} = {size[0] * size[1]:,} pixels"
        raise Refused("image_too_large", f"it announces {pixels}, more than {max_pixels:,}; not decoded")


def _check_announced(body: bytes, max_pixels: int) -> Header | None:
    """What a PNG says, read without its decoder, which would unpack texts on the way; None of the other formats.

    Raises:
        Refused: too many pixels, also of a WebP, whose decoder takes the memory as it opens one.
    """
    if body.startswith(PNG):
        if len(body) < 33 or body[12:16] != b"IHDR":
            raise Refused("image_truncated" if len(body) < 33 else "image_undecodable", "a PNG without its header")
        width, height, bits, colours = struct.unpack(">IIBB", body[16:26])
        _check_pixels((width, height), max_pixels)
        return Header(width, height, _PNG_MODES.get((bits, colours), f"{bits} bits of colour type {colours}"))
    if body.startswith(b"RIFF") and body[8:12] == b"WEBP":
        _check_pixels(_webp_size(body[12:16], body[20:30]), max_pixels)
        if struct.unpack("<I", body[4:8])[0] + 8 > len(body):
            raise Refused("image_truncated", "it announces more bytes than it has")
    return None


def _webp_size(kind: bytes, data: bytes) -> tuple[int, int]:
    if kind == b"VP8X":
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[6:8], "little") & 0x3FFF, int.from_bytes(data[8:10], "little") & 0x3FFF
