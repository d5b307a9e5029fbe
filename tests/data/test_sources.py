"""Data sets of others as a corpus: what is in the files arrives, each source has its account, the mix is exact."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile import Entry, tar_of
from people import TOKENIZER, captioned, conversation, document, img2dataset, jsonl, llava, picture, texts
from symbiotic.data import record_files
from symbiotic.data.adapters import Origin
from symbiotic.data.bad import BadSample
from symbiotic.data.checks import Checks, ShardSample
from symbiotic.data.errors import DataError
from symbiotic.data.loader import MicroBatches
from symbiotic.data.plan import DataPlan
from symbiotic.data.record_files import read_file
from symbiotic.data.scan import ShardEnd
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.data.sources import SourceData
from symbiotic.files import read_json
from symbiotic.schema import ConfigError, Data, Mix

pyarrow = pytest.importorskip("pyarrow")


@pytest.fixture
def words(tmp_path: Path) -> str:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return str(tmp_path / "tokenizer.json")


def table(path: Path, records: list[dict[str, Any]], group: int = 7) -> Path:
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=group)
    return path


def checks(format: str, images: str = "", **options: Any) -> Checks:
    origin = Origin(("x",), format, images=(images,) if images else (), **options)  # type: ignore[arg-type]
    return Checks(TOKENIZER, 64, origin=origin)


# --------------------------------------------------------------------------- files of records


LINES = [{"text": f"this is number {n} – ünïcode"} for n in range(40)]


def as_json(path: Path) -> Path:
    path.write_text(" \n[" + " ,\n".join(json.dumps(line, ensure_ascii=False) for line in LINES) + "\n]\n")
    return path


WRITE = {
    "x.jsonl": lambda path: jsonl(path, LINES),
    "x.json": as_json,
    "x.parquet": lambda path: table(path, LINES),
}


@pytest.mark.parametrize("name", WRITE)
def test_reading_goes_on_at_every_offset(name: str, tmp_path: Path) -> None:
    path = str(WRITE[name](tmp_path / name))
    whole = list(read_file(path, checks("text")))
    assert [event.found.record["text"] for event in whole[:-1]] == [line["text"] for line in LINES]
    assert whole[-1].after is None
    assert whole[-1].found == ShardEnd(Path(path).stat().st_size)
    for number, event in enumerate(whole[:-1]):
        assert event.after is not None
        assert list(read_file(path, checks("text"), event.after)) == whole[number + 1 :]


def test_bad_lines_are_left_out_by_kind(tmp_path: Path) -> None:
    lines = [b'{"text": "red"}', b"{", b"[]", b'{"text": "\xff"}', b"", b'{"text": " "}', b'{"text": "<gen>"}']
    lines += [b'{"text": "' + b"red " * (5 << 20) + b'"}', b'{"text": "blue"}']
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines))
    found = [event.found for event in read_file(str(tmp_path / "x.jsonl"), checks("text"))]
    kinds = ["not_json", "json_not_object", "text_not_utf8", "empty_text", "special_token", "oversized_member"]
    assert [bad.kind for bad in found if isinstance(bad, BadSample)] == kinds
    assert [good.record["text"] for good in found if isinstance(good, ShardSample)] == ["red", "blue"]


@pytest.mark.parametrize(
    ("name", "body", "kind", "good"),
    [
        ("x.json", b'{"text": "red"}', "not_json", 0),
        ("x.json", b'[{"text": "red"}, {"te', "not_json", 1),
        ("x.json", b"[]", "empty_shard", 0),
        ("x.jsonl", b"\n\n", "empty_shard", 0),
        ("x.parquet", b"PAR1 and no more", "unreadable_shard", 0),
        ("none.jsonl", None, "unreadable_shard", 0),
    ],
)
def test_a_damaged_file_is_told(name: str, body: bytes | None, kind: str, good: int, tmp_path: Path) -> None:
    if body is not None:
        (tmp_path / name).write_bytes(body)
    found = [event.found for event in read_file(str(tmp_path / name), checks("text"))]
    end = found[-1]
    assert isinstance(end, ShardEnd)
    assert end.bad is not None
    assert (end.bad.kind, len(found) - 1) == (kind, good)
    assert bool(end.unread) == (bool(body) and kind not in ("empty_shard",))


def test_images_lie_in_a_folder_or_in_tars(tmp_path: Path) -> None:
    file = str(llava(tmp_path, 12))
    folder = tmp_path / "images"
    entries = [Entry(f"train/{path.name}", path.read_bytes()) for path in sorted((folder / "train").iterdir())]
    (tmp_path / "tars").mkdir()
    for number in (0, 1):
        (tmp_path / "tars" / f"{number}.tar").write_bytes(tar_of(entries[number::2]))
    one, other = (
        [event.found for event in read_file(file, checks("llava", str(tmp_path / where)))][:-1]
        for where in ("images", "tars")
    )
    assert len(one) == 12
    assert all(isinstance(sample, ShardSample) for sample in one)
    for a, b in zip(one, other, strict=True):
        assert (a.key, a.record, a.image) == (b.key, b.record, b.image)
        assert np.array_equal(a.pixels, b.pixels)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("train/none.jpg", "missing_image"), ("../secret.jpg", "unsafe_name"), ("/etc/passwd", "unsafe_name"),
     ("link.jpg", "unsafe_name"), ("text.jpg", "image_format")],
)  # fmt: skip
def test_an_image_that_cannot_be_had_is_told(name: str, kind: str, tmp_path: Path) -> None:
    llava(tmp_path, 2)
    (tmp_path / "secret.jpg").write_bytes(picture(1))
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (tmp_path / "images" / "text.jpg").write_bytes(b"no image")
    file = str(jsonl(tmp_path / "x.jsonl", [conversation(0), conversation(1, image=name)]))
    good, bad, _ = (event.found for event in read_file(file, checks("llava", str(tmp_path / "images"))))
    assert isinstance(good, ShardSample)
    assert isinstance(bad, BadSample)
    assert (bad.key, bad.kind) == ("c0001", kind)


def test_tars_of_conversations_and_documents_hold_their_images(tmp_path: Path) -> None:
    talk, text = ({"conversations": conversation(0)["conversations"]}, document(1))
    entries = [Entry("a.json", json.dumps(talk).encode()), Entry("a.jpg", picture(1))]
    (tmp_path / "a.tar").write_bytes(tar_of(entries))
    found = next(iter(read_file(str(tmp_path / "a.tar"), checks("llava")))).found
    assert isinstance(found, ShardSample)
    entries = [Entry("a.json", json.dumps(text).encode()), *(Entry(f"a.{n}.jpg", picture(n)) for n in (1, 0))]
    (tmp_path / "b.tar").write_bytes(tar_of(entries))
    found = next(iter(read_file(str(tmp_path / "b.tar"), checks("interleaved", fit="crop", side=8)))).found
    assert isinstance(found, ShardSample)
    assert found.pixels is not None
    assert [tuple(found.pixels[top].mean(0).round(-1)) for top in (0, 8)] == [(0, 0, 120), (40, 90, 120)]


# --------------------------------------------------------------------------- a corpus of four sources


def four(folder: Path) -> dict[str, Any]:
    """The paper's four sets, as people have them."""
    pairs = str(img2dataset(folder / "pairs"))
    fit = {"fit": "crop", "side": 8}
    return {
        "t2i": {"format": "img2dataset", "files": pairs, **fit},
        "captioning": {"format": "img2dataset", "files": [pairs], "task": "mmu", "question": "what is this", **fit},
        "lm": {"format": "text", "files": str(texts(folder / "texts.jsonl"))},
        "mmu": {"format": "llava", "files": str(llava(folder / "talks")), "images": f"{folder}/talks/images", **fit},
    }  # fmt: skip


