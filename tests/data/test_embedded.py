"""The corpus: the same bytes for a seed, nothing shared between training and benchmarks, clean failures."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from symbiotic.data.embedded import RECIPE_VERSION, EmbeddedData, render_generation
from symbiotic.data.errors import DataError
from symbiotic.data.glyphs import Attributes, all_attributes, glyph, held_out_attributes, scans, split_scans
from symbiotic.data.knowledge import QUESTION, RELATIONS, World
from symbiotic.data.shards import ShardIndex, ShardReader
from symbiotic.schema import ConfigError

CHOICES = re.compile(r"^(.*) A (\w+) B (\w+) C (\w+) D (\w+) answer$")
TINY: dict[str, Any] = {
    "lm": 20,
    "lm_unreplayed": 20,
    "mmu": 20,
    "t2i": 20,
    "t2i_long": 20,
    "readings": 8,
    "captions": 6,
}


def records(corpus: Path, index: ShardIndex, name: str) -> Iterator[tuple[dict[str, Any], Any]]:
    reader = ShardReader(corpus / "shards", index)
    return (reader.read(int(number)) for number in index.members_of(name))


def rows(corpus: Path, pattern: str) -> list[list[str]]:
    files = sorted((corpus / "benchmarks" / "knowledge").glob(pattern))
    assert files
    return [row for file in files for row in csv.reader(file.read_text().splitlines())]


def captions(corpus: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (corpus / "benchmarks/generation/captions.jsonl").read_text().splitlines()]


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ------------------------------------------------------------------ determinism


def test_the_same_recipe_gives_the_same_bytes_and_another_seed_another_corpus(tmp_path: Path) -> None:
    one, two = (EmbeddedData(str(tmp_path / name), seed=3, **TINY).prepare() for name in "ab")
    assert files(one) == files(two)
    other = EmbeddedData(str(tmp_path / "a"), seed=4, **TINY)
    assert other.fingerprint != one.name
    changed = files(other.prepare())
    assert changed["shards/lm-00000.tar"] != files(one)["shards/lm-00000.tar"]
    assert changed["shards/mmu-00000.tar"] != files(one)["shards/mmu-00000.tar"]


def test_another_content_has_another_recipe_version(corpus: Path, index: ShardIndex) -> None:
    """A corpus is found again by its recipe, so code that writes other samples must raise RECIPE_VERSION."""
    digest = hashlib.sha256()
    reader = ShardReader(corpus / "shards", index)
    for number in range(len(index)):
        record, pixels = reader.read(number)
        digest.update(json.dumps(record, sort_keys=True).encode() + (b"" if pixels is None else pixels.tobytes()))
    for name in ("knowledge/*.csv", "reading/reading.json", "generation/captions.jsonl"):
        for file in sorted((corpus / "benchmarks").glob(name)):
            digest.update(file.read_bytes())
    known = json.loads((Path(__file__).parent / "corpus_digests.json").read_text())
    found = {str(RECIPE_VERSION): digest.hexdigest()[:16]}
    right = "raise RECIPE_VERSION in data/embedded.py and add its digest to tests/data/corpus_digests.json"
    assert found.items() <= known.items(), right


def test_a_corpus_is_written_once(tmp_path: Path) -> None:
    source = EmbeddedData(str(tmp_path), **TINY)
    first = (source.prepare() / "index.npz").stat()
    assert source.is_ready()
    assert (EmbeddedData(str(tmp_path), **TINY).prepare() / "index.npz").stat() == first


def test_processes_that_start_together_find_one_whole_corpus(tmp_path: Path, project_root: Path) -> None:
    script = f"""
