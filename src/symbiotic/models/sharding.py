"""The model over several devices: parameters sharded with FSDP2, experts spread over the ranks of a group."""

from __future__ import annotations

from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from symbiotic.models.moe import Experts
from symbiotic.models.unified import UnifiedModel


def shard(model: UnifiedModel, mesh: DeviceMesh) -> UnifiedModel:
    """Shard every parameter over all ranks of a mesh; in place, and before the optimiser is built.

    mesh: of one dimension, or of two, data × experts: the experts of every pool are then shared out along the second
    one, which has to divide their number, and each stays where it is: tokens travel to it (`expert_parallel`).

    Each block is a unit: its parameters are gathered for its forward, freed, and gathered again for its backward. The
    rest (embeddings, latent in and out, last norms, heads) is the unit of the root and stays gathered from the forward
    to the end of the backward, so that a tied head may read `embed.weight`. A parameter becomes a DTensor cut along its
    first dimension: a pool [E, D, F] by experts, in unequal parts where the ranks do not divide E. Of spread pools
    each is a unit, cut by experts along one dimension of the mesh and along its second axis along the other. Buffers
    are replicated. Gradients are means over all ranks, as under DDP; each element of one lies on one rank.

    Every rank must come with the same parameters. Recomputation and compiled blocks work as before. Mixed precision and
    other times to gather and free are arguments of `fully_shard` that nothing sets yet.
    """
    everywhere = mesh if mesh.ndim == 1 else init_device_mesh(mesh.device_type, (mesh.size(),))
    if mesh.ndim == 2 and mesh.size(1) > 1:
        for pool in [module for module in model.modules() if isinstance(module, Experts)]:
            spread(pool, mesh)
    for block in model.blocks:
        fully_shard(block, mesh=everywhere)
    fully_shard(model, mesh=everywhere)
    return model


def spread(pool: Experts, mesh: DeviceMesh) -> None:
    """Share the experts of a pool out along the second dimension of a mesh, and shard what a rank gets along the first.

    That is cut along its second axis: FSDP2 cannot cut the first one twice in unequal parts.
    """
    assert mesh.mesh_dim_names is not None
    data, experts = (mesh[name] for name in mesh.mesh_dim_names)
    for module in pool.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(weight.detach(), experts, [Shard(0)], src_data_rank=None)  # every rank has it
            setattr(module, name, nn.Parameter(part, requires_grad=weight.requires_grad))
    pool.group = experts.get_group()
    fully_shard(pool, mesh=data, shard_placement_fn=lambda parameter: Shard(1))
