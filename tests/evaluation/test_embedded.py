"""The embedded evaluation: what an oracle scores, and that measuring changes nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from factory import build
from symbiotic.data.packing import patch_pixels
from symbiotic.data.tokenizer import EOS, Tokenizer
from symbiotic.evaluation.captions import read_captions
from symbiotic.evaluation.embedded import EmbeddedEvaluation
from symbiotic.evaluation.images import load_image
from symbiotic.evaluation.mmlu import read_mmlu
from symbiotic.evaluation.ocrbench import read_ocrbench
from symbiotic.evaluation.prompts import pictures
from symbiotic.evaluation.scorers import Scorers
from symbiotic.models.batch import TEXT, VIT, Batch
from symbiotic.models.cache import KVCache
from symbiotic.models.unified import Output
from symbiotic.schema import Evaluation, Objective, Sampler

CFG = Evaluation(questions=16, readings=12, images=12, batch_size=8)
NAMES = {
    "knowledge_replayed",
    "knowledge_unreplayed",
    "reading",
    "flow_error",
    "embedded_acc",
    "embedded_acc_held_out",
    "embedded_clip",
    "embedded_fd",
}
VOCABULARY = 512


class Oracle(nn.Module):
    """Knows every benchmark file: the next token after (image, words so far), the clean latents after a caption."""

    latents = True

    def __init__(self, corpus: Path, prediction: str) -> None:
        super().__init__()
        self.prediction, self.answers = prediction, dict[tuple[bytes, tuple[int, ...]], int]()
        self.images = dict[tuple[int, ...], Tensor]()
        tokenizer = Tokenizer.load(corpus / "tokenizer.json")
        for question in read_mmlu(corpus / "benchmarks" / "knowledge", "test")[0]:
            options = " ".join(f"{x} {c}" for x, c in zip("ABCD", question.choices, strict=True))
            words = tokenizer.encode(f"{question.question} {options} answer")
            self.answers[b"", (1, *words)] = tokenizer.letters[question.answer]
        for entry in read_ocrbench(corpus / "benchmarks" / "reading" / "reading.json")[0]:
            image = patch_pixels(load_image(entry.image), 4)[0].tobytes()
            words = [1, 3, 4, *tokenizer.encode(entry.question)]
            for token in [*tokenizer.encode(entry.answers[0]), EOS]:
                self.answers[image, tuple(words)] = token
                words.append(token)
        captions, pixels = read_captions(corpus / "benchmarks" / "generation", 99, [])
        for caption, picture in zip(captions, pixels, strict=True):
            words = [1, *tokenizer.encode(caption.caption), 5]
            self.images[tuple(words)] = torch.from_numpy(patch_pixels(picture, 4)[0])

    def forward(self, batch: Batch, *, logits_at: Tensor, cache: KVCache | None = None) -> Output:
        first, tokens, data = 0, [], []
        before = self.seen if cache is not None and cache.seen_BS is not None else [(b"", ())] * len(batch.tokens)
        seen = []
        for row, (image, words) in enumerate(before):
            valid = batch.segment[row] >= 0
            words = (*words, *batch.tokens[row][valid & (batch.kind[row] <= TEXT + 1)].tolist())
            patches = int((batch.kind[row] == VIT).sum())
            image += batch.vit_patches[first : first + patches].numpy().tobytes()
            first += patches
            seen.append((image, words))
            if logits_at[row].any():
                tokens.append(self.answers[image, words])
            elif len(batch.latents):
                data.append(self.images[words])
        if cache is not None and not cache.fixed:
            self.seen = seen
            cache.keep(batch)
        logits = F.one_hot(torch.tensor(tokens, dtype=torch.long), VOCABULARY).float()
        clean = torch.cat(data) if data else batch.latents
        answer = clean if self.prediction == "x" else (batch.latents - clean) / batch.time[:, None].clamp(min=1e-6)
        return Output(logits, answer, answer.sum(), answer.sum(), None)  # type: ignore[arg-type]


def evaluation(corpus: Path, prediction: Any = "x", **sampler: Any) -> EmbeddedEvaluation:
    objective = Objective(prediction=prediction, sampler=Sampler(**({"steps": 3} | sampler)))
    return EmbeddedEvaluation(corpus, CFG, objective, scorers="tiny")


@pytest.mark.parametrize("prediction", ["x", "velocity"])
def test_an_oracle_gets_everything_right(corpus: Path, tiny_scorers: Scorers, prediction: str) -> None:
    scores = evaluation(corpus, prediction, guidance=1.0).run(Oracle(corpus, prediction))
    assert scores["knowledge_replayed"] == scores["knowledge_unreplayed"] == scores["reading"] == 1.0
    assert scores["flow_error"] == pytest.approx(0, abs=1e-10)
    captions, pixels = read_captions(corpus / "benchmarks" / "generation", 99, [])
    real = torch.from_numpy(pixels)
    assert scores["embedded_fd"] == pytest.approx(0, abs=1e-5)
    right = [s == c.attributes for s, c in zip(tiny_scorers.attributes(real), captions, strict=True)]
    assert scores["embedded_acc"] == np.mean(right)
    held_out = [r for r, c in zip(right, captions, strict=True) if c.held_out]
    assert scores["embedded_acc_held_out"] == np.mean(held_out)
    cosines = tiny_scorers.cosines(real, [c.caption for c in captions])
    assert scores["embedded_clip"] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert scores.n == {
        **dict.fromkeys(NAMES, 12),
        "knowledge_replayed": 8,
        "knowledge_unreplayed": 8,
        "embedded_acc_held_out": 6,
    }
    assert scores.judges == tiny_scorers.accuracy
    assert scores.problems == []


def test_a_share_of_the_images_is_compared_with_its_own_references(corpus: Path) -> None:
    scores = evaluation(corpus, guidance=1.0).run(Oracle(corpus, "x"), share=0.5, only=("flow_error", "generation"))
    assert (scores.n["embedded_acc"], scores.n["embedded_acc_held_out"]) == (6, 2)
    assert scores["flow_error"] == pytest.approx(0, abs=1e-6)
    assert scores["embedded_fd"] == pytest.approx(0, abs=1e-3)


def test_wrong_answers_score_zero(corpus: Path) -> None:
    oracle = Oracle(corpus, "x")
    letters = list(Tokenizer.load(corpus / "tokenizer.json").letters)
    for key, token in oracle.answers.items():
        oracle.answers[key] = letters[(letters.index(token) + 1) % 4] if token in letters else EOS
    scores = evaluation(corpus).run(oracle, only=("knowledge", "reading"))
    assert scores == {"knowledge_replayed": 0.0, "knowledge_unreplayed": 0.0, "reading": 0.0}


def test_records_say_what_was_asked_and_answered(corpus: Path) -> None:
    scores = evaluation(corpus, guidance=1.0).run(Oracle(corpus, "x"))
    json.dumps(scores.records)
    by_name: dict[str, list[dict[str, Any]]] = {}
    for record in scores.records:
        by_name.setdefault(record["benchmark"], []).append(record)
    assert {name: len(some) for name, some in by_name.items()} == {
        "knowledge_replayed": 8,
        "knowledge_unreplayed": 8,
        "reading": 12,
        "flow_error": 12,
        "generation": 12,
    }
    assert all(r["prediction"] == r["answer"] for r in by_name["knowledge_replayed"])
    assert all([r["prediction"]] == list(r["answers"]) for r in by_name["reading"])


@pytest.mark.parametrize("system", ["symbiotic", "standard_moe", "dense"])
def test_measuring_a_model_changes_nothing(corpus: Path, system: str) -> None:
    model = build(system, vocab_size=VOCABULARY)
    model.blocks[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(1)
    state = torch.get_rng_state()
    run = evaluation(corpus)
    scores = run.run(model, seed=1)
    assert set(scores) == NAMES
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.blocks[0].training
    assert model.blocks[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert run.run(model, seed=1) == scores


def test_scores_do_not_depend_on_the_batch_size(corpus: Path) -> None:
    model = build("symbiotic", vocab_size=VOCABULARY)
    objective = Objective(sampler=Sampler(steps=3))
    runs = [EmbeddedEvaluation(corpus, replace(CFG, batch_size=size), objective, "tiny").run(model) for size in (5, 96)]
    assert runs[0] == pytest.approx(runs[1], rel=1e-3, abs=1e-5)


def test_a_parent_without_latents_has_no_image_scores(corpus: Path) -> None:
    run = evaluation(corpus)
    scores = run.run(build("standard_moe", latents=False, vocab_size=VOCABULARY))
    assert set(scores) == {"knowledge_replayed", "knowledge_unreplayed", "reading"}
    assert scores.judges == {}


def test_pictures_are_a_function_of_seed_number_and_caption(corpus: Path) -> None:
    model, tokenizer = build("symbiotic", vocab_size=VOCABULARY).eval(), Tokenizer.load(corpus / "tokenizer.json")
    captions = ["red 7 on black bar top", "blue 1 on gray bar right", "white 0 on teal bar left"]
    objective = Objective(sampler=Sampler(steps=3))

    def make(texts: list[str], **more: Any) -> np.ndarray:
        return pictures(model, texts, tokenizer, objective, **more).numpy().astype(int)

    together = make(captions, seed=4)
    assert together.shape == (3, 20, 20, 3)
    assert abs(make(captions, seed=4, batch_size=2) - together).max() <= 1
    assert abs(make(captions[1:], seed=4, numbers=[1, 2]) - together[1:]).max() <= 1
    assert abs(make(captions, seed=5) - together).max() > 10
    assert make([]).shape == (0, 20, 20, 3)


def test_a_long_caption_pads_no_others(corpus: Path) -> None:
    model, tokenizer = build("symbiotic", vocab_size=VOCABULARY).eval(), Tokenizer.load(corpus / "tokenizer.json")
    shapes: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _, given: shapes.append(tuple(given[0].tokens.shape)))
    short = "red 7 on black bar top"
    captions = [short, " ".join(["red"] * 2500), short, short]
    drawn = pictures(model, captions, tokenizer, Objective(sampler=Sampler(steps=1)), numbers=[0, 1, 2, 0])
    assert [rows for rows, _ in shapes] == [6, 6, 2, 2]  # each with its unguided row: the prompts, and one step
    assert shapes[0][1] < 100 < 2500 < shapes[2][1]
    assert (drawn[0] == drawn[3]).all()
    assert (drawn[0] != drawn[2]).any()


def test_bad_items_are_named_and_the_others_scored(corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(corpus, tmp_path / "c")
    benchmarks = tmp_path / "c" / "benchmarks"
    with (benchmarks / "knowledge" / "replayed_test.csv").open("r+") as file:
        lines = file.readlines()
        file.seek(0)
        file.writelines([lines[0], "broken,row\n", *lines[1:]])
    (benchmarks / "reading" / "images" / "00003.png").unlink()
    (benchmarks / "reading" / "images" / "00005.png").write_bytes(b"x")
    (benchmarks / "generation" / "images" / "00001.png").unlink()
    text = (benchmarks / "generation" / "captions.jsonl").read_text()
    first = text.splitlines()[0]
    (benchmarks / "generation" / "captions.jsonl").write_text(text.replace(first, "[" * 10**5))
    scores = evaluation(tmp_path / "c", guidance=1.0).run(Oracle(corpus, "x"))
    assert (scores["reading"], scores.n["reading"]) == (1.0, 10)
    assert (scores["knowledge_replayed"], scores.n["knowledge_replayed"]) == (1.0, 8)
    assert scores.n["embedded_acc"] == scores.n["flow_error"] == 10
    named = ["replayed_test.csv: row 2", "entry 3: no image images/00003.png", "00005.png: not a readable", "line 1: "]
    assert len(scores.problems) == 5, scores.problems
    assert all(any(name in problem for problem in scores.problems) for name in [*named, "00001.png: no such image"])


def test_a_reading_image_larger_than_the_model_is_named(corpus: Path) -> None:
    model = build("dense", vocab_size=VOCABULARY, max_grid=4)  # the images have 5 columns of patches
    scores = evaluation(corpus).run(model, only=("reading",))
    assert scores.n["reading"] == 0
    assert np.isnan(scores["reading"])
    assert "larger than 4 patches a side" in scores.problems[0]


def test_missing_benchmarks_are_a_line_each(corpus: Path, tmp_path: Path) -> None:
    shutil.copy(corpus / "tokenizer.json", tmp_path)
    scores = evaluation(tmp_path).run(Oracle(corpus, "x"))
    assert not scores
    assert list(scores.failed) == ["knowledge", "reading", "flow_error", "generation"]
    assert "no file replayed_test.csv" in scores.failed["knowledge"]
    assert not scores.tracebacks
