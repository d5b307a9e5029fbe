"""A small corpus, written once for the whole test session."""

from __future__ import annotations

from pathlib import Path

import pytest

from symbiotic.data.embedded import EmbeddedData
from symbiotic.evaluation.scorers import Scorers, load_scorers


@pytest.fixture(scope="session")
def corpus(shared_tmp: Path) -> Path:
    sizes = {"lm": 8, "lm_unreplayed": 8, "mmu": 8, "t2i": 8, "t2i_long": 8}
    return EmbeddedData(str(shared_tmp / "eval_corpus"), questions=1, readings=12, captions=12, **sizes).prepare()


@pytest.fixture(scope="session")
def tiny_scorers(corpus: Path) -> Scorers:
    return load_scorers(corpus, "tiny")