from symbiotic.data.embedded import EmbeddedData
print(EmbeddedData({str(tmp_path)!r}, **{TINY}).prepare())
"""
    environment = {**os.environ, "PYTHONPATH": str(project_root / "src")}
    command = [sys.executable, "-c", script]
    starts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    found = [start.communicate(timeout=120)[0].strip() for start in starts]
    assert len(set(found)) == 1
    visible = [path.name for path in tmp_path.iterdir() if not path.name.endswith(".lock")]
    assert visible == [Path(found[0]).name]
    assert len(ShardIndex.load(Path(found[0]) / "index.npz")) == 100


# ------------------------------------------------------------------ training and benchmarks share nothing


def test_no_question_of_a_benchmark_is_in_training(corpus: Path, index: ShardIndex) -> None:
    asked = {(row[0], frozenset(row[1:5])) for row in rows(corpus, "*.csv")}
    assert len(asked) == 3 * 192  # one for dev, two for test, on each fact: dev and test differ too
    trained = set()
    for name in ("lm", "lm_unreplayed"):
        for record, _ in records(corpus, index, name):
            if match := CHOICES.match(record.get("prompt", "")):
                trained.add((match[1], frozenset(match.groups()[1:])))
    assert len(trained) > 300
    assert not asked & trained


def test_no_scan_of_the_reading_benchmark_is_in_training(corpus: Path, index: ShardIndex) -> None:
    trained = {scan for record, _ in records(corpus, index, "mmu") for scan in record["scans"]}
    tested = {
        scan for item in json.loads((corpus / "benchmarks/reading/reading.json").read_text()) for scan in item["scans"]
    }
    assert len(trained) > 100
    assert len(tested) > 40
    assert not trained & tested
    train, test = split_scans(0)
    assert trained <= set(np.concatenate(list(train.values())).tolist())
    assert tested <= set(np.concatenate(list(test.values())).tolist())
    assert sum(map(len, train.values())) + sum(map(len, test.values())) == len(scans()[1]) == 1797


def test_no_held_out_combination_is_in_a_training_caption(corpus: Path, index: ShardIndex) -> None:
    held_out = held_out_attributes(0)
    for name in ("t2i", "t2i_long"):
        seen = {Attributes.of(record) for record, _ in records(corpus, index, name)}
        assert len(seen) == 300  # a round over the combinations repeats none
        assert not seen & held_out
    lines = captions(corpus)
    assert [line["held_out"] for line in lines] == [Attributes.of(line) in held_out for line in lines]
    assert Counter(line["held_out"] for line in lines) == {True: 20, False: 20}


def test_held_out_combinations_leave_every_pair_of_values_in_training() -> None:
    held_out, everything = held_out_attributes(5), all_attributes()
    assert len(everything) == len(set(everything)) == 960
    assert len(held_out) == 96
    assert len({a.short_caption for a in everything}) == len({a.long_caption for a in everything}) == 960
    names = ("digit", "foreground", "background", "layout")
    pairs = {(x, y, getattr(a, x), getattr(a, y)) for a in everything for x in names for y in names}
    kept = {(x, y, getattr(a, x), getattr(a, y)) for a in set(everything) - held_out for x in names for y in names}
    assert kept == pairs
    assert set(Counter(a.digit for a in held_out).values()) <= {9, 10}


# ------------------------------------------------------------------ what the questions ask


def test_only_replayed_facts_are_in_the_replayed_set(corpus: Path, index: ShardIndex) -> None:
    world = World(0)
    for name, replayed in (("lm", True), ("lm_unreplayed", False)):
        told = {record["fact"] for record, _ in records(corpus, index, name)}
        assert told == {fact.number for fact in world.facts if fact.replayed is replayed}
        other = [(f.relation, f.entity) for f in world.facts if f.replayed is not replayed]
        words = [set(f"{r.get('prompt', '')} {r.get('text', '')}".split()) for r, _ in records(corpus, index, name)]
        assert not [pair for pair in other for text in words if text.issuperset(pair)]


def test_a_question_can_only_be_answered_by_knowing_the_fact(corpus: Path) -> None:
    world = World(0)
    facts = {fact.question: fact for fact in world.facts}
    for row in rows(corpus, "*.csv"):
        fact, choices = facts[row[0]], row[1:5]
        assert len(set(choices)) == 4
        assert set(choices) <= set(world.values[fact.relation])  # distractors are values of the same relation
        assert choices["ABCD".index(row[5])] == fact.value
    for split in ("replayed", "unreplayed"):
        letters = Counter(row[5] for row in rows(corpus, f"{split}_test.csv"))
        assert set(letters.values()) == {48}  # 192 questions, the letters balanced
    assert Counter(Counter(f.value for f in world.facts).values()) == {3: 64}  # no value is more likely
    assert len(world.facts) == 192
    assert sum(fact.replayed for fact in world.facts) == 96
    assert len({(f.entity, f.relation) for f in world.facts}) == 192
    assert QUESTION.format(relation=RELATIONS[0], entity=world.entities[0]) in facts


def test_training_questions_name_the_right_letter(corpus: Path, index: ShardIndex) -> None:
    letters: Counter[str] = Counter()
    facts = World(0).facts
    for record, _ in records(corpus, index, "lm"):
        if match := CHOICES.match(record.get("prompt", "")):
            letter = record["answer"].split()[0]
            assert match.groups()[1 + "ABCD".index(letter)] == facts[record["fact"]].value
            letters[letter] += 1
    assert min(letters.values()) > 0.15 * letters.total()


def test_reading_answers_are_what_the_picture_shows(corpus: Path) -> None:
    """The nearest colour of background and ink, and the font's digits, agree with the answers."""
    from symbiotic.data.glyphs import BACKGROUNDS, FOREGROUNDS

    def nearest(colour: Any, known: dict[str, tuple[int, int, int]]) -> str:
        return min(known, key=lambda name: float(np.abs(np.subtract(known[name], colour)).sum()))

    checked: Counter[str] = Counter()
    for item in json.loads((corpus / "benchmarks/reading/reading.json").read_text()):
        picture = np.asarray(Image.open(corpus / "benchmarks/reading" / item["image_path"])).astype(float)
        kind, style = item["type"].split()
        border = np.concatenate([picture[0], picture[-1]])
        ground = np.median(border, axis=0)
        far = np.abs(picture - ground).sum(-1)
        ink = np.median(picture[far > 0.75 * far.max()], axis=0)
        if kind == "background":
            assert nearest(ground, BACKGROUNDS) == item["answers"][0]
        elif kind == "foreground" and style == "font":
            assert nearest(ink, FOREGROUNDS) == item["answers"][0]
        elif style == "font":
            mask = (far > 0.5 * far.max()).astype(float)
            best = max(
                ((a, b, y, x) for a in range(10) for b in range(10) for y in (1, 2, 3) for x in (1, 2, 3)),
                key=lambda g: (
                    -np.abs(np.hstack([glyph(g[0]), glyph(g[1])]) - mask[g[2] : g[2] + 8, g[3] : g[3] + 16]).sum()
                ),
            )
            assert f"{best[0]} {best[1]}" == item["answers"][0]
        checked[kind] += 1
    assert checked == {"number": 30, "foreground": 15, "background": 15}


