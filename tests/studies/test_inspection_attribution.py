"""Integrated gradients: they add up, vanish where nothing can come from, and agree with a sum of our own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from factory import build, code_batch, random_batch
from inspected import run_folder
from symbiotic.models.batch import VAE, VIT
from symbiotic.objectives.total import model_input
from symbiotic.schema import Objective
from symbiotic.studies.inspection import Request, inspect
from symbiotic.studies.inspection_attribution import answer_score, attributed, image_score, silent
from symbiotic.studies.inspection_trace import trace


@pytest.fixture(scope="module")
def run(shared_tmp: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attributed") / "run"
    run_folder(shared_tmp, folder)
    return folder


def by_hand(score, x_ND: torch.Tensor, from_ND: torch.Tensor, points: int) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """[N] by the midpoint rule, from the formula alone."""
    total = torch.zeros_like(x_ND)
    for s in range(points):
        at = (from_ND + (s + 0.5) / points * (x_ND - from_ND)).detach().requires_grad_(True)
        total += torch.autograd.grad(score(at), at)[0]
    return ((x_ND - from_ND) * total / points).sum(-1)


def test_values_are_the_integral_and_add_up_to_the_difference() -> None:
    """A dense system has no jumps on the way."""
    net = build("dense").eval().requires_grad_(False)
    batch = random_batch(count=1, tasks=("mmu",))
    score = answer_score(net, batch)
    found = attributed(net, batch, score, "an answer", steps=64)
    x_ND = net.embedding(batch)
    torch.testing.assert_close(
        found.values_N, by_hand(score, x_ND, net.embedding(silent(batch)), 400), rtol=1e-3, atol=1e-4
    )
    assert found.score == pytest.approx(float(score(x_ND)))
    assert abs(found.gap) < 1e-3 * abs(found.score - found.baseline)
    assert found.values_N[batch.segment.reshape(-1) < 0].abs().max() == 0.0, "padding adds nothing"


def test_where_nothing_can_come_from_nothing_comes() -> None:
    net = build("symbiotic").eval().requires_grad_(False)
    net.vit_in.weight.zero_()
    net.vit_in.bias.zero_()
    batch = random_batch(count=1, tasks=("mmu",))
    values_N = attributed(net, batch, answer_score(net, batch), "an answer", steps=8).values_N
    read_N = (batch.kind == VIT).reshape(-1)
    assert float(values_N[read_N].abs().max()) == 0.0, "an image that is not seen"
    assert float(values_N[~read_N].abs().max()) > 0.0


@pytest.mark.parametrize("codes", [False, True])
def test_an_image_owes_something_to_its_caption(codes: bool) -> None:
    net = build("symbiotic", codebook=11 if codes else 0).eval().requires_grad_(False)
    batch = code_batch(11, 1, ("t2i",)) if codes else random_batch(1, ("t2i",))
    objective = Objective(name="autoregressive", codebook_size=11) if codes else Objective()
    found = attributed(net, model_input(batch), image_score(net, batch, objective), "an image", steps=8)
    caption_N = (batch.kind != VAE).reshape(-1) & (batch.segment >= 0).reshape(-1)
    assert float(found.values_N[caption_N].abs().sum()) > 0.0
    assert found.score != found.baseline


def test_the_inspector_attributes_its_own_answer(run: Path) -> None:
    image = run / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)).save(image)
    request = Request(run=str(run), prompt="what number is it ?", image=str(image), attribute=True)
    paths = inspect(request)
    found = json.loads(paths[2].read_text())
    told = found["attribution"]
    assert len(told["values"]) == len(found["tokens"])
    assert told["about"].startswith("the model's answer '")
    assert found["tokens"][-1]["word"] == "<eos>", "the answer stands behind the prompt"
    assert told["score"] < 0.0, "a log-probability"
    assert told["score"] - told["baseline"] == pytest.approx(sum(told["values"]) + told["gap"], abs=1e-3)
    page, text = paths[1].read_text(), paths[0].read_text()
    assert "What it depends on" in page
    assert "What it depends on" in text
    assert page.count('class="token p') == len(found["tokens"])
    plain = trace(Request(run=str(run), prompt="what number is it ?", image=str(image)))
    assert plain.attribution is None
    assert len(plain.tokens) < len(found["tokens"])
