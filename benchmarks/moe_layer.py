"""(a) One MoE layer, forward and backward: `python benchmarks/moe_layer.py [--sizes tiny small medium] [--quick]`.

Against the products of its experts alone, a dense FFN of equal FLOPs, transformers (eager and grouped_mm), a loop over
experts, padding with `bmm`, and st-moe-pytorch (top-2 with capacity 1.25: it drops tokens, and its GEGLU has biases).
All have the router, top k renormalised, and SwiGLU experts; ours also counts, and makes the probabilities of the
balance loss and the z-loss. `share of mm`: the operations of the experts' products in its time, over the speed of
`torch.mm` on 1024 x 1024.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import SIZES, Contender, Size, backward, chosen, compared, installed, missing, parser, race, report
from sized import model_of_size, packed, system_of
from torch import Tensor, nn

from symbiotic.models.fused import swiglu
from symbiotic.models.moe import MoE, SharedExpert
from symbiotic.models.places import Places


def expert_flops(size: Size) -> int:
    """Multiplications and additions of the experts' products, forward and backward."""
    return 3 * 2 * size.tokens * size.top_k * 3 * size.d * size.f


def filled(module: nn.Module, std: float = 0.02) -> Any:
    """Its parameters drawn anew: several are created empty."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, std)
    return module


def routed(x_ND: Tensor, router_DE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and experts [N, K] of the plain references."""
    gates, experts = (x_ND @ router_DE).softmax(-1).topk(top_k)
    return gates / gates.sum(-1, keepdim=True), experts


def loop(x_ND: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, top_k: int) -> Tensor:
    """Expert by expert: find its tokens, gather, compute, add."""
    gates_NK, experts_NK = routed(x_ND, router, top_k)
    y_ND = torch.zeros_like(x_ND)
    for expert in range(len(w_in)):
        token, place = (experts_NK == expert).nonzero(as_tuple=True)
        if len(token):
            out = swiglu(x_ND[token] @ w_in[expert]) @ w_out[expert]
            y_ND = y_ND.index_add(0, token, out * gates_NK[token, place, None])
    return y_ND