def source_of(folder: Path, words: str, sources: dict[str, Any], **more: Any) -> SourceData:
    return SourceData(str(folder / "data"), sources, words, row_tokens=64, **more)


def test_four_sources_are_one_corpus_and_mixed_by_weight(tmp_path: Path, words: str) -> None:
    sources = four(tmp_path)
    corpus = source_of(tmp_path, words, sources).prepare()
    index = ShardIndex.load(corpus / "index.npz")
    sizes = {name: len(index.members_of(name)) for name in index.sets.tolist()}
    assert sizes == {"t2i": 60, "captioning": 60, "lm": 40, "mmu": 40}
    account = read_json(corpus / "data_account.json")
    assert {name: (row["good"], row["bad"]) for name, row in account["sets"].items()} == {
        name: (count, 0) for name, count in sizes.items()
    }
    reader = ShardReader(corpus / "shards", index)
    record, pixels = reader.read(int(index.members_of("t2i")[4]))
    assert record["from"] == "00000.tar: 000000004"
    assert pixels is not None
    assert pixels.shape == (8, 8, 3)
    weights = {"t2i": 3.0, "captioning": 3.0, "lm": 2.0, "mmu": 2.0}
    data = Data(source={}, sets=tuple(weights), samples=20, row_tokens=64)
    plan = DataPlan(index, Mix(weights), data, 0, None)
    drawn = np.concatenate([plan.micro_batch(step, 0).samples for step in range(60)])
    shares = {name: int((index.set[drawn] == list(index.sets).index(name)).sum()) for name in weights}
    assert shares == {"t2i": 360, "captioning": 360, "lm": 240, "mmu": 240}
    batch = MicroBatches(corpus, plan)[0]
    assert batch.tokens.shape[1] == 64
    assert len(batch.latents) == 4 * 6  # 6 images of 8 x 8
    assert source_of(tmp_path, words, sources).prepare() == corpus


