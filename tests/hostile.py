"""Shards that hold every kind of bad sample between good ones, and what must be found in them."""

from __future__ import annotations

import functools
import io
import json
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch.multiprocessing.spawn import start_processes

from symbiotic.data.bad import printable
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.stream import ShardStream
from symbiotic.data.tar import LocalSource, split_name
from symbiotic.data.tokenizer import Tokenizer

TOKENIZER = Tokenizer.build(["number", "red"])
ROW_TOKENS = 64
MAX_PIXELS = 1_000_000
SIDE = 8
TIMES = 20  # bad samples of each kind


class Entry(NamedTuple):
    """A member of a tar."""

    name: str
    body: bytes = b""
    type: bytes = tarfile.REGTYPE
    link: str = ""


def tar_of(entries: Iterable[Entry], **options: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:  # type: ignore[call-overload]
        for entry in entries:
            info = tarfile.TarInfo(entry.name)
            info.size, info.type, info.linkname = len(entry.body), entry.type, entry.link
            tar.addfile(info, io.BytesIO(entry.body))
    return buffer.getvalue()


# --------------------------------------------------------------------------- good samples


def pixels_of(number: int, side: int = SIDE) -> np.ndarray:
    """An image that says which sample it belongs to."""
    return np.full((side, side, 3), [number % 256, number // 256, 77], np.uint8)


@functools.cache
def image(number: int, kind: str = "png", mode: str = "RGB", side: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(pixels_of(number, side)).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def record(number: int, **changes: object) -> bytes:
    values = {"task": "t2i", "caption": f"number {number}", "height": SIDE, "width": SIDE, **changes}
    return json.dumps({key: value for key, value in values.items() if value is not ...}).encode()


def good(key: str, number: int) -> list[Entry]:
    return pair(key, record(number), image(number))


def pair(key: str, text: bytes, picture: bytes) -> list[Entry]:
    return [Entry(f"{key}.json", text), Entry(f"{key}.png", picture)]


# --------------------------------------------------------------------------- images made by hand


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_header(width: int, height: int) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))


def png_with_header(width: int, height: int, number: int = 0) -> bytes:
    """A small PNG that announces another size."""
    return png_header(width, height) + image(number)[33:]


def black_png(width: int, height: int) -> bytes:
    """A real one of any size in little time: a deflate block of one row, again and again."""
    row = bytes(1 + 3 * width)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(row) + packer.flush(zlib.Z_FULL_FLUSH)
    packed = b"\x78\x01" + block * height + b"\x03\x00" + struct.pack(">HH", len(row) * height % 65521, 1)
    return png_header(width, height) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def jpeg_with_header(width: int, height: int) -> bytes:
    body = bytearray(image(1, "jpeg"))
    at = body.index(b"\xff\xc0")
    body[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(body)


def webp_with_header(width: int, height: int) -> bytes:
    """An extended WebP with a canvas of this size around a small image."""
    inner = image(1, "webp")[12:]
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + inner
    return b"RIFF" + struct.pack("<I", len(body)) + body


@functools.cache
def animated(kind: str) -> bytes:
    frames, buffer = [Image.fromarray(pixels_of(n)) for n in (1, 200)], io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


def png_twice(number: int) -> bytes:
    """A second header, of another size, behind the first: what a checker reads, and what a decoder paints."""
    body = image(number)
    return body[:33] + png_header(2 * SIDE, SIDE)[8:] + body[33:]


def png_of_more(number: int, rows: int = 5_000) -> bytes:
    """Pixels of many more rows than the header announces; each unpacks to 25 bytes and takes next to none."""
    row = b"\0" + pixels_of(number)[0].tobytes()
    return image(number)[:33] + chunk(b"IDAT", zlib.compress(row * rows)) + chunk(b"IEND", b"")


@functools.cache
def noise(side: int = 64, **options: object) -> bytes:
    """A JPEG whose pixels take many bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "jpeg", **options)
    return buffer.getvalue()


def cut_and_closed(number: int, side: int = 64, **options: object) -> bytes:
    """A JPEG without its last pixels, but with an end mark."""
    body = noise(side, **options)
    start = body.rfind(b"\xff\xda") + 14
    return body[: start + (len(body) - start) * (5 + number % 90) // 100].rstrip(b"\xff") + b"\xff\xd9"


@functools.cache
def turned(orientation: int, side: int = SIDE) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(1, side)).save(buffer, "jpeg", exif=exif)
    return buffer.getvalue()


def flipped(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def bad_pixels(number: int) -> bytes:
    """Chunks whose checksums are right around pixels that are not deflated."""
    return image(number)[:33] + chunk(b"IDAT", b"no deflated pixels") + chunk(b"IEND", b"")


def gif() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(0)).save(buffer, "gif")
    return buffer.getvalue()


# --------------------------------------------------------------------------- bad samples

Bad = Callable[[str, int], list[Entry]]


def text(*bodies: bytes) -> Bad:
    """Samples with a good image and one of these records, in turns."""
    return lambda key, n: pair(key, bodies[n % len(bodies)], image(n))


def changed(*changes: dict[str, object]) -> Bad:
    return lambda key, n: pair(key, record(n, **changes[n % len(changes)]), image(n))


def picture(*makers: Callable[[int], bytes], **changes: object) -> Bad:
    """Samples with a good record and one of these images, in turns."""
    return lambda key, n: pair(key, record(n, **changes), makers[n % len(makers)](n))


def with_member(*names: str, body: bytes = b"payload", kind: bytes = tarfile.REGTYPE, link: str = "") -> Bad:
    """Good samples with one member more, in turns."""
    return lambda key, n: [*good(key, n), Entry(names[n % len(names)].format(key=key), body, kind, link)]


def linked(key: str, n: int) -> list[Entry]:
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE)
    return [Entry(f"{key}.json", record(n)), Entry(f"{key}.png", b"", kinds[n % 4], "/etc/passwd")]


def unsafe(key: str, n: int) -> list[Entry]:
    return good(("../{}", "/tmp/{}", "a\\{}", "a\x07{}", "a/../../{}", "{}" + 300 * "x")[n % 6].format(key), n)


def scattered(key: str, n: int) -> list[Entry]:
    """The key of the good sample before the last one, again."""
    return good(f"good-{n:04d}", n)


def in_turns(*ways: Bad) -> Bad:
    return lambda key, n: ways[n % len(ways)](key, n)


def closed(key: str, n: int) -> list[Entry]:
    """Cut off images of four blocks, with an end mark."""
    body = cut_and_closed(n % 50, side=16, subsampling=0, progressive=n // 6 % 2 == 1)
    return pair(key, record(n, height=16, width=16), body)


LM = {"task": "lm", "caption": ..., "height": ..., "width": ...}
SAMPLES: dict[str, Bad] = {
    "member_not_allowed": with_member(
        "{key}.pkl", "{key}.pth", "{key}.pyd", "{key}.cls", "{key}.npy", "{key}", "{key}.a.png"
    ),
    "unsafe_name": unsafe,
    "link_or_device": linked,
    "empty_member": picture(lambda n: b""),
    "oversized_member": text(b" " * (1 << 20) + b"{}"),
    "duplicate_member": lambda key, n: [*good(key, n), Entry(f"{key}.png", image(n + 1))],
    "duplicate_key": scattered,
    "missing_json": lambda key, n: [Entry(f"{key}.png", image(n))],
    "text_not_utf8": text(b'{"task": "t2i", "caption": "\xff"}', "{}".encode("utf-16")),
    "not_json": text(
        *(b"{", b"red", b'{"task": NaN}', b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"),
        *(b"[" * 65 + b"]" * 65, b"[" * 65 + b'"' + b'\\"' * 100_000),
    ),
    "json_not_object": text(b"[]", b"3", b'"red"', b"null"),
    "repeated_json_key": text(b'{"task": "lm", "text": "red", "text": "blue"}'),
    "unknown_task": changed({"task": "sing"}, {"task": ...}, {"task": ["lm"]}, {"task": None}),
    "missing_key": changed({"caption": ...}, {"height": ...}, {"task": "mmu", "question": "what"}, {"task": "lm"}),
    "wrong_type": changed({"caption": 5}, {"caption": None}, {"height": "8"}, {"width": True}, {"width": 8.0}),
    "bad_size": changed({"height": 0}, {"width": -8}),
    "empty_text": changed({"caption": ""}, {"caption": " \n"}),
    "half_character": text(b'{"task": "t2i", "caption": "\\ud800", "height": 8, "width": 8}'),
    "special_token": changed({"caption": "red <gen> blue"}, {"caption": "<pad>"}),
    "too_long": changed({"caption": "number " * ROW_TOKENS}),
    "missing_image": lambda key, n: [Entry(f"{key}.json", record(n))],
    "unexpected_image": changed({**LM, "text": "red"}),
    "several_images": lambda key, n: [*good(key, n), Entry(f"{key}.jpg", image(n, "jpeg"))],
    "image_too_large": picture(
        lambda n: png_with_header(20_000, 20_000),
        lambda n: png_header(2**31 - 1, 2**31 - 1),
        lambda n: jpeg_with_header(60_000, 60_000),
        lambda n: webp_with_header(16_000, 16_000),
    ),
    "image_format": picture(lambda n: gif(), lambda n: b"\x80\x04cos\nsystem\n", lambda n: b"GIF89a"),
    "image_truncated": in_turns(
        closed,
        picture(lambda n: image(n)[:-14]),
        picture(lambda n: image(n)[:-12]),
        picture(lambda n: image(n)[:30]),
        picture(lambda n: image(1, "jpeg")[:-4]),
        picture(lambda n: image(1, "webp")[:-10]),
    ),
    "image_damaged": picture(lambda n: flipped(image(n), 45)),
    "image_undecodable": picture(
        bad_pixels,
        lambda n: image(n)[:8] + bytes(60),
        lambda n: b"\xff\xd8\xff" + bytes(50),
        lambda n: b"RIFF" + bytes(60),
        png_twice,
        png_of_more,
    ),
    "image_size_mismatch": picture(lambda n: image(n, side=12), lambda n: image(n, "jpeg", side=12)),
    "image_mode": picture(
        *(lambda n: image(n, "png", "RGBA"), lambda n: image(n, "jpeg", "L"), lambda n: image(n, "png", "P")),
        lambda n: turned(2 + n % 7),
    ),
    "image_animated": picture(lambda n: animated("png"), lambda n: animated("webp")),
    "image_patches": picture(lambda n: image(n, side=6), height=6, width=6),
}


# --------------------------------------------------------------------------- bad shards: three good samples and a fault


class BadShard(NamedTuple):
    """content: None for a file that is not there. key: of the sample in which the rest begins."""

    content: bytes | None
    num_good: int = 0
    key: str = ""


def three(first: int) -> list[Entry]:
    return [entry for n in range(first, first + 3) for entry in good(f"good-{n:04d}", n)]


def damaged_header(n: int) -> BadShard:
    """Of the record or of the image of one of the samples: without either there is no telling what it was."""
    whole, member = tar_of(three(n)), 1 + n % 5
    key = f"good-{n + member // 2:04d}" if member % 2 else ""
    return BadShard(flipped(whole, 1024 * member + 3), member // 2, key)


def truncated(n: int) -> BadShard:
    """Cut anywhere: in a header, in a body, between two samples."""
    whole, cut = tar_of(three(n)), 520 + 257 * n
    ends = [2 * 1024 * (i + 1) - 512 + len(image(n + i)) for i in range(3)]
    num_good = sum(cut >= end for end in ends)
    began = num_good < 3 and cut >= 2 * 1024 * num_good + 512
    return BadShard(whole[:cut], num_good, f"good-{n + num_good:04d}" if began else "")


def not_a_tar(n: int) -> BadShard:
    whole = tar_of(three(n))
    return BadShard((zlib.compress(whole) * 4, b"<html>" * 200, flipped(whole, 4), whole[1:])[n % 4])


def empty(n: int) -> BadShard:
    folder = tar_of([Entry("folder", type=tarfile.DIRTYPE)])
    return BadShard((b"", bytes(1024), bytes(10240), folder)[n % 4])


SHARDS: dict[str, Callable[[int], BadShard]] = {
    "unreadable_shard": lambda n: BadShard(None),
    "not_a_tar": not_a_tar,
    "empty_shard": empty,
    "damaged_header": damaged_header,
    "truncated_shard": truncated,
    "data_after_end": lambda n: BadShard(tar_of(three(n)) + tar_of(three(n + 3)), 3),
}


# --------------------------------------------------------------------------- all of it, on disk


class Zoo(NamedTuple):
    """Shards in a folder, and what is to be found: (shard, key, number), and (shard, key, kind)."""

    folder: Path
    shards: list[str]
    good: list[tuple[str, str, int]]
    bad: list[tuple[str, str, str]]


def write_zoo(folder: Path, times: int = TIMES) -> Zoo:
    """A shard for every kind of bad sample, in turns with good ones; a shard for every bad shard."""
    zoo = Zoo(folder, [], [], [])
    for kind, make in SAMPLES.items():
        shard, entries = f"{kind}-00000.tar", good("good-0000", 0)
        zoo.good.append((shard, "good-0000", 0))
        for n in range(times):
            bad = make(f"bad-{n:04d}", n)
            entries += [*good(f"good-{n + 1:04d}", n + 1), *bad]
            zoo.good.append((shard, f"good-{n + 1:04d}", n + 1))
            zoo.bad.append((shard, printable(split_name(bad[0].name)[0]), kind))
        zoo.shards.append(shard)
        (folder / shard).write_bytes(tar_of(entries))
    for kind, spoil in SHARDS.items():
        for n in range(times):
            shard, spoilt = f"{kind}-{n:05d}.tar", spoil(n)
            zoo.good.extend((shard, f"good-{i:04d}", i) for i in range(n, n + spoilt.num_good))
            zoo.bad.append((shard, spoilt.key, kind))
            zoo.shards.append(shard)
            if spoilt.content is not None:
                (folder / shard).write_bytes(spoilt.content)
    return zoo


# --------------------------------------------------------------------------- reading it


def number_in(pixels: np.ndarray | None) -> int:
    """Which sample an image belongs to; it is of one colour."""
    assert pixels is not None
    number = int(pixels[0, 0, 0]) + 256 * int(pixels[0, 0, 1])
    assert np.array_equal(pixels, pixels_of(number))
    return number


def number_of(sample: ShardSample) -> int:
    """The number that key, text and image agree on."""
    number = number_in(sample.pixels)
    assert sample.record["caption"] == f"number {number}"
    return number


CHECKS = Checks(TOKENIZER, ROW_TOKENS, MAX_PIXELS)


def opener(folder: Path) -> Callable[[str], LocalSource]:
    return lambda name: LocalSource(folder / name)


def stream_of(folder: Path, shards: list[str], positions: dict[str, int | None] | None = None) -> ShardStream:
    return ShardStream(shards, CHECKS, positions, opener(folder))


def write_shard(folder: Path, name: str, entries: list[Entry]) -> str:
    (folder / name).write_bytes(tar_of(entries))
    return name


def in_a_fork(act: Callable[[], object]) -> None:
    """Call it in a forked process, whose memory and audit hooks are its own; what it raises is raised here."""
    start_processes(_call, (act,), nprocs=1, start_method="fork")


def _call(rank: int, act: Callable[[], object]) -> None:
    act()