def padded(x_ND: Tensor, router: Tensor, w_in: Tensor, w_out: Tensor, top_k: int) -> Tensor:
    """Every expert's tokens in a block as long as the fullest one's, one `bmm`."""
    gates_NK, experts_NK = routed(x_ND, router, top_k)
    sorted_A, order_A = experts_NK.reshape(-1).sort(stable=True)
    counts_E = torch.bincount(sorted_A, minlength=len(w_in))
    place_A = torch.arange(len(sorted_A)) - (counts_E.cumsum(0) - counts_E)[sorted_A]
    slot_A = sorted_A * int(counts_E.max()) + place_A
    blocks = x_ND.new_zeros(len(w_in) * int(counts_E.max()), x_ND.shape[1]).index_copy(
        0, slot_A, x_ND[order_A // top_k]
    )
    out = torch.bmm(swiglu(torch.bmm(blocks.view(len(w_in), -1, x_ND.shape[1]), w_in)), w_out)
    gated = out.flatten(0, 1)[slot_A] * gates_NK.reshape(-1)[order_A, None]
    return torch.zeros_like(x_ND).index_add(0, order_A // top_k, gated)


def products(x_AD: Tensor, w_in: Tensor, w_out: Tensor) -> Callable[[], None]:
    """The nine products of the experts alone, on equal shares of rows: what nothing can beat."""
    grad_in, grad_out = torch.randn(len(x_AD), w_in.shape[2]), torch.randn_like(x_AD)
    rows = [r.tolist() for r in torch.arange(len(x_AD)).tensor_split(len(w_in))]
    spans = [(r[0], r[-1] + 1) for r in rows if r]

    def act() -> None:
        for expert, (a, b) in enumerate(spans):
            x, half = x_AD[a:b], grad_in[a:b, : w_out.shape[1]]
            torch.mm(x, w_in[expert]), torch.mm(half, w_out[expert])
            torch.mm(grad_out[a:b], w_out[expert].T), torch.mm(half.T, grad_out[a:b])
            torch.mm(grad_in[a:b], w_in[expert].T), torch.mm(x.T, grad_in[a:b])

    return act


def ours(size: Size, system: str, x_ND: Tensor) -> Contender:
    layer = filled(MoE(model_of_size(size), system_of(system, shared=False)))
    places = Places(packed(size), None)
    return Contender(f"ours ({system})", both(layer, x_ND, lambda: layer(x_ND, places)[0]))


def both(module: nn.Module, x_ND: Tensor, act: Callable[[], Tensor]) -> Any:
    return backward(act, [x_ND, *module.parameters()])


def theirs(size: Size, x_ND: Tensor, how: str) -> Contender:
    """transformers' Qwen3-MoE block, experts `eager` or `grouped_mm`."""
    name = f"transformers {how}"
    if not installed("transformers"):
        return missing(name, "transformers")
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=size.d, moe_intermediate_size=size.f, num_experts=size.experts, num_experts_per_tok=size.top_k,
        norm_topk_prob=True,
    )  # fmt: skip
    config._experts_implementation = how
    block = filled(Qwen3MoeSparseMoeBlock(config))
    return Contender(name, both(block, x_ND, lambda: block(x_ND[None])[0]))


def st_moe(size: Size, x_ND: Tensor) -> Contender:
    if not installed("st_moe_pytorch"):
        return missing("st-moe-pytorch", "st-moe-pytorch")
    if size.tokens * size.top_k * size.experts > 2**19:
        return Contender("st-moe-pytorch", None, "its dispatch tensors [tokens, experts, capacity] do not fit")
    from st_moe_pytorch import MoE as Theirs

    layer = Theirs(size.d, size.experts, expert_hidden_mult=size.f * 1.5 / size.d, gating_top_n=size.top_k)
    rows = x_ND.detach().unflatten(0, (-1, min(size.row, size.tokens))).requires_grad_()
    return Contender("st-moe-pytorch", both(layer, rows, lambda: layer(rows).outputs))


def contenders(size: Size) -> list[Contender]:
    x_ND = torch.randn(size.tokens, size.d, requires_grad=True)
    dense = filled(SharedExpert(size.d, size.top_k * size.f))
    w_in, w_out = torch.randn(size.experts, size.d, 2 * size.f), torch.randn(size.experts, size.f, size.d)
    router = torch.randn(size.d, size.experts)
    weights = [(0.02 * w).requires_grad_() for w in (router, w_in, w_out)]
    square = torch.randn(1024, 1024)
    x_AD = x_ND.detach().repeat(size.top_k, 1)
    return [
        Contender("dense FFN", both(dense, x_ND, lambda: dense(x_ND))),
        ours(size, "standard_moe", x_ND),
        ours(size, "symbiotic", x_ND),
        Contender("products alone", products(x_AD, w_in, w_out)),
        theirs(size, x_ND, "grouped_mm"),
        theirs(size, x_ND, "eager"),
        Contender("loop over experts", backward(lambda: loop(x_ND, *weights, size.top_k), [x_ND, *weights])),
        Contender("padded bmm", backward(lambda: padded(x_ND, *weights, size.top_k), [x_ND, *weights])),
        st_moe(size, x_ND),
        Contender("torch.mm 1024", lambda: square @ square),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    asked = chosen(parser(__doc__), arguments)
    tables, seconds = {}, {}
    for size in (SIZES[name] for name in asked.sizes):
        found = race(contenders(size), asked.rounds, asked.clock)
        speed = 2 * 1024**3 / found[-1].median
        rows = compared(found[:-1], "dense FFN")
        for row, contender in zip(rows, found, strict=False):
            row["share of mm"] = f"{expert_flops(size) / contender.median / speed:.2f}" if contender.seconds else "–"
        tables[f"{size.name}: {size}"] = rows
        seconds[size.name] = {c.name: c.seconds for c in found}
    report("moe_layer: one MoE layer, forward and backward", tables, asked.out, seconds)


if __name__ == "__main__":
    main()
