"""Shards: plain webdataset, the same bytes every time; damage is named, never read."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from symbiotic.data.account import Account
from symbiotic.data.checks import Checks
from symbiotic.data.shards import DataError, ShardIndex, ShardReader, write_shards
from symbiotic.data.tokenizer import Tokenizer


@pytest.fixture
def shards(corpus: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(corpus / "shards", tmp_path / "shards"))


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, for which no file is unreadable."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_plain_webdataset_reads_the_same_samples(corpus: Path, index: ShardIndex) -> None:
    reader, seen = ShardReader(corpus / "shards", index), 0
    for shard in index.shards:
        for stored in webdataset.WebDataset(str(corpus / "shards" / str(shard)), shardshuffle=False):
            number = int(np.flatnonzero(index.keys == stored["__key__"].encode())[0])
            record, pixels = reader.read(number)
            assert json.loads(stored["json"]) == record
            assert ("png" in stored) == (pixels is not None)
            if pixels is not None:
                assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["png"]))), pixels)
            seen += 1
    assert seen == len(index)


def test_places_and_checksums_are_those_of_the_tar(corpus: Path, index: ShardIndex) -> None:
    for shard in sorted((corpus / "shards").glob("*.tar")):
        data = shard.read_bytes()
        with tarfile.open(shard) as tar:
            for member in tar:
                key, _, kind = member.name.partition(".")
                number = int(np.flatnonzero(index.keys == key.encode())[0])
                offset, size, checksum = getattr(index, kind)[number]
                assert (offset, size) == (member.offset_data, member.size)
                assert checksum == zlib.crc32(data[offset : offset + size])
                assert (member.mtime, member.uid, member.gid) == (0, 0, 0)


def test_an_index_is_stored_and_read_again(corpus: Path, index: ShardIndex, tokenizer: Tokenizer) -> None:
    built = ShardIndex.build(sorted((corpus / "shards").glob("*.tar")), tokenizer)
    for name, value in vars(index).items():
        assert np.array_equal(getattr(built, name), value), name
    assert set(index.sets) == {"lm", "lm_unreplayed", "mmu", "t2i", "t2i_long"}
    assert len(index.members_of("lm")) == 400
    assert len(index.members_of("none")) == 0
    assert index.name(int(index.members_of("mmu")[0])) == "mmu-00000.tar: mmu-000000"


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_shard_that_is_cut_off_is_named(shards: Path, index: ShardIndex, tokenizer: Tokenizer, share: float) -> None:
    shard = shards / "mmu-00000.tar"
    os.truncate(shard, int(share * shard.stat().st_size))
    with pytest.raises(DataError, match=r"mmu-00000\.tar: \d+ bytes where the index says \d+; delete the data folder"):
        ShardReader(shards, index).read(int(index.members_of("mmu")[0]))
    with pytest.raises(DataError, match=r"mmu-00000\.tar: .*(damaged or cut off|not a readable tar)"):
        ShardIndex.build([shard], tokenizer)


def test_every_flipped_bit_of_a_member_is_found(shards: Path, index: ShardIndex) -> None:
    number = int(index.members_of("t2i")[3])
    rng = np.random.default_rng(0)
    for kind in ("json", "png"):
        offset, size, _ = (int(value) for value in getattr(index, kind)[number])
        path = shards / "t2i-00000.tar"
        whole = path.read_bytes()
        for bit in rng.integers(8 * size, size=40).tolist():
            damaged = bytearray(whole)
            damaged[offset + bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=rf"t2i-00000\.tar: t2i-000003\.{kind}: its checksum differs"):
                ShardReader(shards, index).read(number)
        path.write_bytes(whole)
        ShardReader(shards, index).read(number)


def test_a_damaged_header_does_not_drop_the_rest_silently(shards: Path, tokenizer: Tokenizer) -> None:
    shard = shards / "lm-00000.tar"
    data = bytearray(shard.read_bytes())
    data[20 * 1024] ^= 0xFF  # the name of a member in the middle
    shard.write_bytes(data)
    with pytest.raises(DataError, match=r"lm-00000\.tar: the tar is damaged or cut off at byte 20480"):
        ShardIndex.build([shard], tokenizer)


def test_missing_and_forbidden_shards_are_named(shards: Path, index: ShardIndex) -> None:
    (shards / "lm-00000.tar").unlink()
    with pytest.raises(DataError, match=r"cannot read a shard: .*lm-00000\.tar: No such file"):
        ShardReader(shards, index).read(int(index.members_of("lm")[0]))
    (shards / "mmu-00000.tar").chmod(0)
    with as_nobody(), pytest.raises(DataError, match=r"cannot read a shard: no permission for .*mmu-00000\.tar"):
        ShardReader(shards, index).read(int(index.members_of("mmu")[0]))


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, body in members:
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return path


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.pkl", pickle.dumps(0))], r"member 'a\.pkl' is not read: only KEY\.json and KEY\.png are"),
        ([("a.json", b"{}"), ("a.json", b"{}")], r"member 'a\.json' occurs twice"),
        ([("a.png", b"")], r"sample a has no a\.json"),
        ([("a.json", b"{")], r"a\.json: not JSON"),
        ([("a.json", b"[]")], r"a\.json: must be a JSON object, not list"),
        ([("a.json", b'{"task":"sing"}')], "a: task 'sing' is none of"),
        ([("a.json", b'{"task":"lm","text":5}')], "a: a record of task lm has a value that is no text"),
        ([("a.json", b'{"task":"t2i","caption":"x","height":-4,"width":8}')], "a: height -4 and width 8 must both be"),
    ],
)
def test_foreign_members_are_refused(
    tmp_path: Path, tokenizer: Tokenizer, members: list[tuple[str, bytes]], message: str
) -> None:
    with pytest.raises(DataError, match=rf"x-00000\.tar: {message}"):
        ShardIndex.build([write_tar(tmp_path / "x-00000.tar", *members)], tokenizer)


def test_an_image_of_another_size_is_refused_before_it_is_decoded(tmp_path: Path, tokenizer: Tokenizer) -> None:
    record = {"task": "t2i", "caption": "red", "height": 20, "width": 20}
    paths = write_shards(tmp_path, "x", [(record, np.zeros((400, 400, 3), np.uint8))], 5)
    reader = ShardReader(tmp_path, ShardIndex.build(paths, tokenizer))
    with pytest.raises(DataError, match=r"x-000000: RGB \(400, 400\), announced as RGB \(20, 20\)"):
        reader.read(0)


def test_a_damaged_index_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read the index: .*none\.npz: No such file"):
        ShardIndex.load(tmp_path / "none.npz")
    whole = (corpus / "index.npz").read_bytes()
    rng, path = np.random.default_rng(1), tmp_path / "index.npz"
    for cut in rng.integers(len(whole), size=20).tolist():
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"index\.npz"):
            ShardIndex.load(path)


def test_a_reader_crosses_process_borders(corpus: Path, index: ShardIndex) -> None:
    reader = ShardReader(corpus / "shards", index)
    first = reader.read(0)[0]
    assert pickle.loads(pickle.dumps(reader)).read(0)[0] == first


def test_the_strict_index_of_our_own_shards_is_that_of_a_scan(
    corpus: Path, index: ShardIndex, tokenizer: Tokenizer
) -> None:
    shards = [str(shard) for shard in index.shards]
    scanned = ShardIndex.scan(corpus / "shards", shards, Checks(tokenizer), Account(shards, max_bad=0.0))
    for name, value in vars(index).items():
        assert np.array_equal(getattr(scanned, name), value), name
