"""Run a trained model on one prompt and keep what every MoE layer did with every token.

Suffixes: N tokens, E routed experts (pool after pool), K of top-k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from symbiotic.data.packing import Array
from symbiotic.data.tokenizer import Tokenizer
from symbiotic.evaluation.benchmark import measuring
from symbiotic.evaluation.prompts import one_a_row
from symbiotic.layout import pool_sizes, router_of
from symbiotic.models.batch import IGNORE, Batch
from symbiotic.models.moe import LayerTrace
from symbiotic.models.unified import UnifiedModel
from symbiotic.objectives.total import model_input
from symbiotic.schema import KINDS, Config, ConfigError
from symbiotic.studies import inspection_inputs as inputs
from symbiotic.studies.inputs import fitting, unknown_words
from symbiotic.studies.inspection_attribution import (
    IMAGE,
    Attribution,
    answer_ids,
    answer_score,
    attributed,
    image_score,
)
from symbiotic.studies.inspection_inputs import Token
from symbiotic.trained import load_model, open_run, weights_file

if TYPE_CHECKING:
    from symbiotic.studies.inspection import Request


@dataclass(frozen=True)
class Layer:
    """What the MoE layer of one block did. Norms are Euclidean, of what was added to the residual stream."""

    block: int
    experts_NK: Tensor
    gates_NK: Tensor
    probs_NE: Tensor
    entropy_N: Tensor  # of the router's probabilities, over the log of the number of visible experts: 1 is uniform
    routed_N: Tensor  # norm of what the routed experts added
    shared_N: Tensor  # norm of what the shared experts added
    share_N: Tensor  # shared / (shared + routed), of the norms
    changed_N: Tensor | None = None  # bool: the other weights choose another set of experts


@dataclass
class Inspection:
    facts: dict[str, Any]
    tokens: list[Token]
    experts: list[str]  # pool and number inside the pool, in the order of E
    pools: dict[str, int]  # experts in each
    layers: list[Layer]
    dense: list[int]  # blocks without routed experts: the shared share is 1
    picture: Array | None = None  # uint8 [H, W, 3]: what is read, or the clean end of what is generated
    attribution: Attribution | None = None  # where it was asked for
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class KindSummary:
    """One block's tokens of one kind: means over them, the share of the assignments that each expert got (those that
    got any, most used first), and the share of tokens whose set of experts changed."""

    kind: str
    block: int
    tokens: int
    share: float
    entropy: float
    used: list[tuple[str, float]]
    changed: float | None


# --------------------------------------------------------------------------- the trace


def trace(request: Request) -> Inspection:
    """One forward of the run's model on the request's sequence.

    Raises:
        ConfigError, RunError, DataError: what is missing or wrong, in one line.
    """
    opened = open_run(
        request.run, checkpoint=request.checkpoint, step=request.step, data=request.data, device=request.device
    )
    config, model, tokenizer = opened.config, opened.model, opened.tokenizer
    clean, picture = sequence(request, config, model, opened.corpus, tokenizer)
    clean = clean.to(request.device)
    batch = model_input(clean)
    layers, dense = traced(model, batch)
    if request.against is not None:
        path, step = (None, 0) if request.against == "init" else (request.against, None)
        other = weights_file(opened.folder, path, step)
        layers = compared(layers, traced(load_model(config, other, request.device), batch)[0])
    sizes = pool_sizes(config.model, config.system)
    names = [f"{pool}{i}" for pool, size in sizes.items() for i in range(size)]
    tokens = inputs.tokens_of(batch, tokenizer)
    inspection = Inspection(facts(request, config, opened.weights), tokens, names, sizes, layers, dense, picture)
    inspection.notes = notes(inspection, unknown_words(request.prompt, tokenizer))
    if request.attribute:
        inspection.attribution = attribution_of(request, config, model, clean, tokenizer)
    return inspection


def attribution_of(
    request: Request, config: Config, model: UnifiedModel, clean: Batch, tokenizer: Tokenizer
) -> Attribution:
    """What each token of the sequence adds to the answer, or to the image, that stands in it."""
    batch = model_input(clean)
    if request.task == "generation":
        score, about = image_score(model, clean, config.objective), IMAGE[config.objective.name]
    else:
        answer = tokenizer.decode(clean.target[clean.target != IGNORE].tolist())
        score, about = answer_score(model, batch), f"the model's answer {answer!r}: its log-probability, in nats"
    return attributed(model, batch, score, about)


def sequence(
    request: Request, config: Config, model: UnifiedModel, corpus: Path, tokenizer: Tokenizer
) -> tuple[Batch, Array | None]:
    """The batch of one sample, and its image if it has one."""
    pixels = None if request.image is None else fitting(request.image, config.model.max_grid)
    if request.task == "understanding":
        prompt = one_a_row([inputs.reading_sample(request.prompt, pixels, tokenizer)])
        if not request.attribute:
            return prompt, pixels
        answer = answer_ids(model, prompt.to(request.device))
        return one_a_row([inputs.reading_sample(request.prompt, pixels, tokenizer, answer)]), pixels
    if not model.latents:
        raise ConfigError("task=generation: these weights are an understanding-only parent, which draws nothing")
    if pixels is None:
        pixels = inputs.drawn(model, request, config, corpus, tokenizer)
    return inputs.generation_batch(request, pixels, tokenizer), pixels


def facts(request: Request, config: Config, weights: Path) -> dict[str, Any]:
    """What was asked for, and of what."""
    asked: dict[str, Any] = {"run": str(request.run), "weights": str(weights), "system": config.system.name}
    asked |= {"task": request.task, "prompt": request.prompt, "image": request.image, "against": request.against}
    if request.task == "generation":
        asked |= {"time": request.time} if config.objective.name == "flow" else {}
        asked["seed"] = request.seed
    router = router_of(config.model, config.system)
    return asked | {"top_k": router.top_k, "normalize": router.normalize, "scale": router.scale}


def notes(inspection: Inspection, unknown: Sequence[str]) -> list[str]:
    lines = []
    if unknown:
        lines.append(f"Words that the corpus does not have, all <unk> to the model: {' '.join(unknown)}")
    system = inspection.facts["system"]
    if not inspection.layers:
        lines.append(f"{system} has no routed experts: nothing is routed, and the shared share is 1 in every block.")
    elif inspection.dense:
        blocks = ", ".join(map(str, inspection.dense))
        lines.append(f"Blocks without routed experts, where the shared share is 1: {blocks}")
    if inspection.layers and not any(bool(layer.shared_N.any()) for layer in inspection.layers):
        lines.append(f"{system} has no shared experts for these tokens: the shared share is 0.")
    return lines


def traced(model: UnifiedModel, batch: Batch) -> tuple[list[Layer], list[int]]:
    """The MoE layers, on the CPU, and the numbers of the blocks without routed experts."""
    routed = [len(block.moe.pools) > 0 for block in model.blocks]  # type: ignore[union-attr, arg-type]
    blocks = [number for number, has in enumerate(routed) if has]
    with measuring(model):
        out = model(batch, trace=True)
    layers = [layer_of(number, layer) for number, layer in zip(blocks, out.trace, strict=True)]
    return layers, [number for number, has in enumerate(routed) if not has]


def layer_of(block: int, layer: LayerTrace) -> Layer:
    probs_NE = layer.probs_NE.float()
    entropy_N = torch.special.entr(probs_NE).sum(-1) / layer.visible_NE.sum(-1).float().log().clamp(min=1e-9)
    routed_N, shared_N = layer.routed_ND.float().norm(dim=-1), layer.shared_ND.float().norm(dim=-1)
    total_N = routed_N + shared_N
    share_N = torch.where(total_N > 0, shared_N / total_N.clamp(min=1e-30), 0.0)
    parts = (layer.experts_NK, layer.gates_NK.float(), probs_NE, entropy_N.clamp(0, 1), routed_N, shared_N, share_N)
    return Layer(block, *(part.cpu() for part in parts))


def compared(layers: Sequence[Layer], others: Sequence[Layer]) -> list[Layer]:
    """The layers with `changed_N`: whose set of experts is not the one of `others`."""
    made = []
    for layer, other in zip(layers, others, strict=True):
        differs_NK = layer.experts_NK.sort(-1).values != other.experts_NK.sort(-1).values
        made.append(replace(layer, changed_N=differs_NK.any(-1)))
    return made


# --------------------------------------------------------------------------- summaries


def by_kind(inspection: Inspection) -> list[KindSummary]:
    """Of every kind that occurs, in the order of `KINDS`, and every block with routed experts."""
    found = []
    for kind in KINDS:
        rows = [token.place for token in inspection.tokens if token.kind == kind]
        found += [summarised(kind, layer, rows, inspection.experts) for layer in inspection.layers if rows]
    return found


def summarised(kind: str, layer: Layer, rows: Sequence[int], experts: Sequence[str]) -> KindSummary:
    index = torch.tensor(rows)
    changed = None if layer.changed_N is None else float(layer.changed_N[index].float().mean())
    share, entropy = (float(values[index].mean()) for values in (layer.share_N, layer.entropy_N))
    return KindSummary(kind, layer.block, len(rows), share, entropy, used(layer.experts_NK[index], experts), changed)


def used(experts_NK: Tensor, names: Sequence[str]) -> list[tuple[str, float]]:
    """Name and share of the assignments of the experts that got any, most used first."""
    counts = torch.bincount(experts_NK.reshape(-1), minlength=len(names))
    order = counts.argsort(descending=True, stable=True).tolist()
    return [(names[i], int(counts[i]) / experts_NK.numel()) for i in order if counts[i]]


def numbers(inspection: Inspection) -> dict[str, Any]:
    """Everything as plain values, for `inspection.json`."""
    return {
        **inspection.facts,
        "notes": inspection.notes,
        "pools": inspection.pools,
        "experts": inspection.experts,
        "tokens": [vars(token) for token in inspection.tokens],
        "layers": [layer_numbers(layer) for layer in inspection.layers],
        "blocks_without_routed_experts": [{"block": block, "share": 1.0} for block in inspection.dense],
        "kinds": [vars(summary) for summary in by_kind(inspection)],
        "attribution": attribution_numbers(inspection.attribution),
    }


def attribution_numbers(found: Attribution | None) -> dict[str, Any] | None:
    if found is None:
        return None
    ends = {"score": found.score, "baseline": found.baseline, "gap": found.gap}
    return {"about": found.about, "values": rounded(found.values_N), **ends}


def layer_numbers(layer: Layer) -> Mapping[str, Any]:
    named = {"experts": layer.experts_NK, "gates": layer.gates_NK, "probabilities": layer.probs_NE}
    named |= {"entropy": layer.entropy_N, "routed": layer.routed_N, "shared": layer.shared_N, "share": layer.share_N}
    if layer.changed_N is not None:
        named["changed"] = layer.changed_N
    return {"block": layer.block} | {name: rounded(value) for name, value in named.items()}


def rounded(value: Tensor) -> Any:
    """As nested lists; six decimals."""
    return value.tolist() if not value.is_floating_point() else np.round(value.double().numpy(), 6).tolist()
