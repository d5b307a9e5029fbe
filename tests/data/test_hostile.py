"""Hostile shards: exactly the good samples arrive, each bad one is counted once, nothing is run, nothing hangs."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import tarfile
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import webdataset

import intruders
from hostile import (
    CHECKS,
    MAX_PIXELS,
    ROW_TOKENS,
    SAMPLES,
    SHARDS,
    TIMES,
    TOKENIZER,
    Entry,
    Zoo,
    good,
    image,
    in_a_fork,
    number_in,
    number_of,
    opener,
    record,
    stream_of,
    tar_of,
    write_shard,
    write_zoo,
)
from symbiotic.data.account import ACCOUNT, BAD_SAMPLES, Account, set_name
from symbiotic.data.adapters import Origin
from symbiotic.data.bad import KINDS, BadSample, Refused, printable
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.errors import DataError
from symbiotic.data.record_files import ImageStore, read_file
from symbiotic.data.records import check_depth, parse_record
from symbiotic.data.scan import ShardEnd, read_shard
from symbiotic.data.shards import REINDEX, ShardIndex, ShardReader
from symbiotic.data.stream import ShardStream, read_stream
from symbiotic.data.tar import Source, find_shards
from symbiotic.schema import ConfigError

WAIT = 60.0  # seconds for a worker, before a hang is a failure


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return write_zoo(tmp_path_factory.mktemp("zoo"))


def test_the_zoo_has_every_kind() -> None:
    assert {*SAMPLES, *SHARDS} == set(KINDS)
    assert len(KINDS) >= 25
    assert TIMES == 20


@pytest.mark.parametrize("num_workers", [0, 2])
def test_exactly_the_good_samples_arrive_in_a_stream(zoo: Zoo, tmp_path: Path, num_workers: int) -> None:
    account = Account(zoo.shards, max_bad=1.0, folder=tmp_path)
    found = [
        (sample.shard, sample.key, number_of(sample))
        for sample in read_stream(stream_of(zoo.folder, zoo.shards), account, num_workers, WAIT)
    ]
    assert Counter(found) == Counter(zoo.good)
    assert num_workers or found == zoo.good
    assert entries_of(account) == Counter(zoo.bad)
    assert all(count == TIMES for count in account.kinds.values())


def entries_of(account: Account) -> Counter[tuple[str, str, str]]:
    return Counter((bad.shard, bad.key, bad.kind) for shard in account.shards.values() for bad in shard.bad)


def test_an_index_holds_exactly_the_good_samples_and_the_account_is_that_of_a_stream(zoo: Zoo, tmp_path: Path) -> None:
    account = Account(zoo.shards, max_bad=1.0, folder=tmp_path / "index")
    index = ShardIndex.scan(zoo.folder, zoo.shards, CHECKS, account)
    reader, found = ShardReader(zoo.folder, index, REINDEX), []
    for sample in range(len(index)):
        stored, pixels = reader.read(sample)
        assert stored["caption"] == f"number {number_in(pixels)}"
        found.append((str(index.shards[index.shard[sample]]), index.keys[sample].decode(), number_in(pixels)))
        assert index.num_tokens[sample] == TOKENIZER_COUNTS[len(str(number_in(pixels)))]
    assert found == zoo.good
    assert entries_of(account) == Counter(zoo.bad)
    for workers in (0, 2):
        streamed = Account(zoo.shards, max_bad=1.0, folder=tmp_path / str(workers))
        for _ in read_stream(stream_of(zoo.folder, zoo.shards), streamed, workers, WAIT):
            pass
        for file in (ACCOUNT, BAD_SAMPLES):
            assert (tmp_path / str(workers) / file).read_bytes() == (tmp_path / "index" / file).read_bytes()


TOKENIZER_COUNTS = {digits: 1 + 1 + digits + 1 + 4 for digits in (1, 2, 3)}  # <bos> number DIGITS <gen> four patches


def test_the_account_names_every_bad_sample_and_counts_by_set_and_shard(zoo: Zoo, tmp_path: Path) -> None:
    account = Account(zoo.shards, max_bad=1.0, folder=tmp_path)
    ShardIndex.scan(zoo.folder, zoo.shards, CHECKS, account)
    lines = [json.loads(line) for line in (tmp_path / BAD_SAMPLES).read_text().splitlines()]
    assert [(line["shard"], line["key"], line["kind"]) for line in lines] == zoo.bad
    assert all(line["reason"].isprintable() and len(line["reason"]) <= 200 for line in lines)
    totals = json.loads((tmp_path / ACCOUNT).read_text())
    assert (totals["good"], totals["bad"]) == (len(zoo.good), len(zoo.bad))
    assert totals["kinds"] == dict.fromkeys(KINDS, TIMES)
    assert totals["sets"]["not_json"] == {"good": 21, "bad": 20, "kinds": {"not_json": 20}}
    assert totals["sets"]["data_after_end"] == {"good": 60, "bad": 20, "kinds": {"data_after_end": 20}}
    shard = totals["shards"]["damaged_header-00000.tar"]
    size = (zoo.folder / "damaged_header-00000.tar").stat().st_size
    assert shard == {
        "good": 0,
        "bad": 1,
        "kinds": {"damaged_header": 1},
        "bytes": size,
        "unread_bytes": size,
        "done": True,
    }
    reason = next(line["reason"] for line in lines if line["shard"] == "damaged_header-00001.tar")
    assert reason == f"no tar header at byte 2048 (bad checksum); {size - 2048} bytes from byte 2048 on are not read"


def test_headers_alone_tell_the_same_but_damage_inside_images(zoo: Zoo) -> None:
    inside = {"image_truncated", "image_damaged", "image_undecodable", "image_animated"}
    account = Account(zoo.shards, max_bad=1.0)
    ShardIndex.scan(zoo.folder, zoo.shards, Checks(TOKENIZER, ROW_TOKENS, MAX_PIXELS, decode=False), account)
    found, expected = entries_of(account), Counter(zoo.bad)
    assert {kind for _, _, kind in (expected - found)} <= inside
    assert {kind for _, _, kind in (found - expected)} <= inside


# --------------------------------------------------------------------------- going on


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stream_goes_on_where_it_stopped_and_counts_nothing_twice(zoo: Zoo, num_workers: int) -> None:
    kinds = (
        "duplicate_key-00000",
        "missing_image-00000",
        "damaged_header-00001",
        "empty_shard-00000",
        "truncated_shard-00009",
    )
    shards = [f"{kind}.tar" for kind in kinds]
    whole = Account(shards, max_bad=1.0)
    samples = [(s.shard, s.key) for s in read_stream(stream_of(zoo.folder, shards), whole, num_workers, WAIT)]
    for stop in range(1, len(samples) + 1, 7 if num_workers == 0 else 30):
        first = Account(shards, max_bad=1.0)
        stream = read_stream(stream_of(zoo.folder, shards), first, num_workers, WAIT)
        seen = [(s.shard, s.key) for s in itertools.islice(stream, stop)]
        state = json.loads(json.dumps(first.state()))
        second = Account(shards, max_bad=1.0)
        second.restore(state)
        rest = read_stream(stream_of(zoo.folder, shards, second.positions()), second, num_workers, WAIT)
        seen += [(s.shard, s.key) for s in rest]
        assert (Counter(seen) == Counter(samples)) if num_workers else (seen == samples)
        assert second.state() == whole.state()


def test_a_state_of_other_shards_is_refused() -> None:
    with pytest.raises(DataError, match="of other shards"):
        Account(["a.tar"]).restore(Account(["b.tar"]).state())


# --------------------------------------------------------------------------- payloads


def test_no_payload_runs_and_each_is_refused_with_its_reason(tmp_path: Path) -> None:
    assert intruders.payloads(tmp_path / "payloads")["wrong"] == []


def test_a_shard_is_a_local_file_and_never_a_command(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    shard = write_shard(tmp_path, "x-00000.tar", good("a", 0))
    pipes = [f"pipe:touch {canary}", f"file:{tmp_path / shard}", "http://127.0.0.1:9/x.tar", "s3://bucket/x.tar"]

    def act() -> None:
        intruders.watched(tmp_path / "outside")
        for name in pipes:
            refused = r": a shard must be a local tar file; no command is ever run|is not read"
            with pytest.raises(DataError, match=refused):
                ShardStream([name], CHECKS)
            with pytest.raises(DataError, match=r"is not read: a shard must be a local tar file"):
                ShardIndex.scan(Path(), [name], CHECKS, Account([name]))

    in_a_fork(act)
    assert [path.name for path in tmp_path.iterdir()] == [shard]


def test_what_hostile_names_hold_is_printed_harmlessly(tmp_path: Path) -> None:
    shard = write_shard(tmp_path, "x.tar", good("\x1b[31mred\n[/bold]", 1))
    bad = next(event.found for event in read_shard(shard, CHECKS, open_source=opener(tmp_path)))
    assert isinstance(bad, BadSample)
    assert bad.key == r"\x1b[31mred\n[/bold]"
    assert printable("é 日本 \ud800 \u2028") == r"é 日本 \ud800 \u2028"


# --------------------------------------------------------------------------- what is good


def test_usual_ways_to_write_a_tar_are_all_read(tmp_path: Path) -> None:
    long = "folder/" + "long-" * 40
    entries = [Entry("./", type=tarfile.DIRTYPE), *good("./a", 1), *good(long, 2), *good("ä", 3)]
    entries += [Entry("b.JSON", record(4)), Entry("b.PNG", image(4))]
    entries += [Entry("c.webp", image(5, "webp")), Entry("c.json", b"\xef\xbb\xbf" + record(5))]
    expected = [("a", 1), (long, 2), ("ä", 3), ("b", 4), ("c", 5)]
    for name, format in (("pax", tarfile.PAX_FORMAT), ("gnu", tarfile.GNU_FORMAT)):
        (tmp_path / f"{name}.tar").write_bytes(tar_of(entries, format=format))
        samples = list(read_stream(stream_of(tmp_path, [f"{name}.tar"]), Account([f"{name}.tar"])))
        assert [(sample.key, number_of(sample)) for sample in samples] == expected
    with webdataset.TarWriter(str(tmp_path / "w.tar"), encoder=False) as writer:  # times with fractions: pax headers
        writer.write({"__key__": "w", "json": record(7, height=16, width=16), "jpeg": image(0, "jpeg", side=16)})
    account = Account(["w.tar"])
    index = ShardIndex.scan(tmp_path, ["w.tar"], CHECKS, account)
    stored, pixels = ShardReader(tmp_path, index, REINDEX).read(0)
    assert stored["caption"] == "number 7"
    assert pixels is not None
    assert pixels.shape == (16, 16, 3)


def test_texts_need_no_image_and_sets_are_named_by_their_shards(tmp_path: Path) -> None:
    body = json.dumps({"task": "lm", "text": "red"}).encode()
    shards = [write_shard(tmp_path, name, [Entry("a.json", body)]) for name in ("facts-00000.tar", "00001.tar")]
    index = ShardIndex.scan(tmp_path, shards, CHECKS, Account(shards))
    assert index.sets.tolist() == ["facts", "shards"]
    assert ShardReader(tmp_path, index).read(1) == ({"task": "lm", "text": "red"}, None)
    assert [set_name(n) for n in ("x/t2i_long-00003.tar", "laion/00012.tar", "all.tar")] == ["t2i_long", "laion", "all"]


# --------------------------------------------------------------------------- after the index, and by chance


@pytest.mark.parametrize("kind", ["json", "png"])
def test_a_sample_that_changed_since_the_index_was_made_is_refused(tmp_path: Path, kind: str) -> None:
    shard = write_shard(tmp_path, "x-00000.tar", [*good("a", 1), *good("b", 2)])
    index = ShardIndex.scan(tmp_path, [shard], CHECKS, Account([shard]))
    body, offset = bytearray((tmp_path / shard).read_bytes()), int(getattr(index, kind)[1, 0])
    body[offset + 60] ^= 1
    (tmp_path / shard).write_bytes(body)
    reader = ShardReader(tmp_path, index, REINDEX)
    reader.read(0)
    line = rf"x-00000\.tar: b\.{kind}: its checksum differs from the index; .* make the index anew$"
    with pytest.raises(DataError, match=line):
        reader.read(1)
    (tmp_path / shard).write_bytes(body + bytes(512))
    with pytest.raises(DataError, match=r"x-00000\.tar: \d+ bytes where the index says \d+; .* make the index anew$"):
        ShardReader(tmp_path, index, REINDEX).read(0)


def test_no_mutation_of_a_shard_raises_or_mixes_samples_up(tmp_path: Path) -> None:
    """Flipped bits, cuts, and blocks that are zeroed, repeated or swapped: what arrives is right, the rest is told."""
    whole, rng = tar_of([entry for n in range(8) for entry in good(f"k{n}", n)]), random.Random(0)
    unchanged = {(s.key, s.json.crc) for s in samples_of(tmp_path, whole)}
    assert len(unchanged) == 8
    for _ in range(200):
        body = mutated(whole, rng)
        (tmp_path / "x.tar").write_bytes(body)
        events = list(read_shard("x.tar", CHECKS, open_source=opener(tmp_path)))
        end = events[-1].found
        assert isinstance(end, ShardEnd)
        found = [event.found for event in events if isinstance(event.found, ShardSample)]
        for sample in found:
            if (sample.key, sample.json.crc) in unchanged:
                assert f"k{number_of(sample)}" == sample.key
        told = end.bad is not None or any(isinstance(event.found, BadSample) for event in events)
        assert told or len(found) == 8


def samples_of(folder: Path, body: bytes) -> list[ShardSample]:
    (folder / "x.tar").write_bytes(body)
    events = read_shard("x.tar", CHECKS, open_source=opener(folder))
    return [event.found for event in events if isinstance(event.found, ShardSample)]


def mutated(whole: bytes, rng: random.Random) -> bytes:
    at, other = rng.randrange(16) * 1024, rng.randrange(16) * 1024  # of headers: of bodies a tar has no checksum
    block = whole[at : at + 512]
    return rng.choice(
        [
            lambda: flip_bit(whole, rng.randrange(8 * 32 * 512)),
            lambda: whole[: rng.randrange(32 * 512)],
            lambda: whole[:at] + bytes(512) + whole[at + 512 :],
            lambda: whole[:at] + block + whole[at:],
            lambda: whole[:other] + block + whole[other + 512 :],
        ]
    )()


def flip_bit(body: bytes, bit: int) -> bytes:
    return body[: bit // 8] + bytes([body[bit // 8] ^ 1 << bit % 8]) + body[bit // 8 + 1 :]


class Flaky:
    """A source from elsewhere whose connection breaks at a byte."""

    def __init__(self, body: bytes, breaks_at: int) -> None:
        self.body, self.size, self.breaks_at = body, len(body), breaks_at

    def read(self, offset: int, length: int) -> bytes:
        if offset + length > self.breaks_at:
            raise ConnectionResetError(104, "Connection reset by peer")
        return self.body[offset : offset + length]


def test_bytes_may_come_from_elsewhere_and_a_broken_connection_is_told() -> None:
    body = tar_of([*good("a", 1), *good("b", 2)])

    def open_source(name: str) -> AbstractContextManager[Source]:
        assert name == "http://example/x.tar"
        return nullcontext(Flaky(body, 3000))

    account = Account(["http://example/x.tar"], max_bad=1.0)
    stream = ShardStream(list(account.shards), CHECKS, open_source=open_source)
    assert [sample.key for sample in read_stream(stream, account)] == ["a"]
    bad = account.shards["http://example/x.tar"].bad
    assert [(b.key, b.kind) for b in bad] == [("b", "unreadable_shard")]
    assert (
        "cannot read byte 3072 (Connection reset by peer); 8192 bytes from byte 2048 on are not read" in bad[0].reason
    )


# --------------------------------------------------------------------------- what would take all time


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder"])
def test_what_is_no_plain_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    """Opening a pipe that nobody writes to waits for ever; a device has no end."""
    path = tmp_path / "a-00000.tar"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    (end,) = (event.found for event in read_shard(str(path), CHECKS))
    assert isinstance(end, ShardEnd)
    assert end.bad is not None
    assert end.bad.kind == "unreadable_shard"
    assert ("no plain file" in end.bad.reason) or kind == "socket"
    if kind != "folder":
        with pytest.raises(ConfigError, match=rf"^shards={path}: no plain file; must be tar files, a folder of them, "):
            find_shards([str(path)], "shards")
    path.rename(tmp_path / "image.png")
    with pytest.raises(Refused, match=r"missing_image: image\.png: (no plain|No such dev)|unsafe_name"):
        ImageStore([str(tmp_path)]).read("image.png")


def test_an_endless_tail_is_not_read(tmp_path: Path) -> None:
    """8 TB of zeros behind an end mark, which take no room on the disk, and would take hours to look at."""
    for name, size, kind in (("a", 8 << 40, "data_after_end"), ("b", 8 << 20, None)):
        path = tmp_path / f"{name}-00000.tar"
        path.write_bytes(tar_of(good("good-0000", 0)))
        os.truncate(path, size)
        *samples, end = (event.found for event in read_shard(str(path), CHECKS))
        assert [sample.key for sample in samples] == ["good-0000"]
        assert (end.bad.kind if end.bad else None) == kind


def test_endless_headers_of_one_member_are_not_read(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1
    more = (header.tobuf(tarfile.GNU_FORMAT) + b"y" + bytes(511)) * 17
    path = tmp_path / "a-00000.tar"
    path.write_bytes(tar_of(good("good-0000", 0))[:2048] + more + tar_of(good("good-0001", 1)))
    *samples, end = (event.found for event in read_shard(str(path), CHECKS))
    assert [sample.key for sample in samples] == ["good-0000"]
    assert end.bad.kind == "damaged_header"
    assert "17 extended headers of one member" in end.bad.reason


def test_records_are_parsed_in_one_pass(tmp_path: Path) -> None:
    """A megabyte of keys, of which the last comes again, was looked through once for each of them: hours."""
    keys = ",".join(f'"{n:x}":0' for n in range(100_000))
    with pytest.raises(Refused, match="repeated_json_key: 1869f is said twice"):
        parse_record(f'{{{keys},"1869f":1}}'.encode())
    deep = '{"task":"lm","text":"red","more":%s}'
    assert parse_record((deep % ("[" * 63 + "]" * 63)).encode())["text"] == "red"
    brackets = '"[[[[ \\"{{{{"'
    assert parse_record((deep % ("[" + ",".join([brackets] * 50) + "]")).encode())["more"][0] == '[[[[ "{{{{'
    with pytest.raises(Refused, match="not_json: nested deeper than 64 at character 96"):
        parse_record((deep % ("[" * 64 + "]" * 64)).encode())
    with pytest.raises(Refused, match="not_json: nested deeper than 64"):
        check_depth("[" * 100 + '"' + '\\"' * 1_000_000)


def test_records_of_a_list_have_the_limits_of_those_in_lines(tmp_path: Path) -> None:
    fine, deep = {"text": "red"}, '{"text":"red","more":' + "[" * 900 + "]" * 900 + "}"
    large = json.dumps({"text": "red " * (5 << 20)})
    path = tmp_path / "a.json"
    path.write_text(f"[{json.dumps(fine)},{deep},3,{large},{json.dumps(fine)}]")
    found = [event.found for event in read_file(str(path), Checks(TOKENIZER, 64, origin=Origin((str(path),), "text")))]
    kinds = [one.kind if isinstance(one, BadSample) else type(one).__name__ for one in found]
    assert kinds == ["ShardSample", "not_json", "json_not_object", "oversized_member", "ShardSample", "ShardEnd"]
    os.truncate(path, 2 << 30)
    (end,) = (event.found for event in read_file(str(path), Checks(origin=Origin((str(path),), "text"))))
    assert end.bad.kind == "oversized_member"
    assert "write it as .jsonl" in end.bad.reason
