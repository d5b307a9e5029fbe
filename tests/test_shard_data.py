"""A run on shards from elsewhere: what is bad in them is left out, and the run says what it was."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from symbiotic import arc
from symbiotic.checks.evaluation import EMBEDDED
from symbiotic.config import compose, compose_evaluation
from symbiotic.data.errors import DataError
from symbiotic.data.loader import MicroBatches
from symbiotic.data.plan import DataPlan
from symbiotic.data.shard_data import ShardData
from symbiotic.data.shards import ShardIndex
from symbiotic.files import read_json
from symbiotic.schema import Config, ConfigError
from symbiotic.studies.benchmarks import make_suite
from symbiotic.trained import open_run

FEW = ("phases.steps=6", "phases.shield_steps=2", "save_every=3", "log_every=2", "logger.tensorboard=null")


@pytest.fixture(scope="module")
def corpus(shared_tmp: Path) -> Path:
    """The smoke corpus, as somebody's own shards."""
    source = compose(["experiment=smoke", f"paths.data={shared_tmp / 'data'}"]).data.source
    from symbiotic.config import instantiate

    return Path(instantiate(source, "data.source").prepare())


@pytest.fixture
def mine(corpus: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(corpus / "shards", tmp_path / "mine")
    shutil.copy(corpus / "tokenizer.json", folder)
    return Path(folder)


def add(shard: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(shard, "a") as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))


def configured(shared: Path, mine: Path, folder: Path, *more: str) -> Config:
    paths = [f"paths.runs={folder / 'runs'}", f"paths.data={folder / 'data'}", f"paths.cache={folder / 'cache'}"]
    given = ["data=shards", f"data.source.shards=[{mine}]", f"data.source.tokenizer={mine / 'tokenizer.json'}"]
    sizes = ["data.samples=16", "data.row_tokens=64", "data.micro_batches=2"]
    return compose(["experiment=smoke", *given, *sizes, *paths, *FEW, *more])


def test_a_run_on_shards_from_elsewhere(shared_tmp: Path, mine: Path, corpus: Path, tmp_path: Path) -> None:
    """With two bad samples of 1,302: its folder has the account, and the good ones are those of the corpus."""
    bad = {"x1.json": b"{", "x2.json": json.dumps({"task": "lm", "text": ""}).encode()}
    add(next(mine.glob("lm-*.tar")), bad)
    config = configured(shared_tmp, mine, tmp_path)
    arc.run(config)
    folder = Path(config.run_dir)
    account = read_json(folder / "data_account.json")
    assert account["kinds"] == {"not_json": 1, "empty_text": 1}
    rows = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
    assert {(row["key"], row["kind"]) for row in rows} == {("x1", "not_json"), ("x2", "empty_text")}
    summary = read_json(folder / "summary.json")
    assert summary["scores"] == {}
    assert summary["image_size"] == [20, 20]
    assert list((folder / "samples").glob("*.png")), "captions of the shards themselves are drawn"
    assert not (folder.parents[2] / "data" / summary["data"] / "scorers").exists(), "no judge is trained"
    trained = open_run(folder)
    suite = make_suite(compose_evaluation([f"run={folder}"]), trained)
    assert not {benchmark.name for benchmark in suite.benchmarks} & set(EMBEDDED)
    assert suite.size == (20, 20)
    own, its = (ShardIndex.load(path / "index.npz") for path in (Path(trained.corpus), corpus))
    assert own.keys.tolist() == its.keys.tolist()
    one, other = (
        MicroBatches(path, DataPlan(index, config.mix, config.data, 0, config.objective))[3]
        for path, index in ((Path(trained.corpus), own), (corpus, its))
    )
    assert one.tokens.equal(other.tokens)
    assert one.latents.equal(other.latents)


def test_too_much_that_is_bad_is_one_line_with_the_account(mine: Path, tmp_path: Path) -> None:
    add(next(mine.glob("lm-*.tar")), {f"x{n}.json": b"{" for n in range(40)})
    source = source_of(mine, tmp_path / "data")
    with pytest.raises(DataError, match=r"40 of 1,340 samples are bad .*not_json 40") as caught:
        source.prepare()
    assert "\n" not in str(caught.value)
    assert not source.path.exists()
    assert read_json(tmp_path / "data" / f"{source.fingerprint}.account" / "data_account.json")["bad"] == 40
    more = source_of(mine, tmp_path / "data", max_bad=0.05)
    assert len(ShardIndex.load(more.prepare() / "index.npz")) == 1300


def source_of(mine: Path, folder: Path, **more: object) -> ShardData:
    given = {"shards": [str(mine)], "tokenizer": str(mine / "tokenizer.json"), "row_tokens": 64}
    return ShardData(str(folder), **{**given, **more})  # type: ignore[arg-type]


def test_other_shards_are_another_corpus(mine: Path, tmp_path: Path) -> None:
    first = source_of(mine, tmp_path).fingerprint
    assert source_of(mine, tmp_path).fingerprint == first
    assert source_of(mine, tmp_path, row_tokens=80).fingerprint != first
    add(next(mine.glob("lm-*.tar")), {"x.json": b"{}"})
    assert source_of(mine, tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"shards": []}, r"data\.source\.shards=: must be tar files"),
        ({"shards": ["/no/such.tar"]}, r"data\.source\.shards=/no/such\.tar: no such file"),
        ({"shards": ["pipe:cat x"]}, r"data\.source\.shards=pipe:cat x: pipe: is not read"),
        ({"tokenizer": "/no.json"}, r"data\.source\.tokenizer=/no\.json: no such file"),
        ({"max_bad": 2.0}, r"data\.source\.max_bad=2: must lie in \[0, 1\]"),
        ({"max_pixels": 0}, r"data\.source\.max_pixels=0: must be at least 1"),
    ],
)
def test_wrong_arguments_are_one_line(change: dict[str, object], line: str, mine: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=line):
        source_of(mine, tmp_path, **change)
