"""A small embedded corpus, written once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from symbiotic.data.embedded import EmbeddedData
from symbiotic.data.shards import ShardIndex
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.schema import Data

SIZES = {"lm": 400, "lm_unreplayed": 400, "mmu": 300, "t2i": 300, "t2i_long": 300}
SMALL = {**SIZES, "readings": 60, "captions": 40, "shard_size": 150}


@pytest.fixture(scope="session")
def source(shared_tmp: Path) -> EmbeddedData:
    return EmbeddedData(str(shared_tmp / "corpora"), seed=0, **SMALL)


@pytest.fixture(scope="session")
def corpus(source: EmbeddedData) -> Path:
    return source.prepare()


@pytest.fixture(scope="session")
def index(corpus: Path) -> ShardIndex:
    return ShardIndex.load(corpus / "index.npz")


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> Tokenizer:
    return Tokenizer.load(corpus / "tokenizer.json")


@pytest.fixture
def data() -> Data:
    return Data(source={}, sets=tuple(SIZES), samples=20, row_tokens=64, micro_batches=4)
