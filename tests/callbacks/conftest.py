"""A real fit of a tiny symbiotic model: the module, the Trainer and the callbacks of a run, on random batches."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers.logger import Logger
from torch.utils.data import DataLoader, Dataset, Sampler

from factory import load_system, random_batch, tiny_model
from symbiotic.callbacks.checkpoint import AtomicCheckpointIO
from symbiotic.models.batch import Batch
from symbiotic.module import SymbioticModule
from symbiotic.schema import Config, Data, Evaluation, Init, Mix, Objective, Paths, Phase, Phases, Rates

ROLES = {
    "gen": (r"\.moe\.(pools|routers)\.gen", "^latent", "^time_in"),
    "und": (r"\.moe\.(pools|routers|shared)\.(und|all)",),
    "rest": ("^embed", "^vit", r"^blocks\.\d+\.(attention|moe_norm)\.", r"^norm\.", "^text_head"),
}


def make_config(run_dir: Path, steps: int = 6, phases: Sequence[Phase] = (), **changes: Any) -> Config:
    model = tiny_model(num_layers=2)
    listed = tuple(phases) or (Phase("shield", until=3, shield=1.0), Phase("joint", until=steps, shield=0.9))
    values: dict[str, Any] = {
        "name": "test", "seed": 0, "threads": 1, "dry_run": False, "log_every": 1, "save_every": 2,
        "system": load_system("symbiotic", model),
        "model": model,
        "rates": Rates(ROLES, lr=1e-3, optimizer={}, by_role={"gen": 1e-2}, warmup=2, decay=0.0),
        "phases": Phases(steps, 3, 0.1, listed),
        "mix": Mix({"t2i": 1.0}), "objective": Objective(), "init": Init(), "data": Data({}, ("t2i",), 6, 48),
        "evaluation": Evaluation(), "paths": Paths("", "", ""), "trainer": {}, "callbacks": {}, "logger": {},
        "run_dir": str(run_dir),
    }  # fmt: skip
    return Config(**(values | changes))


@functools.cache
def batch_of(index: int) -> Batch:
    return random_batch(count=6, seed=index)


class Batches(Dataset):
    def __getitem__(self, index: int) -> Batch:
        return batch_of(index % 8)


class From(Sampler):
    """Micro-batches from `start` on; its length is that of the whole run."""

    def __init__(self, start: int, total: int, rank: int, world: int) -> None:
        self.start, self.total, self.rank, self.world = start, total, rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start + self.rank, self.total, self.world))

    def __len__(self) -> int:
        return self.total // self.world


class Memory(Logger):
    """Keeps what it is given: (step, metrics)."""

    name, version = "", ""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.calls.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def rows(self) -> dict[int, dict[str, float]]:
        """Step -> metrics, without the speeds."""
        out: dict[int, dict[str, float]] = {}
        for step, metrics in self.calls:
            out.setdefault(step, {}).update({k: v for k, v in metrics.items() if not k.startswith("speed/")})
        return out


REMARKS = (  # of Lightning, about itself or about loaders that are right as they are
    r".*isinstance\(treespec, LeafSpec\)",
    r".*does not have many workers",
    r".*resuming from a checkpoint that ended before the epoch ended",
)


class Fit:
    """One call is one fit of the same config; `config` is what it trains on."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def config(self, steps: int = 6, phases: Sequence[Phase] = (), **changes: Any) -> Config:
        return make_config(self.run_dir, steps, phases, **changes)

    def __call__(
        self,
        callbacks: Sequence[Callback] = (),
        steps: int = 6,
        micro_batches: int = 1,
        loggers: Sequence[Any] = (),
        ckpt_path: Path | None = None,
        phases: Sequence[Phase] = (),
        stop: int | None = None,
        devices: int = 1,
        **changes: Any,
    ) -> tuple[lightning.Trainer, SymbioticModule]:
        """micro-batches: of an optimiser step. stop: train only so many steps of the `steps` of the config."""
        config = self.config(steps, phases, **changes)

        def loader(rank: int, world: int, start: int) -> DataLoader:
            return DataLoader(
                Batches(), batch_size=None, sampler=From(start * micro_batches, steps * micro_batches, rank, world)
            )

        module = SymbioticModule(config, functools.partial(torch.optim.AdamW, weight_decay=0.1), loader)
        trainer = lightning.Trainer(
            max_steps=stop or steps,
            accumulate_grad_batches=micro_batches // devices,
            accelerator="cpu",
            devices=devices,
            strategy="ddp_fork" if devices > 1 else "auto",
            default_root_dir=self.run_dir,
            callbacks=list(callbacks),
            logger=list(loggers) or False,
            plugins=[AtomicCheckpointIO()],
            enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
            log_every_n_steps=0,  # nothing is logged through Lightning
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
        )
        with warnings.catch_warnings():
            for remark in REMARKS:
                warnings.filterwarnings("ignore", remark)
            trainer.fit(module, ckpt_path=None if ckpt_path is None else str(ckpt_path))
        return trainer, module


@pytest.fixture
def fit(tmp_path: Path) -> Fit:
    return Fit(tmp_path)


@pytest.fixture
def memory() -> Memory:
    return Memory()
