"""From the members of one key to a sample: everything that is looked at, in a fixed order; the first fault counts."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from symbiotic.data.adapters import TXT, Origin
from symbiotic.data.bad import BadSample, Refused, printable
from symbiotic.data.fit import Fit, boxes_of, strip
from symbiotic.data.formats import Counts, measure
from symbiotic.data.image_files import MAX_PIXELS, decode_image, read_header
from symbiotic.data.packing import Array
from symbiotic.data.records import PATCH, check_record, parse_record
from symbiotic.data.tar import Member, Source, check_name, read_body, split_name
from symbiotic.data.tokenizer import Tokenizer

IMAGES = ("png", "jpg", "jpeg", "webp")
_NUMBERED = re.compile(rf"(?:(\d{{1,4}})\.)?({'|'.join(IMAGES)})")
_MAX_BYTES = {"json": 1 << 20, "txt": 1 << 20, "image": 64 << 20}


class Place(NamedTuple):
    """Where a member's body lies in its shard; all 0 where there is none."""

    offset: int = 0
    size: int = 0
    crc: int = 0  # CRC-32


@dataclass(frozen=True)
class ShardSample:
    """A sample that passed all checks.

    pixels: uint8 [H, W, 3]; None of text records, and where only headers are read. counts: None without a tokenizer.
    bodies: the image files, where `Checks.keep` asks for them.
    """

    shard: str
    key: str
    record: dict[str, Any]
    pixels: Array | None
    json: Place
    image: Place
    counts: Counts | None
    bodies: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Checks:
    """What is asked of a sample beyond its form.

    tokenizer: counts its tokens. row_tokens: at most so many of them. max_pixels: of an image. decode: the whole
    image, not only its header. origin: of samples that are not in our own format. keep: the image files stay with the
    sample.
    """

    tokenizer: Tokenizer | None = None
    row_tokens: int | None = None
    max_pixels: int = MAX_PIXELS
    decode: bool = True
    origin: Origin | None = None
    keep: bool = False

    @property
    def foreign(self) -> Origin | None:
        return self.origin if self.origin is not None and self.origin.adapter is not None else None


class Group:
    """The members of one key that stand next to each other.

    start: where the first of them begins in the shard, in bytes. fault: what is wrong with the key itself.
    """

    def __init__(self, key: str, start: int, fault: Refused | None, checks: Checks) -> None:
        self.key, self.start, self.fault, self.checks = key, start, fault, checks
        adapter = checks.foreign.adapter if checks.foreign else None
        self._texts, self._several = adapter is not None and adapter.texts, adapter is not None and adapter.several
        self._bodies: dict[str, tuple[Place, bytes]] = {}
        self._images: dict[int, tuple[Place, bytes]] = {}
        self._names: set[str] = set()

    def add(self, member: Member, source: Source) -> None:
        """Read a member, unless the sample is bad already.

        Raises:
            Refused: the shard cannot be read on; a fault of the sample alone is kept.
        """
        try:
            if self.fault is None:
                kind, number = self._check(member)
        except Refused as fault:
            self.fault = fault
        if self.fault is None:
            body = read_body(source, member)
            found = Place(member.offset, member.size, zlib.crc32(body)), body
            if kind == "image":
                self._images[number] = found
            else:
                self._bodies[kind] = found

    def _check(self, member: Member) -> tuple[str, int]:
        """`json`, `txt` or `image`, and the number of an image among several."""
        check_name(member.name)
        kind, number = self._kind(split_name(member.name)[1])
        if not member.is_file:
            raise Refused("link_or_device", f"{member.name} is no plain file")
        if kind not in _MAX_BYTES or (kind == "txt" and not self._texts):
            raise Refused("member_not_allowed", f"{member.name}: only KEY.json and KEY.{'/.'.join(IMAGES)} are read")
        if member.name in self._names:
            raise Refused("duplicate_member", f"{member.name} occurs twice")
        if kind in self._bodies or number in self._images:
            raise Refused("several_images", f"{member.name} is a second image" if kind == "image" else member.name)
        if not 0 < member.size <= _MAX_BYTES[kind]:
            fault = "oversized_member" if member.size else "empty_member"
            raise Refused(fault, f"{member.name} has {member.size:,} bytes; must have 1 to {_MAX_BYTES[kind]:,}")
        self._names.add(member.name)
        return kind, number

    def _kind(self, extension: str) -> tuple[str, int]:
        if self._several and (found := _NUMBERED.fullmatch(extension)):
            return "image", int(found[1] or 0)
        return ("image", 0) if extension in IMAGES else (extension, -1)

    def judge(self, shard: str) -> ShardSample | BadSample:
        """The sample, or the first thing that is wrong with it."""
        try:
            if self.fault is not None:
                raise self.fault
            return self._sample(shard)
        except Refused as fault:
            return BadSample(shard, printable(self.key), fault.kind, fault.reason)

    def _sample(self, shard: str) -> ShardSample:
        if "json" not in self._bodies and "txt" not in self._bodies:
            raise Refused("missing_json", f"no {self.key}.json next to its image")
        place, text = self._bodies.get("json", (Place(), b"{}"))
        raw = parse_record(text, strict=self.checks.foreign is None)
        if "txt" in self._bodies:
            raw[TXT] = self._bodies["txt"][1].decode(errors="replace")
        images = [self._images[number] for number in sorted(self._images)]
        return judged(shard, self.key, raw, place, images, self.checks)


