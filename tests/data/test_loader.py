"""The micro-batch is the atom: world size, workers, accumulation and resuming change none of its bits."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from symbiotic.data.loader import MicroBatches, MicroBatchSampler, train_loader
from symbiotic.data.plan import DataPlan
from symbiotic.data.shards import DataError, ShardIndex
from symbiotic.data.tokenizer import GEN, NULL
from symbiotic.models.batch import IGNORE, PROMPT, VAE, VIT, Batch
from symbiotic.schema import ConfigError, Data, Mix, Objective

JOINT = Mix({"t2i": 3.0, "t2i_long": 3.0, "lm": 2.0, "mmu": 2.0})
OBJECTIVE = Objective(time_mean=0.8, caption_dropout=0.3)
STEPS = 3


def equal(one: Batch, two: Batch) -> bool:
    return all(torch.equal(getattr(one, f.name), getattr(two, f.name)) for f in fields(Batch))


@pytest.fixture
def dataset(corpus: Path, index: ShardIndex, data: Data) -> MicroBatches:
    return MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE))


def load(dataset: MicroBatches, **options: int) -> list[Batch]:
    return list(train_loader(dataset, STEPS, micro_batches=4, **options))


def test_no_world_size_and_no_worker_changes_a_batch(corpus: Path, index: ShardIndex, data: Data) -> None:
    def fresh() -> MicroBatches:
        return MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE))

    alone = load(fresh())
    assert len(alone) == 12
    for world in (2, 4):
        ranks = [load(fresh(), rank=rank, world=world) for rank in range(world)]
        together = [ranks[i % world][i // world] for i in range(12)]
        assert all(equal(one, two) for one, two in zip(alone, together, strict=True))
    worked = load(fresh(), num_workers=2)
    assert all(equal(one, two) for one, two in zip(alone, worked, strict=True))
    uncached = MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE), cache_bytes=0)
    assert all(equal(one, two) for one, two in zip(alone, load(uncached), strict=True))
    assert not equal(alone[0], alone[1])


def test_a_resumed_loader_goes_on_where_it_stopped_and_keeps_its_length(dataset: MicroBatches) -> None:
    whole = load(dataset)
    loader = train_loader(dataset, STEPS, start_step=2, micro_batches=4)
    assert len(loader) == 12
    assert all(equal(one, two) for one, two in zip(whole[8:], loader, strict=True))


def test_ranks_share_every_step_without_overlap() -> None:
    for world in (1, 2, 3, 6):
        samplers = [MicroBatchSampler(5, 1, 6, rank, world) for rank in range(world)]
        assert sorted(item for sampler in samplers for item in sampler) == list(range(6, 30))
        assert {len(sampler) for sampler in samplers} == {30 // world}
        per_rank = 6 // world
        for sampler in samplers:
            items = list(sampler)
            for step in range(1, 5):
                mine = items[(step - 1) * per_rank : step * per_rank]
                assert {item // 6 for item in mine} == {step}
    with pytest.raises(ConfigError, match=r"data\.micro_batches=6: must be a multiple of the 4 devices"):
        MicroBatchSampler(5, 0, 6, 0, 4)


def test_one_large_micro_batch_and_its_norms_make_the_same_step_loss(
    corpus: Path, index: ShardIndex, data: Data
) -> None:
    """Sum over the micro-batches of count / norm is the number of micro-batches: their mean is the step's mean."""
    dataset = MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE))
    batches = [dataset[4 * 2 + micro] for micro in range(4)]
    shares = [float((b.target != IGNORE).sum() / b.ce_norm) for b in batches]
    assert sum(shares) / 4 == pytest.approx(1.0, abs=1e-6)
    assert sum(float(len(b.latents) / b.flow_norm) for b in batches) / 4 == pytest.approx(1.0, abs=1e-6)