def test_each_source_has_an_error_budget_of_its_own(tmp_path: Path, words: str) -> None:
    sources = four(tmp_path)
    lines = [{"text": "red"}] * 38 + [{"body": "red"}, {"text": 5}]
    jsonl(tmp_path / "texts.jsonl", lines)
    with pytest.raises(
        DataError, match=r"data\.source\.sources\.lm: more than max_bad=0\.01 allows: 2 of 40"
    ) as caught:
        source_of(tmp_path, words, sources).prepare()
    assert "\n" not in str(caught.value)
    folder = next((tmp_path / "data").glob("*.account"))
    rows = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert [(row["source"], row["kind"]) for row in rows] == [("lm", "missing_key"), ("lm", "wrong_type")]
    corpus = source_of(tmp_path, words, sources, max_bad=0.06).prepare()
    account = read_json(corpus / "data_account.json")
    assert account["sets"]["lm"] == {"good": 38, "bad": 2, "kinds": {"missing_key": 1, "wrong_type": 1}}
    assert account["sets"]["t2i"]["bad"] == 0


def test_long_texts_become_samples_of_a_row_each(tmp_path: Path, words: str) -> None:
    long = " ".join(f"this is number {n}" for n in range(50))
    sources = {"lm": {"format": "text", "files": str(table(tmp_path / "x.parquet", [{"body": long}])), "text": "body"}}
    corpus = source_of(tmp_path, words, sources).prepare()
    index = ShardIndex.load(corpus / "index.npz")
    assert len(index) > 3
    assert index.num_tokens.max() <= 64
    reader = ShardReader(corpus / "shards", index)
    assert " ".join(reader.read(n)[0]["text"] for n in range(len(index))) == long


def test_a_value_that_stands_in_every_row_of_a_parquet_file_is_decoded_a_few_rows_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dictionary writes it once: the file is small, its rows are not."""
    file = table(tmp_path / "x.parquet", [{"text": "red " * 50_000}] * 2_000, group=2_000)
    assert file.stat().st_size < 1_000_000
    monkeypatch.setattr(record_files, "_DECODED", 1 << 20)
    tracemalloc.start()
    events = read_file(str(file), Checks(None, None, origin=Origin((str(file),), "text")))
    first = [next(events) for _ in range(40)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({event.after for event in first}) == 40
    assert peak < 40_000_000  # of 400 MB
    again = read_file(str(file), Checks(None, None, origin=Origin((str(file),), "text")), start=1_990)
    assert [event.after for event in again] == [*range(1_991, 2_001), None]


def test_another_option_is_another_corpus(tmp_path: Path, words: str) -> None:
    sources = four(tmp_path)
    first = source_of(tmp_path, words, sources).fingerprint
    assert source_of(tmp_path, words, sources).fingerprint == first
    assert source_of(tmp_path, words, {**sources, "t2i": {**sources["t2i"], "side": 12}}).fingerprint != first
    (tmp_path / "pairs" / "00002.tar").write_bytes(tar_of(captioned(1, 2)))
    assert source_of(tmp_path, words, sources).fingerprint != first


@pytest.mark.parametrize(
    ("sources", "line"),
    [
        ({}, r"data\.source\.sources=\{\}: must be a mapping"),
        ({"a b": {"files": "x"}}, r"sources\.a b: the name of a data set must consist of letters"),
        ({"a": {"file": "x"}}, r"data\.source\.sources\.a\.file: no such key; did you mean 'files'\?"),
        ({"a": {"format": "text"}}, r"sources\.a\.files: missing"),
        ({"a": {"format": "txt", "files": "x"}}, r"sources\.a\.format='txt': must be one of own, img2dataset"),
        ({"a": {"format": "text", "files": "none"}}, r"sources\.a\.files=none: no such file; must be files \(\.jsonl"),
        ({"a": {"format": "text", "files": "{here}/x.tar"}}, r"x\.tar: must be one of \.jsonl, .* with format=text"),
        ({"a": {"files": "http://127.0.0.1/x.tar"}}, r"a\.files=http://127\.0\.0\.1/x\.tar: http: is not read"),
        ({"a": {"format": "llava", "files": "{here}/x.tar", "images": "no"}}, r"sources\.a\.images=no: no such file"),
    ],
)  # fmt: skip
def test_wrong_sources_are_one_line(sources: Any, line: str, tmp_path: Path, words: str) -> None:
    (tmp_path / "x.tar").write_bytes(tar_of(captioned(1)))
    given = json.loads(json.dumps(sources).replace("{here}", str(tmp_path)))
    with pytest.raises(ConfigError, match=line) as caught:
        source_of(tmp_path, words, given)
    assert "\n" not in str(caught.value)


def test_parquet_without_its_library_is_one_line(tmp_path: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = str(table(tmp_path / "x.parquet", LINES))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"sources\.lm\.files: reading \.parquet needs pyarrow: pip install"):
        source_of(tmp_path, words, {"lm": {"format": "text", "files": file}})
