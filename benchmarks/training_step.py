"""(c) The whole training step: forward, losses, backward, AdamW: `python benchmarks/training_step.py [--quick]`.

Two groups on the same number of tokens and of active parameters, each with its dense model, the practical limit:
1. words alone, next-token and balance loss: ours (standard_moe) against transformers' Qwen2-MoE (one shared expert, as
   ours), and OLMoE and Qwen3-MoE (one expert more per token instead), experts by grouped_mm or eager;
2. words and images by turns, next-token and flow loss: ours (symbiotic), shielded or not, against transfusion-pytorch.
`--compile`: the models that can be, compiled layer by layer (inductor), as further rows. Memory, which `--quick` leaves
out unless `--memory` asks: the peak of two steps of ours and of the dense model, with and without activation
checkpointing, each in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from harness import SIZES, Contender, Size, chosen, compared, installed, missing, parser, race, report
from sized import PATCH, packed, unified
from torch import Tensor

from symbiotic.objectives.total import term_weights, training_terms
from symbiotic.schema import Objective


def step_of(parameters: Any, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """One optimiser step on this loss, with fused AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def act() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return act


def ours(
    size: Size, system: str, text_only: bool, level: float = 0.0, compiled: bool = False, again: bool = False
) -> Any:
    """level: of the shield. again: activation checkpointing."""
    model, batch, objective = unified(size, system), packed(size, text_only=text_only), Objective()
    model.recompute = again
    shield, weights = torch.tensor(level), term_weights(objective)
    if compiled:
        for block in model.blocks:
            block.compile()

    def loss() -> Tensor:
        _, terms = training_terms(model, batch, objective, shield)
        return sum((weights[name] * term for name, term in terms.items()), torch.zeros(()))

    return step_of(model.parameters(), loss)


def theirs(size: Size, family: str, how: str, compiled: bool = False) -> Contender:
    """A causal language model of transformers on the same words; balance loss included."""
    name = f"transformers {family} {how}" + (" compiled" if compiled else "")
    if not installed("transformers"):
        return missing(name, "transformers")
    import transformers

    shared = family == "Qwen2Moe"
    config = getattr(transformers, f"{family}Config")(
        vocab_size=size.vocab, hidden_size=size.d, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.heads, head_dim=size.head, num_experts=size.experts,
        num_experts_per_tok=size.top_k + (not shared), moe_intermediate_size=size.f, intermediate_size=size.f,
        shared_expert_intermediate_size=size.f, norm_topk_prob=True, output_router_logits=True, use_cache=False,
        decoder_sparse_step=1, mlp_only_layers=[], max_position_embeddings=size.row, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config._experts_implementation = how
    model: Any = getattr(transformers, f"{family}ForCausalLM")(config).train()
    tokens = packed(size, text_only=True).tokens
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return Contender(name, step_of(model.parameters(), lambda: model(input_ids=tokens, labels=tokens).loss))


def transfusion(size: Size) -> Contender:
    """Its transformer is dense; the hidden width is that of k + 1 experts. Release 0.20 needs its U-net skips."""
    if not installed("transfusion_pytorch"):
        return missing("transfusion-pytorch", "transfusion-pytorch")
    from transfusion_pytorch import Transfusion

    widening = 1.5 * (size.top_k + 1) * size.f / size.d
    inner = {"dim": size.d, "depth": size.layers, "dim_head": size.head, "heads": size.heads,
             "ff_expansion_factor": widening}  # fmt: skip
    model = Transfusion(num_text_tokens=size.vocab, dim_latent=PATCH, modality_default_shape=(4,), transformer=inner)
    words = size.row // 2

    def loss() -> Tensor:
        rows = size.tokens // size.row
        samples = [
            [torch.randint(size.vocab, (words,)), (0, torch.randn(size.row - words, PATCH))] for _ in range(rows)
        ]
        return model(samples)

    return Contender("transfusion-pytorch", step_of(model.parameters(), loss))


def words(size: Size, compiled: bool) -> list[Contender]:
    families = [("Qwen2Moe", "grouped_mm"), ("Olmoe", "grouped_mm"), ("Qwen3Moe", "grouped_mm"), ("Qwen2Moe", "eager")]
    if size.experts > 32:  # memory for so many models at once
        families = families[:1]
    found = [
        Contender("dense", ours(size, "dense", True)),
        Contender("ours (standard_moe)", ours(size, "standard_moe", True)),
        *(theirs(size, *family) for family in families),
    ]
    if compiled:
        found += [
            Contender("dense compiled", ours(size, "dense", True, compiled=True)),
            Contender("ours compiled", ours(size, "standard_moe", True, compiled=True)),
            theirs(size, "Qwen2Moe", "grouped_mm", compiled=True),
        ]
    return found


def mixed(size: Size) -> list[Contender]:
    return [
        Contender("dense", ours(size, "dense", False)),
        Contender("ours (symbiotic), not shielded", ours(size, "symbiotic", False)),
        Contender("ours (symbiotic), shielded", ours(size, "symbiotic", False, level=1.0)),
        transfusion(size),
    ]


MEMORY = {
    "dense": lambda size: ours(size, "dense", False),
    "ours (symbiotic)": lambda size: ours(size, "symbiotic", False),
    "ours, recomputed": lambda size: ours(size, "symbiotic", False, again=True),
    "dense, recomputed": lambda size: ours(size, "dense", False, again=True),
}


def resident() -> int:
    """Peak MB of this program; `ru_maxrss` begins at what the process that started it had."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) // 1024


def memory(size: Size) -> list[dict[str, Any]]:
    """Peak resident MB of two steps above that of the imports; parameters, gradients and optimiser states in it."""
    rows = []
    for name in MEMORY:
        asked = [sys.executable, __file__, "--sizes", size.name, "--memory-of", name]
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()
        rows.append({"contender": name, "parameters, M": told[1], "peak, MB": told[0],
                     "without parameters and states, MB": f"{int(told[0]) - 16 * float(told[1]):.0f}"})  # fmt: skip
    return rows


def peak_of(size: Size, name: str) -> None:
    before = resident()
    act = MEMORY[name](size)
    act()
    act()
    params = sum(p.numel() for p in unified(size, "dense" if name.startswith("dense") else "symbiotic").parameters())
    print(resident() - before, f"{params / 1e6:.1f}")


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__, ("tiny", "small"))
    made.add_argument("--compile", action="store_true")
    made.add_argument("--memory", action="store_true")
    made.add_argument("--memory-of", choices=list(MEMORY), help="only this one's peak, in this process")
    asked = chosen(made, arguments)
    sizes, tables, seconds = [SIZES[name] for name in asked.sizes], {}, {}
    if asked.memory_of:
        return peak_of(sizes[0], asked.memory_of)
    for size in sizes:
        for title, group in (("words", words(size, asked.compile)), ("words and images", mixed(size))):
            found = race(group, asked.rounds, asked.clock)
            tables[f"{size.name}, {title}: {size}"] = compared(found, "dense")
            seconds[f"{size.name} {title}"] = {c.name: c.seconds for c in found}
        if asked.memory or not asked.quick:
            tables[f"{size.name}, memory"] = memory(size)
    report("training_step: the whole training step", tables, asked.out, seconds)
    return None


if __name__ == "__main__":
    main()
