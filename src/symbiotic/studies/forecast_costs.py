"""Bytes and seconds of a training step on devices that are not here, from the shapes of the parameters; ours.

Assumptions are in `Setting`; a docstring states each formula. Nothing here was measured on many devices.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from symbiotic.layout import router_of
from symbiotic.models.unified import UnifiedModel
from symbiotic.schema import KINDS, Model, System
from symbiotic.studies.flops import attention_flops, multiplied
from symbiotic.studies.inventory import count

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Device:
    """memory: bytes. flops: of dense bfloat16 products a second. inside, between: bytes a second that one GPU sends to
    others of its node, and to other nodes. Data sheets; what is reached is less (`Setting.mfu`, `Setting.reached`)."""

    memory: float
    flops: float
    inside: float
    between: float
    per_node: int = 8


@dataclass(frozen=True)
class Setting:
    """
    Args:
        tokens: of one optimiser step, on all GPUs. row_tokens: of a packed row. shares: of the tokens, by kind.
        targets: share of the tokens with a word to predict. image_tokens: of one image, read or generated.
        image_bytes: of one stored image; text: 4 bytes a token.
        mfu: share of the data sheet's operations that products reach. reached: share of its bytes a second.
        spare: share of the memory that stays free, for fragments and buffers of the libraries.
    """

    tokens: float = 2e6
    row_tokens: int = 4096
    shares: Mapping[str, float] = field(default_factory=lambda: {"text": 0.4, "prompt": 0.1, "vit": 0.1, "vae": 0.4})
    targets: float = 0.4
    image_tokens: int = 256
    image_bytes: float = 60e3
    mfu: float = 0.35
    reached: float = 0.6
    spare: float = 0.1


@dataclass(frozen=True)
class Layout:
    """shard: GPUs over which parameters, gradients and moments are cut (1: copies, as DDP). experts: GPUs over which
    the experts of a layer are spread, of those. micro: rows of a micro-batch on one GPU."""

    gpus: int
    shard: int
    experts: int = 1
    micro: int = 1
    recompute: bool = True


@dataclass(frozen=True)
class Forecast:
    """Bytes on one GPU; seconds of a step. overlapped: gathering behind computing, as FSDP2 does where it can."""

    layout: Layout
    states: float
    gathered: float
    activations: float
    logits: float
    compute: float
    gather: float
    dispatch: float

    @property
    def memory(self) -> float:
        return self.states + self.gathered + self.activations + self.logits

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.gather) + self.dispatch

    @property
    def one_after_another(self) -> float:
        return self.compute + self.gather + self.dispatch


# --------------------------------------------------------------------------- one GPU


def shapes_of(model: Model, system: System) -> dict[str, tuple[int, ...]]:
    """Parameter name -> shape, without memory for any."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in UnifiedModel(model, system).named_parameters()}


def split(shapes: Shapes) -> tuple[int, int]:
    """Parameters of routed experts, and all others."""
    experts = sum(count(shape) for name, shape in shapes.items() if ".moe.pools." in name)
    return experts, sum(map(count, shapes.values())) - experts


def largest_block(shapes: Shapes) -> tuple[int, int]:
    """The same of the largest block: what is gathered at a time."""
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if name.startswith("blocks."):
            blocks.setdefault(name.split(".")[1], {})[name] = shape
    return max((split(found) for found in blocks.values()), key=sum)


def state_bytes(shapes: Shapes, layout: Layout) -> float:
    """16 bytes a parameter, float32 each: itself, its gradient, Adam's two moments."""
    experts, others = split(shapes)
    return 16 * (experts / max(layout.shard, layout.experts) + others / layout.shard)


def gathered_bytes(shapes: Shapes, layout: Layout) -> float:
    """Parameters of two blocks (one is computed while the next comes) in bfloat16, and the gradients of one in
    float32; without shards, the bfloat16 copies of all that autocast keeps for the backward pass."""
    experts, others = largest_block(shapes) if layout.shard > 1 else split(shapes)
    return (8 if layout.shard > 1 else 2) * (experts / layout.experts + others)


def activation_bytes(model: Model, system: System, row_tokens: int, mixed: bool = True) -> float:
    """What the backward pass of one block keeps of one token; mixed: bfloat16 products on a float32 residual stream.

    Then the mask of `scaled_dot_product_attention` counts, which is cast in every layer: row_tokens numbers a token.
    """
    heads, router = model.attention, router_of(model, system)
    queries, keys = heads.num_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    heads_in = queries + keys if heads.qk_norm != "none" else 0  # of their norms
    k, hidden = router.top_k if system.pools else 0, system.merge * model.expert_hidden
    seen = model.num_experts // system.merge if system.pools else 0
    wide = model.shared_hidden + (0 if system.pools else model.router.top_k * model.expert_hidden)
    stream = 2 * model.width + k * model.width + 2 * seen  # before attention and before the experts; what these say
    products = 4 * queries + keys + heads.head_dim + k * (model.width + 3 * hidden) + 3 * wide * len(system.shared)
    normed = 2 * model.width
    if not mixed:
        return 4 * (stream + products + normed + heads_in)
    routed = model.width if system.pools else 0  # routers read float32
    return 4 * (stream + routed + 2 * heads_in) + 2 * (products + normed + row_tokens)


