"""The model over several devices: parameters sharded with FSDP2."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from symbiotic.models.unified import UnifiedModel


def shard(model: UnifiedModel, mesh: DeviceMesh) -> UnifiedModel:
    """Shard every parameter over the ranks of a one-dimensional mesh; in place, and before the optimiser is built.

    Each block is a unit: its parameters are gathered for its forward, freed, and gathered again for its backward. The
    rest (embeddings, latent in and out, last norms, heads) is the unit of the root and stays gathered from the forward
    to the end of the backward, so that a tied head may read `embed.weight`. A parameter becomes a DTensor cut along its
    first dimension: a pool [E, D, F] by experts, in unequal parts where the ranks do not divide E. Buffers are
    replicated. Gradients are means over the ranks, as under DDP.

    Every rank must come with the same parameters. Recomputation and compiled blocks work as before. Mixed precision and
    other times to gather and free are arguments of `fully_shard` that nothing sets yet.
    """
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