def test_reference_pictures_tell_all_attributes_apart() -> None:
    """The nearest clean picture of a rendering is that of its own attributes."""
    rng = np.random.default_rng(0)
    everything = all_attributes()
    clean = np.stack([render_generation(a, rng).reshape(-1) for a in everything]).astype(np.float32)
    for number in rng.integers(960, size=60).tolist():
        again = render_generation(everything[number], rng).reshape(-1).astype(np.float32)
        assert int(((clean - again) ** 2).sum(1).argmin()) == number


# ------------------------------------------------------------------ failures


def left_behind(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.endswith(".lock")] if folder.exists() else []


def test_too_little_space_is_one_line_before_anything_is_written(tmp_path: Path) -> None:
    source = EmbeddedData(str(tmp_path))
    with pytest.raises(DataError, match=r"^not enough disk space for the data in .*: need \d\d MB, have 5 MB$"):
        source.prepare(free=lambda folder: 5_000_000)
    assert left_behind(tmp_path) == []


def test_the_space_asked_for_suffices_and_is_not_much_too_large(source: EmbeddedData, corpus: Path) -> None:
    used = sum(512 * path.stat().st_blocks for path in corpus.rglob("*"))
    assert used <= source.needed_bytes() <= 2 * used + 1_000_000


def test_a_write_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    """Files may not grow beyond 40 kB: the first shard cannot be written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(DataError, match=r"^cannot write data: .*: File too large$"):
            EmbeddedData(str(tmp_path), **{**TINY, "t2i": 100}).prepare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left_behind(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or mount is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_or_fills_up_is_one_line_and_leaves_nothing(small_disk: Path) -> None:
    source = EmbeddedData(str(small_disk), **{**TINY, "t2i": 200})
    with pytest.raises(DataError, match=r"need \d MB, have 0 MB"):
        source.prepare()
    with pytest.raises(DataError, match=r"^cannot write data in .*disk: the disk is full; free some space"):
        source.prepare(free=lambda folder: 10**9)
    assert left_behind(small_disk) == []


def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        with pytest.raises(DataError, match=r"^cannot write data: no permission for "):
            EmbeddedData(str(folder / "data"), **TINY).prepare()
    finally:
        if root:
            os.seteuid(0)


def test_a_file_in_the_way_and_half_a_corpus_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write data: .*file"):
        EmbeddedData(str(tmp_path / "file"), **TINY).prepare()
    source = EmbeddedData(str(tmp_path), **TINY)
    source.path.mkdir()
    with pytest.raises(DataError, match=r"not a complete data folder \(no recipe\.json\); delete it"):
        source.prepare()


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    source = EmbeddedData(str(tmp_path), **TINY)
    litter = tmp_path / f".{source.fingerprint}.tmp"
    (litter / "shards").mkdir(parents=True)
    (litter / "shards" / "half.tar").write_text("")
    source.prepare()
    assert left_behind(tmp_path) == [source.fingerprint]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("lm", 0, r"data\.source\.lm=0: must be at least 1"), ("statements", 1.5, r"data\.source\.statements=1\.5: ")],
)
def test_bad_sizes_name_the_key(tmp_path: Path, key: str, value: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EmbeddedData(str(tmp_path), **{key: value})  # type: ignore[arg-type]
