"""Streams as a plan: any place is reached again from its few numbers, and read from there; nothing is lost or twice."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hostile import Entry, tar_of
from people import TOKENIZER, captioned, document, img2dataset, jsonl, llava, picture, texts
from symbiotic.data.adapters import Origin
from symbiotic.data.checks import Checks
from symbiotic.data.cursor import Cursor, account_of
from symbiotic.data.encoded import Made
from symbiotic.data.errors import DataError
from symbiotic.data.loader import MicroBatches, MicroBatchSampler, loader_options
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.data.stream_plan import StreamLoader, StreamPlan
from symbiotic.data.streamed import StreamData
from symbiotic.data.tar import LocalSource
from symbiotic.images.vision import TowerPixels
from symbiotic.models.batch import VIT, Batch
from symbiotic.schema import ConfigError, Data, Mix, Objective, Vision
from towers import TOWER, clip_folder

WEIGHTS = {"t2i": 3.0, "own": 3.0, "lm": 2.0, "mmu": 2.0}
DATA = Data(source={}, sets=tuple(WEIGHTS), samples=10, row_tokens=64, micro_batches=2)


def own(folder: Path) -> Path:
    """Shards of our own records."""
    folder.mkdir()
    for shard in range(3):
        entries = []
        for n in range(12):
            record = {"task": "t2i", "caption": f"number {n} of {shard}", "height": 8, "width": 8}
            entries += [
                Entry(f"{n}.json", json.dumps(record).encode()),
                Entry(f"{n}.png", picture(n, 8, 8, kind="png")),
            ]
        (folder / f"own-{shard:05d}.tar").write_bytes(tar_of(entries))
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("streams")
    fit = {"fit": "crop", "side": 8}
    TOKENIZER.save(folder / "tokenizer.json")
    long = {"text": " ".join(f"this is number {n}" for n in range(40))}
    jsonl(folder / "texts" / "b.jsonl", [long, {"text": "red"}, long])
    texts(folder / "texts" / "a.jsonl", 25)
    talks = str(llava(folder / "talks", 20))
    return {
        "t2i": {"format": "img2dataset", "files": str(img2dataset(folder / "pairs", 4, 10)), **fit},
        "own": {"files": str(own(folder / "own"))},
        "lm": {"format": "text", "files": str(folder / "texts")},
        "mmu": {"format": "llava", "files": talks, "images": str(folder / "talks" / "images"), **fit},
    }


@pytest.fixture
def source(sources: dict[str, Any], tmp_path: Path) -> StreamData:
    words = str(Path(sources["own"]["files"]).parent / "tokenizer.json")
    return StreamData(str(tmp_path / "data"), sources, words, row_tokens=64, window=7, head=16)


def plan_of(source: StreamData, data: Data = DATA, seed: int = 3) -> StreamPlan:
    head = ShardIndex.load(source.prepare() / "index.npz")
    return source.plan(head, Mix(WEIGHTS), data, seed, Objective())


def batches(source: StreamData, plan: StreamPlan, items: list[int]) -> list[Batch]:
    dataset = MicroBatches(source.path, plan, cache_bytes=0, reader=plan)
    return [dataset[item] for item in items]


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(Batch))


# --------------------------------------------------------------------------- one stream


def cursor(files: list[str], name: str = "lm", **options: Any) -> Cursor:
    origin = Origin(tuple(files), "text" if name == "lm" else "img2dataset")
    return Cursor(name, files, Checks(TOKENIZER, 64, origin=origin, keep=True), 0, **options)


def test_an_epoch_has_every_sample_once_and_the_next_another_order(sources: dict[str, Any]) -> None:
    files = sorted(map(str, Path(sources["t2i"]["files"]).glob("*.tar")))
    stream = cursor(files, "t2i", window=7)
    epochs = [[stream.take().key for _ in range(40)] for _ in range(3)]
    assert all(Counter(epoch) == Counter(epochs[0]) and len(set(epoch)) == 40 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    in_order = cursor(files[:1], "t2i", window=1)
    assert [in_order.take().key for _ in range(10)] == sorted(epochs[0])[:10]


@pytest.mark.parametrize("name", ["lm", "t2i"])
def test_a_stream_goes_on_from_every_place(sources: dict[str, Any], name: str) -> None:
    folder = Path(sources[name]["files"])
    files = sorted(str(path) for path in folder.iterdir() if path.suffix in (".tar", ".jsonl"))
    whole, states, items = cursor(files, name, window=7), [], []
    for _ in range(110):
        states.append(json.loads(json.dumps(whole.state())))
        items.append(whole.take())
    for at in range(0, 100, 3):
        again = cursor(files, name, window=7)
        again.restore(states[at])
        assert again.state() == states[at]
        for number in range(at, at + 10):
            assert again.take() == items[number]
            assert again.state() == states[number + 1] or number == 109


def test_nothing_before_its_place_is_read(tmp_path: Path) -> None:
    """In tars as in lines: a stream that goes on opens its file and reads from the offset of its window on."""
    read: list[int] = []

    class Watched(LocalSource):
        def read(self, offset: int, length: int) -> bytes:
            read.append(offset)
            return super().read(offset, length)

    tar = str(img2dataset(tmp_path / "pairs", 1, 40) / "00000.tar")
    stream = cursor([tar], "t2i", window=5, open_source=Watched)
    for _ in range(30):
        stream.take()
    state = stream.state()
    again = cursor([tar], "t2i", window=5, open_source=Watched)
    again.restore(state)
    read.clear()
    assert again.take() == stream.take()
    assert min(read) == state["offset"] > 0


def test_bad_samples_are_counted_once_however_often_a_stream_goes_on(tmp_path: Path) -> None:
    lines = [{"text": f"number {n}"} if n % 10 else {"body": n} for n in range(100)]
    file = str(jsonl(tmp_path / "x.jsonl", lines))
    stream = cursor([file], max_bad=0.2, window=8)
    for _ in range(200):
        stream.take()
        again = cursor([file], max_bad=0.2, window=8)
        again.restore(stream.state())
        stream = again
    account = account_of({"lm": stream.state()}, 0.2)
    assert (account["good"], account["bad"], account["kinds"]) == (90, 10, {"missing_key": 10})
    assert account["sets"]["lm"]["epoch"] >= 1
    assert stream.state()["examples"][0]["reason"] == "a record without the key text"
    with pytest.raises(
        DataError, match=r"sources\.lm: more than max_bad=0\.05 allows: 10 of 100 are bad \(missing_key"
    ):
        [cursor([file], max_bad=0.05).take() for _ in range(91)]
    jsonl(tmp_path / "x.jsonl", [{"body": 1}] * 5)
    with pytest.raises(DataError, match=r"sources\.lm: no sample is good: 5 of 5 are bad"):
        cursor([file]).take()


# --------------------------------------------------------------------------- the plan of several


def test_micro_batches_have_the_weights_and_hold_what_the_files_hold(source: StreamData) -> None:
    plan = plan_of(source)
    tasks: Counter[str] = Counter()
    for step in range(30):
        for micro in range(2):
            drawn = plan.micro_batch(step, micro)
            tasks.update(plan.sets[plan.index.set[sample]] for sample in drawn.samples)
            assert all(len(row) for row in drawn.rows)
            assert drawn.lengths.max() <= 64
    assert tasks == {"t2i": 180, "own": 180, "lm": 120, "mmu": 120}
    assert plan.index.name(int(plan.micro_batch(29, 0).samples[0])).startswith("/")
    assert plan.tokens_by_task(10)["t2i"] > 0


def test_any_order_of_asking_gives_the_same_bits(source: StreamData) -> None:
    whole = batches(source, plan_of(source), list(range(40)))
    plan = plan_of(source)
    for item in (39, 3, 3, 20, 0, 21, 38):
        assert same(batches(source, plan, [item])[0], whole[item]), item
    other = batches(source, plan_of(source, seed=4), [0])[0]
    assert other.tokens.shape != whole[0].tokens.shape or not torch.equal(other.tokens, whole[0].tokens)
    assert not same(whole[0], whole[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_workers_and_restarts_change_no_bit(source: StreamData, workers: int) -> None:
    whole = batches(source, plan_of(source), list(range(24)))
    for rank in (0, 1):
        loader = loader_of(source, plan_of(source), workers, rank, 2)
        seen = list(loader)
        assert len(loader) == 12
        assert all(same(batch, whole[rank + 2 * n]) for n, batch in enumerate(seen))
        state = json.loads(json.dumps(loader.plan.state_at(12)))
    again = plan_of(source)
    again.know(12, state)
    further = loader_of(source, again, workers, 0, 1, start=12, steps=15)
    assert [
        same(a, b) for a, b in zip(further, batches(source, plan_of(source), list(range(24, 30))), strict=True)
    ] == [True] * 6


def loader_of(
    source: StreamData, plan: StreamPlan, workers: int, rank: int, world: int, start: int = 0, steps: int = 12
) -> StreamLoader:
    dataset = MicroBatches(source.path, plan, cache_bytes=0, reader=plan)
    return StreamLoader(dataset, plan, loader_options(MicroBatchSampler(steps, start, 2, rank, world), workers))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For a tower of 4 x 4 patches of 8 x 8 pixels; our pictures of 8 x 8 have 4 patches."""
    folder = tmp_path_factory.mktemp("tower") / "clip"
    clip_folder(folder, TOWER)
    return Made(TowerPixels(Vision(str(folder)), "model.vision"))


