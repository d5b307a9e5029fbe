"""Where files of users are looked for, and what their hash depends on."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from symbiotic.data.errors import DataError
from symbiotic.evaluation.assets import ASSETS, asset, content_hash, package, versions
from symbiotic.evaluation.benchmark import MissingAsset

KEY, HOW = "evaluation.benchmarks.x.file", "it is part of the release"


def test_a_configured_path_wins_over_the_folder_of_assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "assets" / "x").mkdir(parents=True)
    (tmp_path / "assets" / "x" / "b.bin").write_bytes(b"b")
    (tmp_path / "own.bin").write_bytes(b"own")
    monkeypatch.setenv(ASSETS, str(tmp_path / "assets"))
    assert asset(str(tmp_path / "own.bin"), "x/b.bin", key=KEY, how=HOW) == tmp_path / "own.bin"
    assert asset(None, "x/b.bin", key=KEY, how=HOW) == tmp_path / "assets/x/b.bin"
    assert asset(None, "x/a.bin", "x/*.bin", key=KEY, how=HOW) == tmp_path / "assets/x/b.bin"


def test_what_is_missing_is_said_with_its_places_and_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ASSETS, raising=False)
    with pytest.raises(MissingAsset) as error:
        asset(None, "x/a.bin", "x/*.pt", key=KEY, how=HOW)
    for part in ("x/a.bin", "$SYMBIOTIC_ASSETS/x/*.pt", "SYMBIOTIC_ASSETS is not set", KEY, HOW):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    monkeypatch.setenv(ASSETS, str(tmp_path))
    with pytest.raises(MissingAsset, match=f"SYMBIOTIC_ASSETS={tmp_path}"):
        asset(None, "x/a.bin", key=KEY, how=HOW)
    with pytest.raises(MissingAsset, match=rf"{KEY}=/nowhere/a: no such file or folder; {HOW}"):
        asset("/nowhere/a", "x/a.bin", key=KEY, how=HOW)
    for name in ("a.npz", "b.npz"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(MissingAsset, match=r"a\.npz, b\.npz: which one\?"):
        asset(None, "*.npz", key=KEY, how=HOW)


def test_a_package_that_is_not_installed() -> None:
    package("torch", "eval")
    with pytest.raises(MissingAsset, match=r"no_such_package.*pip install 'symbiotic\[eval\]'"):
        package("no_such_package", "eval")


def test_the_hash_changes_with_content_and_names_and_nothing_else(tmp_path: Path) -> None:
    folder, copy = tmp_path / "a", tmp_path / "b"
    for root in (folder, copy):
        (root / "deep").mkdir(parents=True)
        (root / "deep" / "one").write_bytes(b"1" * 100_000)
        (root / "two").write_bytes(b"2")
    before = content_hash(folder)
    assert before == content_hash(copy)
    assert content_hash(folder / "two") == content_hash(copy / "two") != content_hash(folder / "deep" / "one")
    (copy / ".hidden").write_bytes(b"x")
    (copy / "empty").mkdir()
    assert content_hash(copy) == before
    (copy / "two").rename(copy / "three")
    assert content_hash(copy) != before
    (folder / "two").write_bytes(b"3")
    os.utime(folder / "two", (1, 1))
    assert content_hash(folder) != before
    with pytest.raises(DataError, match=r"cannot read: .*nothing"):
        content_hash(tmp_path / "nothing")


def test_the_versions_of_what_decides_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(versions("torch-fidelity", "lm-eval")) == ["torch-fidelity", "lm-eval"]
    assert versions("torch") == {"torch": importlib.metadata.version("torch")}
    with pytest.raises(MissingAsset, match=r"the package no-such-package is not installed; pip install"):
        versions("no-such-package")