def kept_bytes(model: Model, system: System, setting: Setting, layout: Layout) -> float:
    """Activations of a micro-batch: of all blocks, or with `recompute` their inputs and all of one block."""
    tokens = layout.micro * setting.row_tokens
    one = activation_bytes(model, system, setting.row_tokens)
    if layout.recompute:
        return tokens * (model.num_layers * 4 * model.width + one)
    return tokens * model.num_layers * one


def logit_bytes(model: Model, setting: Setting, layout: Layout) -> float:
    """Of the words to predict: bfloat16 logits, their float32 copy, and its gradient."""
    return layout.micro * setting.row_tokens * setting.targets * model.vocab_size * (2 + 4 + 4)


# --------------------------------------------------------------------------- all GPUs


def step_flops(shapes: Shapes, model: Model, system: System, setting: Setting, recompute: bool) -> float:
    """Of one step, as in `studies/flops.py`: three forwards, four with recompute."""
    used = dict.fromkeys(KINDS, 0.0)
    for name, shape in shapes.items():
        for kind, numbers in multiplied(name, shape, model, system).items():
            head = name == "text_head.weight" and kind in ("text", "prompt")
            used[kind] += 2 * numbers * (setting.targets / max(words(setting), 1e-9) if head else 1.0)
    attention = attention_flops(model, setting.row_tokens)
    forward = sum(setting.shares.get(kind, 0.0) * (used[kind] + attention) for kind in KINDS)
    return setting.tokens * forward * (4 if recompute else 3)


def words(setting: Setting) -> float:
    return setting.shares.get("text", 0.0) + setting.shares.get("prompt", 0.0)


def moved(numbers: float, over: int, each: float) -> float:
    """Bytes that one GPU receives when `numbers` are gathered from, or reduced to, `over` GPUs."""
    return numbers * each * (over - 1) / over


def gather_bytes(shapes: Shapes, setting: Setting, layout: Layout) -> tuple[float, float]:
    """Of a step: within the shards, parameters twice (forward, backward) in bfloat16 and gradients once in float32,
    every micro-batch; and between copies of the shards, gradients once a step (reduced, then gathered)."""
    experts, others = split(shapes)
    micro_batches = max(1.0, setting.tokens / (layout.gpus * layout.micro * setting.row_tokens))
    left = max(1, layout.shard // layout.experts)
    once = moved(others, layout.shard, 8) + moved(experts / layout.experts, left, 8)
    return micro_batches * once, moved((experts + others) / layout.shard, layout.gpus // layout.shard, 8)


def dispatch_bytes(model: Model, system: System, setting: Setting, layout: Layout) -> float:
    """Of a step: every assignment there and back in bfloat16, in the forward, the backward and the recomputed pass."""
    assignments = setting.tokens / layout.gpus * (router_of(model, system).top_k if system.pools else 0)
    layers = model.num_layers - len(model.dense_layers)
    return moved(assignments * model.width * 2 * layers * (2 + layout.recompute), layout.experts, 2)


def forecast(
    shapes: Shapes, model: Model, system: System, setting: Setting, layout: Layout, device: Device
) -> Forecast:
    """Of one layout."""
    flops = step_flops(shapes, model, system, setting, layout.recompute)
    within, between = gather_bytes(shapes, setting, layout)
    return Forecast(
        layout,
        state_bytes(shapes, layout),
        gathered_bytes(shapes, layout),
        kept_bytes(model, system, setting, layout),
        logit_bytes(model, setting, layout),
        flops / (layout.gpus * device.flops * setting.mfu),
        (within / reach(device, layout.shard) + between / reach(device, layout.gpus)) / setting.reached,
        dispatch_bytes(model, system, setting, layout) / (reach(device, layout.experts) * setting.reached),
    )


def reach(device: Device, gpus: int) -> float:
    """Bytes a second within a group of GPUs."""
    return device.inside if gpus <= device.per_node else device.between


def data_rates(setting: Setting, seconds: float) -> dict[str, float]:
    """Images and bytes a second that all loaders together must bring."""
    per_second = setting.tokens / seconds
    images = per_second * (setting.shares.get("vit", 0) + setting.shares.get("vae", 0)) / setting.image_tokens
    text = 4 * per_second * words(setting)
    return {"tokens": per_second, "images": images, "bytes": images * setting.image_bytes + text}
