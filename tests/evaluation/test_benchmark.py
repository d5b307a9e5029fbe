"""How a model is held while it is measured, and the records' file."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from symbiotic.evaluation.benchmark import Value, batches, mean, measuring, write_jsonl


@pytest.mark.parametrize("fails", [False, True])
def test_modes_gradients_and_random_state_come_back(fails: bool) -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Linear(2, 2), nn.Dropout()))
    model[1].eval()
    model[1][1].train()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())  # noqa: NPY002
    try:
        with measuring(model) as held:
            assert not any(m.training for m in held.modules())
            assert not held(torch.ones(1, 2)).requires_grad
            torch.rand(9)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), str(np.random.get_state())) == states[1:]  # noqa: NPY002


def test_mean_and_batches() -> None:
    assert mean([True, False, True, True]) == Value(0.75, 4)
    assert np.isnan(mean([]).value)
    assert mean([]).n == 0
    assert [list(b) for b in batches(range(5), 2)] == [[0, 1], [2, 3], [4]]


def test_records_appear_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "records.jsonl"
    write_jsonl(path, [{"a": "ß\n"}, {"b": [1, 2]}])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"a": "ß\n"}, {"b": [1, 2]}]
    with pytest.raises(TypeError):
        write_jsonl(path, [{"a": 1}, {"a": object()}])
    assert len(path.read_text().splitlines()) == 2
    assert [p.name for p in path.parent.iterdir()] == ["records.jsonl"]
