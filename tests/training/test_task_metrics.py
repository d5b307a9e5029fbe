"""Accuracy and shares of task routers, and routing metrics over several groups of experts, by hand."""

from __future__ import annotations

import functools

import pytest
import torch

from symbiotic.training.routing_metrics import capacity_rate, max_vio, over_routers, utilisation
from symbiotic.training.task_metrics import accuracy, task_metrics

ROUTERS = torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]])
SEES = torch.tensor([[True, True, False, False], [False, False, True, True]])
EVERY = torch.ones(4, dtype=torch.bool)


def test_accuracy_is_the_share_of_tokens_predicted_as_their_own_task() -> None:
    predicted = torch.tensor([[[6.0, 2], [1, 3], [0, 0], [0, 4]], [[8.0, 0], [4, 0], [0, 0], [2, 2]]])
    found = accuracy(predicted, torch.tensor([0, 1, 0, 1]))
    assert found[:, [0, 1, 3]].tolist() == [[0.75, 0.75, 1.0], [1.0, 0.0, 0.5]]
    assert bool(found[:, 2].isnan().all())


def test_names_and_means_over_layers_of_the_kinds_that_have_tokens() -> None:
    predicted = torch.tensor([[[6.0, 2], [1, 3], [0, 0], [0, 4]], [[8.0, 0], [4, 0], [0, 0], [2, 2]]])
    sent = torch.tensor([[[8.0, 0], [0, 4], [0, 0], [0, 4]]] * 2)
    found = task_metrics(predicted, sent, ROUTERS, ["und", "gen"])
    assert found["task/accuracy/text"] == 0.875
    assert found["task/layer1/accuracy/prompt"] == 0.0
    assert found["task/accuracy/vae"] == 0.75
    assert (found["task/share/prompt/gen"], found["task/share/prompt/und"]) == (1.0, 0.0)
    assert not [name for name in found if "vit" in name]
    assert len(found) == 3 * 3 * 3


@pytest.mark.parametrize("metric", [capacity_rate, utilisation, max_vio, functools.partial(capacity_rate, factor=1.25)])
def test_tokens_that_are_all_sent_to_one_group_have_the_metric_of_that_group(metric) -> None:  # type: ignore[no-untyped-def]
    counts = torch.tensor([[6.0, 2, 0, 0], [0, 0, 3, 5]])
    found = over_routers(metric, counts, EVERY.expand(2, 4), SEES)
    assert torch.equal(found, metric(counts, SEES))
    assert torch.equal(over_routers(metric, counts, SEES, None), metric(counts, SEES))


def test_tokens_in_two_groups_have_their_mean_and_no_tokens_have_none() -> None:
    counts = torch.tensor([[6.0, 2, 2, 0], [0, 0, 0, 0]])
    found = over_routers(capacity_rate, counts, EVERY.expand(2, 4), SEES)
    assert float(found[0]) == pytest.approx(0.8 * 6 / 8 + 0.2 * 1 / 2)  # 4 + 2 of 8 kept, 1 of 2
    assert bool(found[1].isnan())
