"""How many bad samples are borne, and what is said of those that are not."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hostile import CHECKS, good, image, pair, stream_of, tar_of, write_shard
from symbiotic.data.account import ACCOUNT, BAD_SAMPLES, Account
from symbiotic.data.errors import DataError
from symbiotic.data.shards import ShardIndex
from symbiotic.data.stream import read_stream


def shards_with(folder: Path, num_good: int, num_bad: int) -> list[str]:
    bad = [entry for n in range(num_bad) for entry in pair(f"bad-{n:05d}", b"{", image(0))]
    entries = [entry for n in range(num_good) for entry in good(f"good-{n:05d}", n)]
    return [write_shard(folder, "a-00000.tar", entries), write_shard(folder, "a-00001.tar", bad)]


def run_index(folder: Path, account: Account) -> None:
    ShardIndex.scan(folder, list(account.shards), CHECKS, account)


def run_stream(folder: Path, account: Account) -> None:
    for _ in read_stream(stream_of(folder, list(account.shards)), account):
        pass


def run_workers(folder: Path, account: Account) -> None:
    for _ in read_stream(stream_of(folder, list(account.shards)), account, num_workers=2, timeout=60):
        pass


MODES = pytest.mark.parametrize("run", [run_index, run_stream, run_workers])


@MODES
def test_a_share_of_bad_samples_up_to_the_budget_is_borne(tmp_path: Path, run: Callable[..., None]) -> None:
    shards = shards_with(tmp_path, 198, 2)
    run(tmp_path, Account(shards, max_bad=0.01))
    with pytest.raises(DataError) as caught:
        run(tmp_path, Account(shards, max_bad=0.0099, folder=tmp_path))
    assert str(caught.value) == (
        "more than max_bad=0.0099 allows: 2 of 200 samples are bad (1.00%): not_json 2; "
        f"worst shard a-00001.tar (2 of 2); see {tmp_path / ACCOUNT}"
    )
    assert len((tmp_path / BAD_SAMPLES).read_text().splitlines()) == 2


@MODES
def test_far_too_many_bad_samples_end_it_early(tmp_path: Path, run: Callable[..., None]) -> None:
    shards = shards_with(tmp_path, 400, 600)[1:]
    account = Account(shards, max_bad=0.01, folder=tmp_path, at_least=50)
    with pytest.raises(DataError, match=r"no sample is good: 50 of 50 samples are bad \(100\.00%\): not_json 50"):
        run(tmp_path, account)
    stored = json.loads((tmp_path / ACCOUNT).read_text())
    assert (stored["bad"], stored["shards"]["a-00001.tar"]["done"]) == (50, False)
    both = Account(["a-00001.tar", "a-00000.tar"], max_bad=0.01, at_least=50)
    with pytest.raises(
        DataError, match=r"(no sample is good|more than max_bad=0\.01 allows): \d+ of \d+ samples are bad"
    ):
        run(tmp_path, both)
    assert both.good + both.bad < 100


@MODES
def test_all_bad_and_none_at_all_are_errors_whatever_the_budget(tmp_path: Path, run: Callable[..., None]) -> None:
    shards = shards_with(tmp_path, 0, 5)
    with pytest.raises(
        DataError, match=r"no sample is good: 6 of 6 samples are bad .*: not_json 5, empty_shard 1; worst"
    ):
        run(tmp_path, Account(shards, max_bad=1.0))
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"no sample is good: 1 of 1 samples are bad \(100.00%\): empty_shard 1; worst"):
        run(tmp_path, Account(["b.tar"], max_bad=1.0))


@MODES
def test_bytes_that_cannot_be_read_count_too(tmp_path: Path, run: Callable[..., None]) -> None:
    """One entry stands for the rest of a shard, which may be most of the data."""
    shards = shards_with(tmp_path, 400, 0)[:1]
    os.truncate(tmp_path / shards[0], (tmp_path / shards[0]).stat().st_size // 2)
    run(tmp_path, Account(shards, max_bad=0.01))  # what was cut off is not there to be counted
    damaged = bytearray(tar_of([entry for n in range(400) for entry in good(f"good-{n:05d}", n)]))
    damaged[2048 * 200] ^= 1
    (tmp_path / shards[0]).write_bytes(damaged)
    with pytest.raises(DataError, match=r"1 of 201 samples are bad \(0\.50%\) and 50\.\d+% of the bytes are not read"):
        run(tmp_path, Account(shards, max_bad=0.01))


def test_no_shards_and_a_shard_twice_are_refused() -> None:
    with pytest.raises(DataError, match="no shards to read"):
        Account([])
    with pytest.raises(DataError, match=r"a\.tar: this shard is named twice"):
        Account(["a.tar", "b.tar", "a.tar"])