def test_a_batch_keeps_the_contract(dataset: MicroBatches) -> None:
    batch = dataset[5]
    assert batch.tokens.shape[1] == 64
    assert len(batch.latents) == len(batch.noise) == len(batch.time) == int((batch.kind == VAE).sum()) > 0
    assert len(batch.vit_patches) == len(batch.vit_grid) == int((batch.kind == VIT).sum()) > 0
    assert float(batch.latents.abs().max()) <= 1
    assert abs(float(batch.noise.mean())) < 0.05
    assert abs(float(batch.noise.std()) - 1) < 0.05
    assert 0 < float(batch.time.min()) < float(batch.time.max()) < 1
    floats = {"vit_patches", "latents", "noise", "time", "ce_norm", "flow_norm"}
    for field in fields(Batch):
        expected = torch.float32 if field.name in floats else torch.bool if field.name == "causal" else torch.int64
        assert getattr(batch, field.name).dtype == expected, field.name
    for row in range(len(batch.tokens)):
        segments = batch.segment[row]
        used = int((segments >= 0).sum())
        assert (segments[:used] >= 0).all()
        assert (batch.position[row, :used][segments[:used].diff(prepend=segments[:1] - 1) == 1] == 0).all()


def test_dropped_captions_have_the_unconditional_sequence_and_no_text_loss(dataset: MicroBatches) -> None:
    batch, plan = dataset[1], dataset.plan.micro_batch(0, 1)
    empty = (batch.tokens == NULL).nonzero()
    assert len(empty) == int(plan.dropped.sum()) > 0
    for row, place in empty.tolist():
        assert batch.kind[row, place] == PROMPT
        assert batch.position[row, place] == 1
        assert batch.tokens[row, place + 1] == GEN
        sample = batch.segment[row] == batch.segment[row, place]
        assert (batch.target[row, sample] == IGNORE).all()
        assert int(sample.sum()) == 3 + 25


def test_the_noise_of_a_sample_survives_without_the_other_sets(corpus: Path, index: ShardIndex, data: Data) -> None:
    full = MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE))[6]
    part = MicroBatches(corpus, DataPlan(index, replace(JOINT, drop=("t2i", "lm")), data, 0, OBJECTIVE))[6]
    whole = {tuple(row) for row in full.noise.tolist()}
    assert 0 < len(part.noise) < len(full.noise)
    assert {tuple(row) for row in part.noise.tolist()} <= whole


def test_loading_draws_nothing_from_the_global_generator(dataset: MicroBatches) -> None:
    state = torch.get_rng_state()
    load(dataset)
    load(dataset, num_workers=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_cache_is_bounded(corpus: Path, index: ShardIndex, data: Data) -> None:
    dataset = MicroBatches(corpus, DataPlan(index, JOINT, data, 0, OBJECTIVE), cache_bytes=50_000)
    load(dataset)
    assert 0 < sum(sample.nbytes for sample in dataset._cache.values()) <= 50_000


def test_the_samples_of_an_item_can_be_had_by_name_one_by_one(dataset: MicroBatches) -> None:
    whole, parts = dataset[3], dict(dataset.alone(3))
    assert len(parts) == 20
    assert sum(name.startswith("lm-0000") for name in parts) == 4
    noises = torch.cat([part.noise for part in parts.values()])
    assert sorted(noises.flatten().tolist()) == sorted(whole.noise.flatten().tolist())
    assert sum(int((part.target >= 0).sum()) for part in parts.values()) == int((whole.target >= 0).sum())
    assert all(torch.equal(part.ce_norm, whole.ce_norm) for part in parts.values())


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_shard_is_one_line_that_names_it(
    corpus: Path, index: ShardIndex, data: Data, tmp_path: Path, workers: int
) -> None:
    (tmp_path / "shards").mkdir()
    (tmp_path / "tokenizer.json").write_bytes((corpus / "tokenizer.json").read_bytes())
    for shard in (corpus / "shards").iterdir():
        (tmp_path / "shards" / shard.name).write_bytes(shard.read_bytes())
    os.truncate(tmp_path / "shards" / "mmu-00001.tar", 1000)
    broken = MicroBatches(tmp_path, DataPlan(index, JOINT, data, 0, OBJECTIVE))
    with pytest.raises(DataError, match=r"mmu-00001\.tar: 1000 bytes where the index says \d+") as caught:
        load(broken, num_workers=workers)
    assert "\n" not in str(caught.value)


def test_an_index_of_another_corpus_is_noticed(corpus: Path, index: ShardIndex, data: Data) -> None:
    wrong = replace(index, num_tokens=index.num_tokens + 1)
    dataset = MicroBatches(corpus, DataPlan(wrong, JOINT, data, 0, OBJECTIVE))
    with pytest.raises(DataError, match=r"\.tar: \S+: \d+ tokens where the index says \d+"):
        dataset[0]