def judged(
    shard: str, key: str, raw: dict[str, Any], place: Place, images: Sequence[tuple[Place, bytes]], checks: Checks
) -> ShardSample:
    """The sample that a record and its images are. raw: the record as it stands there, at `place`.

    Raises:
        Refused: the first thing that is wrong with it.
    """
    bodies = tuple(body for _, body in images)
    if checks.foreign is not None:
        record, pixels = _adapted(raw, bodies, checks, checks.foreign)
    else:
        record = raw
        check_record(record)
        pixels = _check_image(record, bodies[0] if bodies else b"", checks)
    counts = measure(record, checks.tokenizer, PATCH) if checks.tokenizer else None
    splits = checks.foreign is not None and checks.foreign.adapter is not None and checks.foreign.adapter.splits
    if counts and checks.row_tokens and counts.tokens > checks.row_tokens and not splits:
        raise Refused("too_long", f"{counts.tokens} tokens, more than row_tokens={checks.row_tokens}")
    image = images[0][0] if images else Place()
    return ShardSample(shard, key, record, pixels, place, image, counts, bodies if checks.keep else ())


def _adapted(
    raw: dict[str, Any], bodies: Sequence[bytes], checks: Checks, origin: Origin
) -> tuple[dict[str, Any], Array | None]:
    """Our record of a sample in another layout, and its images, fitted, where they are decoded."""
    adapter, fit = origin.adapter, Fit(origin.fit, origin.side)
    assert adapter is not None
    if origin.format == "img2dataset" and not bodies:
        raise Refused("missing_image", "a caption needs an image next to it")
    boxes = boxes_of(bodies, fit, checks.max_pixels)
    record = adapter.record(raw, boxes, origin)
    check_record(record)
    if bodies and record["task"] == "lm":
        raise Refused("unexpected_image", "a record of text only has no image")
    return record, strip(bodies, boxes, fit, checks.max_pixels) if bodies and checks.decode else None


def _check_image(record: Mapping[str, Any], body: bytes, checks: Checks) -> Array | None:
    """The pixels, where they are decoded. Raises Refused."""
    if record["task"] == "lm":
        if body:
            raise Refused("unexpected_image", "a record of task lm has no image")
        return None
    if not body:
        raise Refused("missing_image", f"a record of task {record['task']} needs an image next to it")
    header = read_header(body, checks.max_pixels)
    height, width = record["height"], record["width"]
    if (header.height, header.width) != (height, width):
        size = f"{header.height} x {header.width}"
        raise Refused("image_size_mismatch", f"it is {size} (height x width), the record says {height} x {width}")
    if header.mode != "RGB":
        raise Refused("image_mode", f"its mode is {header.mode}; must be RGB of 8 bits")
    if header.orientation != 1:
        raise Refused("image_mode", f"its EXIF has it turned (orientation {header.orientation}); must be upright")
    if height % PATCH or width % PATCH:
        raise Refused("image_patches", f"{height} x {width} does not divide into patches of {PATCH} x {PATCH}")
    return decode_image(body, checks.max_pixels, checked=True) if checks.decode else None