def test_images_that_a_tower_reads_are_what_it_takes(source: StreamData, made: Made) -> None:
    head = ShardIndex.load(source.prepare() / "index.npz")
    head = made.counts(head, ShardReader(source.path / "shards", head))

    def dataset() -> MicroBatches:
        plan = source.plan(head, Mix(WEIGHTS), DATA, 3, Objective(), made=made)
        return MicroBatches(source.path, plan, cache_bytes=0, encoded=[made], reader=plan)

    whole = dataset()
    for item in range(8):
        batch, plan = whole[item], whole.plan
        drawn = plan.micro_batch(*divmod(item, 2)).samples
        seen = [plan.read(int(n))[1] for n in drawn if plan.sets[plan.index.set[n]] == "mmu"]
        read = [pixels for pixels in seen if pixels is not None]
        assert int((batch.kind == VIT).sum()) == 16 * len(read) == len(batch.vit_patches) > 0
        pixels = torch.stack([torch.tensor(picture) for picture in read])
        expected = made.encoder.encode(pixels).flatten(1, 2)
        found = batch.vit_patches.view(len(read), 16, -1)
        assert sorted(map(hash_of, found)) == sorted(map(hash_of, expected))  # rows have an order of their own
        assert int((batch.segment >= 0).sum(1).max()) <= DATA.row_tokens
    again = dataset()
    again.plan.know(3, json.loads(json.dumps(whole.plan.state_at(3))))
    assert same(again[6], dataset()[6])


