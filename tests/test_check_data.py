"""`src/check_data.py`: what is in shards, what is wrong with them, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import people
from hostile import TOKENIZER, Entry, good, image, pair, record, tar_of, write_shard, write_zoo
from symbiotic.data.account import ACCOUNT, BAD_SAMPLES
from symbiotic.data.bad import KINDS
from symbiotic.data.tar import find_shards
from symbiotic.schema import ConfigError
from symbiotic.studies.check_data import USAGE, main

TORCHLESS = """
import runpy, sys
sys.argv = ["check_data.py", *sys.argv[1:]]
try:
    runpy.run_path({script!r}, run_name="__main__")
except SystemExit as end:
    print("exit", end.code, "torch" in sys.modules)
"""


@pytest.fixture
def words(tmp_path: Path) -> Path:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def fill(folder: Path, num_good: int, num_bad: int = 0) -> Path:
    """A folder with one shard of good samples and one of bad ones."""
    folder.mkdir(exist_ok=True)
    write_shard(folder, "a-00000.tar", [entry for n in range(num_good) for entry in good(f"{n:04d}", n)])
    if num_bad:
        bad = [entry for n in range(num_bad) for entry in pair(f"[/bold]{n:04d}", b"{", image(n))]
        write_shard(folder, "a-00001.tar", bad)
    return folder


def test_good_shards_are_counted_by_task(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill(tmp_path / "shards", 12)
    fact = json.dumps({"task": "lm", "prompt": "number", "answer": "red"}).encode()
    write_shard(folder, "b-00000.tar", [Entry("x.json", fact), *good("0003", 3)])
    assert main([f"shards={folder}", f"tokenizer={words}"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["t2i", "13", "106", "8.2", "9", "41", "52", "8", "x", "8"] in lines
    assert ["lm", "1", "4", "4.0", "4", "2", "0", "–"] in lines
    assert ["total", "0.0", "14", "0", "0"] in lines
    told = " ".join(word for line in lines for word in line)
    assert f"1 samples have a key that another shard has, too (such as 0003 in {folder}/a-00000.tar" in told
    assert "1 have the content of an earlier one." in told
    assert main([f"shards={folder / 'a-*.tar'},{folder / 'b-00000.tar'}", "decode=false"]) == 0
    assert ["task", "samples", "images", "(height", "x", "width)"] in map(
        str.split, capsys.readouterr().out.splitlines()
    )


def test_bad_samples_are_shown_by_kind_and_the_status_says_so(
    tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "shards", 99, 1)
    out = tmp_path / "account"
    assert main([f"shards={folder}", f"tokenizer={words}", f"out={out}"]) == 1
    printed, line = capsys.readouterr()
    assert "Bad samples by kind" in printed
    assert "[/bold]0000" in printed  # not taken for a style
    summary = "1 of 100 samples are bad (1.00%): not_json 1"
    worst = f"worst shard {folder}/a-00001.tar (1 of 1); see {out / ACCOUNT}"
    assert line == f"error: within max_bad=0.01: {summary}; {worst}\n"
    assert len((out / BAD_SAMPLES).read_text().splitlines()) == 1
    assert main([f"shards={folder}", "max_bad=0.001"]) == 1
    assert capsys.readouterr().err.startswith(f"error: more than max_bad=0.001 allows: {summary}")


def test_every_kind_has_its_row(tmp_path: Path, words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """But the file that is not there, which is a wrong argument here."""
    write_zoo(tmp_path, times=2)
    assert main([f"shards={tmp_path}", f"tokenizer={words}", "row_tokens=64", "max_pixels=1000000"]) == 1
    printed, line = capsys.readouterr()
    rows = {words[0]: words[1] for words in map(str.split, printed.splitlines()) if len(words) > 1}
    assert {kind: rows[kind] for kind in KINDS if kind in rows} == dict.fromkeys(
        KINDS.keys() - {"unreadable_shard"}, "2"
    )
    assert line.count("\n") == 1
    assert line.startswith("error: more than max_bad=0.01 allows: 74 of ")


def test_data_of_others_are_read_by_their_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    people.TOKENIZER.save(tmp_path / "tokenizer.json")
    words, images = f"tokenizer={tmp_path / 'tokenizer.json'}", f"images={tmp_path / 'talks' / 'images'}"
    pairs, talks = people.img2dataset(tmp_path / "pairs", 1, 5), people.llava(tmp_path / "talks", 6)
    assert main([f"shards={pairs}", "format=img2dataset", "fit=crop", "side=8", words]) == 0
    assert ["t2i", "5", "55", "11.0", "11", "30", "20", "8", "x", "8"] in shown(capsys)
    assert main([f"shards={talks}", "format=llava", "fit=keep", "side=12", images, words]) == 0
    rows = shown(capsys)
    assert next(row for row in rows if row[:1] == ["mmu"])[-3:] == ["4", "x", "12"]
    assert next(row for row in rows if row[:1] == ["lm"])[1] == "1"
    assert main([f"shards={talks}", "format=llava"]) == 1
    assert "images= must say in which folder or tars they lie" in " ".join(capsys.readouterr().out.split())


def shown(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [line.split() for line in capsys.readouterr().out.splitlines()]


WRONG = {
    "": "shards: missing",
    "shards=": r"shards=: must be tar files, a folder of them, or a pattern",
    "shards=none": "shards=none: no such file; must be tar files, a folder of them, or a pattern",
    "shards=.": "shards=.: no .tar in this folder; must be tar files, a folder of them, or a pattern",
    "shards=x-*.tar": "shards=x-*.tar: no such file",
    "shards=pipe:touch canary": "shards=pipe:touch canary: pipe: is not read: a shard must be a local tar file",
    "shards=http://127.0.0.1/x.tar": "shards=http://127.0.0.1/x.tar: http: is not read",
    "shards=a\x1b.tar": r"shards=a\x1b.tar: a shard's name must hold no control characters",
    "shard=x": "shard=x: no such key; did you mean 'shards'?",
    "shards=a.tar max_bad=2": "max_bad=2: must lie in [0, 1]",
    "shards=a.tar max_bad=nan": "max_bad=nan: must lie in [0, 1]",
    "shards=a.tar max_bad=few": "max_bad='few': must be float",
    "shards=a.tar max_pixels=0": "max_pixels=0: must be at least 1",
    "shards=a.tar decode=maybe": "decode='maybe': must be bool",
    "shards=a.tar row_tokens=64": "row_tokens=64: needs tokenizer=FILE",
    "shards=a.tar tokenizer=none.json": "tokenizer=none.json: no such file",
    "shards=a.tar format=llama": "format='llama': must be one of own, img2dataset, llava, text, interleaved",
    "shards=a.tar fit=crop": "side=0: must be a multiple of 4 pixels with fit=crop",
    "shards=a.tar text=body": "text=body: has no effect with format=own; it is of text",
    "shards=a.tar out=a.tar": "out=a.tar: must be a folder",
}


@pytest.mark.parametrize("command", WRONG)
def test_a_wrong_argument_is_one_line(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if "a.tar" in command:
        (tmp_path / "a.tar").write_bytes(tar_of(good("a", 1)))
    arguments = [command] if "pipe:" in command else command.split()
    assert main(arguments) == 2
    printed, line = capsys.readouterr()
    assert (printed, line.count("\n")) == ("", 1)
    assert line.startswith(f"error: {WRONG[command]}")
    assert {path.name for path in tmp_path.iterdir()} <= {"a.tar"}


def test_a_tokenizer_or_shards_that_cannot_be_used_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fill(tmp_path / "shards", 1)
    (tmp_path / "words.json").write_bytes(b"\x80")
    assert main([f"shards={folder}", f"tokenizer={tmp_path / 'words.json'}"]) == 1
    assert "words.json: not a tokenizer file" in capsys.readouterr().err
    (folder / "a-00000.tar").write_bytes(b"")
    assert main([f"shards={folder}"]) == 1
    assert capsys.readouterr().err.startswith(
        "error: no sample is good: 1 of 1 samples are bad (100.00%): empty_shard 1"
    )


def test_shards_are_found_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "a.txt"):
        (tmp_path / name).write_bytes(record(1))
    (tmp_path / "c.tar").mkdir()
    both = [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert find_shards([str(tmp_path)], "shards") == both
    assert find_shards([f"{tmp_path}/b.tar", f"{tmp_path}/*.tar"], "shards") == both
    with pytest.raises(ConfigError, match=r"^shards=.*/\*\*x\.tar: (no pattern|no such file)"):
        find_shards([f"{tmp_path}/**x.tar"], "shards")


def test_the_script_helps_and_refuses_without_torch(project_root: Path, tmp_path: Path) -> None:
    code = TORCHLESS.format(script=str(project_root / "src" / "check_data.py"))
    for argument, status, printed in (("--help", 0, USAGE), ("shards=none", 2, "")):
        command = [sys.executable, "-c", code, argument]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.stdout == f"{printed}exit {status} False\n"
