"""What image files are made of, read without a decoder: the parts that make pixels, and whether they are all there.

PNG: W3C, Portable Network Graphics, 3rd edition, 5, 7.2 and 8.1. JPEG: ITU-T T.81, annex B. EXIF: CIPA DC-008, 4.6.
"""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from symbiotic.data.bad import Refused

PNG, JPEG, JPEG_END = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\xd9"
_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_STEP = 1 << 20  # bytes unpacked at a time
_APPLICATIONS = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # EXIF, profiles, comments; not JFIF (E0) and Adobe's colours (EE)
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length
_ORIENTATION = 0x0112


def png_pixels(body: bytes) -> bytes:
    """The PNG without texts, profiles and the like, which may unpack to many times their size.

    Raises:
        Refused: a chunk whose checksum differs, a second header, frames, or no end.
    """
    kept, at, headers = [PNG], len(PNG), 0
    while at < len(body):
        end = at + 12 + int.from_bytes(body[at : at + 4], "big")
        kind = body[at + 4 : at + 8]
        if end > len(body):
            break
        if zlib.crc32(body[at + 4 : end - 4]) != int.from_bytes(body[end - 4 : end], "big"):
            raise Refused("image_damaged", f"the checksum of its chunk {kind!r} differs")
        if kind == b"acTL":
            raise Refused("image_animated", "it has several frames")
        headers += kind == b"IHDR"
        if headers > 1:
            raise Refused("image_undecodable", f"a second header at byte {at}")
        kept += [body[at:end]] if kind in _CHUNKS else []
        if kind == b"IEND":
            return b"".join(kept)
        at = end
    raise Refused("image_truncated", f"a PNG that ends at byte {len(body)} without its last chunk")


def check_unpacked(body: bytes) -> None:
    """body: of `png_pixels`. Unpacks the pixels, a little at a time, and keeps nothing.

    Raises:
        Refused: they are more bytes than the header announces, which decoders leave where they are, or fewer, where
            decoders put zeros.
    """
    announced = png_bytes(body[16:29])
    unpacker, found, at = zlib.decompressobj(), 0, len(PNG)
    while announced is not None and at < len(body) and not unpacker.eof:
        size = int.from_bytes(body[at : at + 4], "big")
        rest = body[at + 8 : at + 8 + size] if body[at + 4 : at + 8] == b"IDAT" else b""
        while rest and not unpacker.eof:
            try:
                found += len(unpacker.decompress(rest, _STEP))
            except zlib.error:  # what is wrong with them, the decoder tells
                return
            if found > announced:
                raise Refused("image_undecodable", f"it unpacks to more than the {announced:,} bytes it announces")
            rest = unpacker.unconsumed_tail
        at += 12 + size
    if announced is not None and unpacker.eof and found < announced:
        raise Refused("image_truncated", f"it unpacks to {found:,} of the {announced:,} bytes it announces")


def png_bytes(header: bytes) -> int | None:
    """Bytes of all rows, filter bytes included, that a PNG header (13 bytes) announces; None for no colour type."""
    width, height, bits, colours, *_, interlaced = struct.unpack(">IIBBBBB", header)
    if colours not in _CHANNELS:
        return None
    passes = _ADAM7 if interlaced else ((0, 0, 1, 1),)
    sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in passes]
    return sum(h * (1 + -(-w * bits * _CHANNELS[colours] // 8)) for w, h in sizes if w > 0 and h > 0)


class Jpeg(NamedTuple):
    """A JPEG without what applications wrote into it: EXIF, profiles, previews, comments.

    orientation: 1 to 8, of its EXIF; 1 is upright, from 5 on height and width change places. sequential: of one pass,
    Huffman coded, so that its last bytes are those of its last pixels.
    """

    body: bytes
    orientation: int = 1
    sequential: bool = False


def jpeg_pixels(body: bytes) -> Jpeg:
    """What is no JPEG any more from some place on is handed on as it is: the decoder refuses it."""
    kept, at, orientation, sequential = [body[:2]], 2, 0, False
    while at + 4 <= len(body) and body[at] == 0xFF:
        marker, size = body[at + 1], 2 + int.from_bytes(body[at + 2 : at + 4], "big")
        if marker == 0xDA or size < 4:  # pixels
            break
        if marker in _ALONE or marker == 0xFF:  # 0xFF: one that fills
            size = 1 if marker == 0xFF else 2
        sequential |= marker in (0xC0, 0xC1)
        if marker == 0xE1 and not orientation and body[at + 4 : at + 10] == b"Exif\0\0":
            orientation = orientation_of(body[at + 10 : at + size])
        kept += [body[at : at + size]] if marker not in _APPLICATIONS else []
        at += size
    return Jpeg(b"".join((*kept, body[at:])), orientation or 1, sequential)


def orientation_of(exif: bytes) -> int:
    """Of a TIFF header and its first directory; 1 where it says nothing that can be understood."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    at = struct.unpack(f"{order}I", exif[4:8])[0]
    count = struct.unpack(f"{order}H", exif[at : at + 2])[0] if at + 2 <= len(exif) else 0
    for entry in range(at + 2, min(at + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, number, value = struct.unpack(f"{order}HHIH", exif[entry : entry + 10])
        if (tag, kind, number) == (_ORIENTATION, 3, 1):
            return int(value) if 1 <= value <= 8 else 1
    return 1
