"""Kinds of bad samples: short names that stay the same, and what each of them means."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = {
    # members
    "member_not_allowed": "a member that is no KEY.json, .png, .jpg, .jpeg or .webp; it is not opened",
    "unsafe_name": "a name that leads out of the folder, is too long, or holds characters that no name should",
    "link_or_device": "a member that is no plain file",
    "empty_member": "a member of 0 bytes",
    "oversized_member": "a member larger than any that is read",
    "duplicate_member": "the same member twice in one sample",
    "duplicate_key": "members of a key that came before in the same shard",
    # records
    "missing_json": "no KEY.json beside the image",
    "text_not_utf8": "a record that is no UTF-8",
    "not_json": "a record that is no JSON",
    "json_not_object": "a record that is no JSON object",
    "repeated_json_key": "a record that says the same key twice",
    "unknown_task": "a task that is none of the project's",
    "missing_key": "a record without a key that its task needs",
    "wrong_type": "a value of another type than its key has",
    "bad_size": "a height or width that is not positive",
    "empty_text": "a text without a word",
    "half_character": "a text that is no valid Unicode",
    "special_token": "a text that spells a special token, such as <gen>",
    "too_long": "more tokens than a row takes",
    # images
    "missing_image": "no image beside a record whose task needs one",
    "unexpected_image": "an image beside a record of text only",
    "several_images": "more than one image",
    "image_too_large": "an image whose header announces too many pixels; it is not decoded",
    "image_format": "content that is no PNG, JPEG or WebP",
    "image_truncated": "an image that is cut off",
    "image_damaged": "an image whose own checksum differs",
    "image_undecodable": "an image that the decoder refuses",
    "image_size_mismatch": "an image of another size than the record says",
    "image_mode": "an image that is not RGB of 8 bits, or not stored upright",
    "image_animated": "an image of several frames",
    "image_patches": "an image that does not divide into patches",
    # shards: what is left of one is a single entry
    "unreadable_shard": "a shard that the system cannot read",
    "not_a_tar": "a shard that is no plain tar",
    "empty_shard": "a shard without a sample",
    "damaged_header": "a tar header that is damaged; the rest of the shard is not read",
    "truncated_shard": "a shard that is cut off",
    "data_after_end": "data behind the end mark of the tar; it is not read",
}
"""Kind -> its meaning, in the order of tables."""


@dataclass(frozen=True)
class BadSample:
    """A sample that is left out, or the unreadable rest of a shard.

    kind: of `KINDS`. key: empty where the rest of a shard belongs to no sample. reason: one printable line.
    """

    shard: str
    key: str
    kind: str
    reason: str


class Refused(Exception):
    """Raised by the checks of one sample, and by the scan for the rest of a shard; never leaves this package.

    offset: where the unreadable rest of a shard begins, in bytes. key: the sample that it begins in, if known.
    """

    def __init__(self, kind: str, reason: str, offset: int = 0, key: str = "") -> None:
        super().__init__(f"{kind}: {reason}")
        self.kind, self.reason, self.offset, self.key = kind, printable(reason), offset, key


def printable(text: object, limit: int = 200) -> str:
    """One line that a terminal can show, whatever a hostile name or text holds; cut at `limit` characters."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)[: limit + 1])
    return line if len(line) <= limit else line[: limit - 1] + "…"
