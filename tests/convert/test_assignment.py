"""Assignments from files: what a receipt says is done again, what is no assignment is one line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from factory import load_system, tiny_model
from symbiotic.config import compose
from symbiotic.convert.assignment import read_assignment
from symbiotic.convert.split import assign
from symbiotic.schema import ConfigError

MODEL = tiny_model(num_layers=2, gen_fraction=0.25)
GOOD: list[Any] = [{"und": [0, 1, 2, 3, 4, 5], "gen": [6, 7]}, {"und": [7, 6, 5, 4, 3, 2], "gen": [1, 0]}]


def test_the_split_of_a_receipt_is_made_again(tmp_path: Path) -> None:
    system = load_system("symbiotic", MODEL)
    made = assign(torch.zeros(2, 4, 8), MODEL, system, "random", seed=3)
    (tmp_path / "receipt.json").write_text(json.dumps({"experts": made, "parameters": {}}))
    assert read_assignment(tmp_path / "receipt.json", MODEL, system) == made
    (tmp_path / "list.json").write_text(json.dumps(GOOD))
    listed = read_assignment(tmp_path / "list.json", MODEL, system)
    assert listed[1] == {"und": [2, 3, 4, 5, 6, 7], "gen": [0, 1]}


BAD = {
    "not json": ("{", r"not readable as JSON"),
    "no list": ({"pools": []}, r"no list of layers in it; must be 2, the layers with experts"),
    "a layer too few": (GOOD[:1], r"1 layers in it; must be 2"),
    "another pool": ([GOOD[0], {"und": GOOD[1]["und"], "vae": [1, 0]}], r"layer 1: pools und, vae; must be und, gen"),
    "a size": ([{"und": [0, 1, 2, 3, 4], "gen": [5, 6, 7]}] * 2, r"layer 0: pool und: 5 experts; must be 6"),
    "twice": ([{"und": [0, 1, 2, 3, 4, 5], "gen": [5, 6]}] * 2, r"layer 0: expert 5 has 2 places; must have one"),
    "out of range": ([{"und": [0, 1, 2, 3, 4, 5], "gen": [6, 8]}] * 2, r"expert 8; must be a whole number below 8"),
    "no number": ([{"und": [0, 1, 2, 3, 4, 5], "gen": [6, "7"]}] * 2, r"expert '7'; must be a whole number"),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_assignment_is_one_line(what: str, tmp_path: Path) -> None:
    content, line = BAD[what]
    path = tmp_path / "experts.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ConfigError, match=line) as error:
        read_assignment(path, MODEL, load_system("symbiotic", MODEL))
    assert str(error.value).startswith(f"init.assignment_file={path}: ")
    assert "\n" not in str(error.value)


def test_the_config_takes_a_file_where_it_is_used(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    path.write_text(json.dumps({"experts": [{"und": [0, 1, 2, 3], "gen": [4, 5, 6, 7]}] * 2}))
    config = compose(["experiment=smoke", "init.assignment=file", f"init.assignment_file={path}"])
    assert config.init.assignment_file == str(path)
    assert config.run_dir != compose(["experiment=smoke"]).run_dir
    wrong = {
        ("init.assignment=file",): r"init\.assignment=file: init\.assignment_file is missing",
        (f"init.assignment_file={path}",): r"init\.assignment_file=.*: has no effect.* init\.assignment is profiled",
        ("init.assignment=file", f"init.assignment_file={tmp_path}/none"): r"none: no such file",
        ("init.assignment=file", f"init.assignment_file={path}", "model.num_layers=3"): r"2 layers in it; must be 3",
    }
    for overrides, line in wrong.items():
        with pytest.raises(ConfigError) as error:
            compose(["experiment=smoke", *overrides])
        assert re.search(line, str(error.value)), str(error.value)