def hash_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().numpy().tobytes()


def test_samples_that_a_tower_does_not_take_are_counted(tmp_path: Path, made: Made) -> None:
    """Several images, and a row that is too short for what one becomes."""
    picture_of = tmp_path / "images" / "train"
    picture_of.mkdir(parents=True)
    for number in range(31):
        (picture_of / f"{number:04d}.jpg").write_bytes(picture(number, 8, 8))
    one = {"texts": ["a photo of", None], "images": [None, "train/0001.jpg"]}
    long = {"texts": ["a photo of " * 20, None], "images": [None, "train/0001.jpg"]}
    lines = [document(n) if n % 3 == 0 else long if n % 3 == 1 else one for n in range(30)]
    file = str(jsonl(tmp_path / "x.jsonl", lines))
    origin = Origin((file,), "interleaved", images=(str(tmp_path / "images"),), fit="crop", side=8)
    checks = Checks(TOKENIZER, 128, origin=origin, keep=True)
    extra = partial(made.extra, TOKENIZER)
    stream = Cursor("docs", [file], checks, 0, 8, 0.9, extra=extra, row_tokens=64)
    keys = {stream.take().key for _ in range(10)}
    assert len(keys) == 10
    stream.take()  # of the second epoch: the first is counted
    account = account_of({"docs": stream.state()}, 0.9)
    assert (account["good"], account["kinds"]) == (10, {"several_images": 10, "too_long": 10})
    reasons = {bad["kind"]: bad["reason"] for bad in stream.state()["examples"]}
    assert reasons["several_images"] == "2 images are read; a vision tower takes one a sample"
    assert reasons["too_long"].endswith(" tokens; a row takes 64")
    plain = Cursor("docs", [file], checks, 0, 8, 0.9)
    assert len({plain.take().key for _ in range(30)}) == 30


def test_the_first_steps_over_and_over(source: StreamData) -> None:
    data = Data(source={}, sets=tuple(WEIGHTS), samples=10, row_tokens=64, micro_batches=2, repeat_steps=3)
    plan = plan_of(source, data)
    loader = loader_of(source, plan, 0, 0, 1)
    seen: Iterator[Batch] = iter(loader)
    first = [next(seen) for _ in range(6)]
    assert all(same(next(seen), batch) for batch in first)


def test_the_beginning_is_a_corpus(source: StreamData) -> None:
    index = ShardIndex.load(source.prepare() / "index.npz")
    assert {name: len(index.members_of(name)) for name in WEIGHTS} == {"t2i": 16, "own": 16, "lm": 16, "mmu": 16}
    assert json.loads((source.path / "data_account.json").read_text())["bad"] == 0


def test_an_image_found_damaged_too_late_is_named(tmp_path: Path, sources: dict[str, Any]) -> None:
    entries = [entry for n in range(9) for entry in captioned(n)]
    entries[12] = Entry(entries[12].name, entries[12].body[:-4])
    (tmp_path / "x.tar").write_bytes(tar_of(entries))
    given = {"t2i": {"format": "img2dataset", "files": str(tmp_path / "x.tar"), "fit": "crop", "side": 8}}
    words = str(Path(sources["own"]["files"]).parent / "tokenizer.json")
    made = {
        decode: StreamData(str(tmp_path), given, words, row_tokens=64, decode=decode, head=4, window=1, max_bad=0.2)
        for decode in (True, False)
    }
    data = Data(source={}, sets=("t2i",), samples=8, row_tokens=64)
    for decode, streamed in made.items():
        head = ShardIndex.load(streamed.prepare() / "index.npz")
        plan = streamed.plan(head, Mix({"t2i": 1.0}), data, 0, None)
        if decode:
            assert len(batches(streamed, plan, [0])[0].latents) == 8 * 4
            continue
        with pytest.raises(DataError, match=r"x\.tar: 000000004: not a readable image \(.*decode=true leaves such"):
            batches(streamed, plan, [0])


def test_wrong_numbers_are_one_line(sources: dict[str, Any], tmp_path: Path) -> None:
    words = str(Path(sources["own"]["files"]).parent / "tokenizer.json")
    for name in ("window", "head"):
        with pytest.raises(ConfigError, match=rf"data\.source\.{name}=0: must be at least 1"):
            StreamData(str(tmp_path), sources, words, row_tokens=64, **{name: 0})
