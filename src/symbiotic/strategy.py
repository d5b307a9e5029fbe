"""Sharded training under Lightning: `ModelParallelStrategy` with checkpoints that are whole or absent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from symbiotic.callbacks.checkpoint import AtomicCheckpointIO, CheckpointError
from symbiotic.callbacks.sharded_checkpoint import load, save
from symbiotic.module import SymbioticModule
from symbiotic.training.optimizer_state import by_name, named, restore


class ShardedStrategy(ModelParallelStrategy):
    """The ranks make a mesh, data × experts, that the module shards its model over in `configure_model`.

    All of them train on samples of their own. Lightning's name of the second dimension is tensor_parallel: it has
    nothing else to do with it than to build the mesh. Checkpoints are folders (`callbacks.sharded_checkpoint`); those
    of a single process, and of DDP, are read too.
    """

    def __init__(self, ranks: int, expert_parallel: int) -> None:
        super().__init__(ranks // expert_parallel, expert_parallel, save_distributed_checkpoint=True)

    def _configure_launcher(self) -> None:
        """Whoever runs many processes has started them."""

    # ------------------------------------------------------------------ checkpoints

    @property
    def module(self) -> SymbioticModule:
        return cast(SymbioticModule, self.lightning_module)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def optimizer_state(self, optimizer: Optimizer | LightningOptimizer) -> dict[str, Any]:
        return named(_plain(optimizer), self.module.names())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Raises:
        CheckpointError: some rank could not write its part.
        """
        about = {"step": checkpoint.get("global_step"), **cast(AtomicCheckpointIO, self.checkpoint_io).about}
        try:
            save(checkpoint, Path(filepath), about)
        except OSError as error:
            raise CheckpointError(f"{filepath}: checkpoint not written: {error}") from error

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Into the model and the optimisers; returns what the callbacks, loops and the module take their states from.

        The path is that of a checkpoint that was just found valid.

        Raises:
            CheckpointError: it is not one of this model.
        """
        path, names = Path(checkpoint_path), self.module.names()
        parameters = {name: parameter for parameter, name in names.items()}
        try:
            checkpoint = self._placed(path, parameters)
            self.module.load_state_dict(checkpoint["state_dict"])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"{path}: not a checkpoint of this model ({str(error).splitlines()[0]})") from error
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            restore(_plain(optimizer), state, names)
        return checkpoint

    def _placed(self, path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
        """A checkpoint, its tensors sharded like the parameters that they belong to."""
        if path.is_dir():
            return load(path, lambda name: parameters.get(name.removeprefix("model.")))
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        roles = list(self.module.by_role().values())
        checkpoint["optimizer_states"] = [by_name(state, roles) for state in checkpoint["optimizer_states"]]
        return _sharded(checkpoint, parameters)


def _plain(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer._optimizer if isinstance(optimizer, LightningOptimizer) else optimizer


def _sharded(value: Any, parameters: Mapping[str, Tensor], name: str = "") -> Any:
    """Whole tensors under the name of a parameter, and of its shape, cut as it is; each rank takes its own part."""
    parameter = parameters.get(name.removeprefix("model."))
    if isinstance(value, Tensor) and isinstance(parameter, DTensor) and value.shape == parameter.shape:
        whole = value.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    if isinstance(value, Mapping):
        return {key: _sharded(child, parameters, str(key)) for key, child in value.items()}
    return type(value)(_sharded(child, parameters) for child in value) if isinstance(value, list | tuple) else value
