"""The report on the image tokenizer: what the judges see in a reconstruction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from symbiotic.data.embedded import EmbeddedData
from symbiotic.data.image_vq import EmbeddedVQ
from symbiotic.evaluation.reconstruction import judged, main, report
from symbiotic.evaluation.scorer_training import render_corpus
from symbiotic.evaluation.scorers import Scorers
from symbiotic.files import read_json
from symbiotic.images.tokenizer import ImageTokenizer

TINY = ["--codebook_size", "16", "--width", "8", "--steps", "4", "--batch", "8", "--preset", "tiny"]


class Kept(ImageTokenizer):
    """One code a picture, which gives it back, or gives back the picture `shift` further on."""

    codebook_size, patch, fingerprint = 1000, 20, "kept"

    def __init__(self, x: Tensor, shift: int = 0) -> None:
        super().__init__()
        self.x, self.shift = x, shift

    def numbers(self, x: Tensor) -> Tensor:
        return (torch.arange(len(x)) + self.shift).remainder(len(x)).view(-1, 1, 1)

    def pictures(self, numbers: Tensor) -> Tensor:
        return self.x[numbers.flatten()]

    def save(self, path: Path) -> Path:
        return path


def test_judged_counts_what_is_still_right(tiny_scorers: Scorers) -> None:
    from symbiotic.images.tokenizer import to_input

    pixels = render_corpus(1, 5).images[0][:40]
    truth = tiny_scorers.attributes(pixels)
    same = judged(Kept(to_input(pixels)), tiny_scorers, pixels, truth)
    assert same.pop("fd") == pytest.approx(0, abs=1e-6)
    assert set(same.values()) == {1.0}
    assert set(same) == {"right", "right_before", "digit", "foreground", "background", "layout"}
    wrong = judged(Kept(to_input(pixels), shift=1), tiny_scorers, pixels, truth)
    neighbours = [a == b for a, b in zip(truth, truth[1:] + truth[:1], strict=True)]
    assert wrong["right"] == pytest.approx(sum(neighbours) / 40)
    assert wrong["right_before"] == 1
    other = [(*row[:3], "nowhere") for row in truth]
    assert judged(Kept(to_input(pixels)), tiny_scorers, pixels, other)["right_before"] == 0


def test_the_command_prints_and_keeps_the_figures(
    corpus: Path, tiny_scorers: Scorers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(corpus), "--cache", str(tmp_path), *TINY]) == 0
    out = capsys.readouterr().out
    assert "16 codes of 4x4 pixels, 4 steps" in out
    assert {"held_out", "captions_seen", "captions_new"} < set(out.split())
    (facts,) = (tmp_path / "image_tokenizer").glob("*.json")
    kept = read_json(facts)
    assert kept["judged"]["held_out"]["images"] == kept["held_out"]["images"] == 2
    assert kept["judged"]["held_out"]["mse"] == kept["held_out"]["mse"]
    assert kept["judged"]["captions_new"]["images"] == 6


def test_bad_input_is_one_line(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert main([str(corpus), "--cache", str(tmp_path), "--steps", "0"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "index.npz" in lines[0]
    assert "steps=0: must be at least 2" in lines[1]
    assert len(lines) == 2


@pytest.mark.slow
def test_judges_read_reconstructions_as_they_read_originals(tmp_path: Path) -> None:
    """The default tokenizer on the default corpus's images, at full length."""
    sizes = {"lm": 8, "lm_unreplayed": 8, "mmu": 8, "t2i": 3000, "t2i_long": 3000}
    data = EmbeddedData(str(tmp_path / "data"), readings=8, **sizes).prepare()
    figures = report(EmbeddedVQ(), data, tmp_path / "cache")["judged"]
    for name, row in figures.items():
        assert row["right"] >= 0.95 * row["right_before"], name
        assert row["psnr"] > 27, name
    assert figures["held_out"]["codes_used"] > 0.95
