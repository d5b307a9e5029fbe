"""(b) Attention under our mask, forward and backward: `python benchmarks/attention.py [--quick]`.

Rows of two and of four packed samples, words and images in them; queries, keys and values are given. `causal, each
sample` is the lower bound: causal attention with nothing said about images, the samples cut out beforehand. The rest is
what can be done about the same rows: ours, one call a row with a boolean or a float mask, the formula (`math`), and
flex_attention compiled (`--flex`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from harness import SIZES, Contender, Size, backward, chosen, compared, parser, race, report
from sized import model_of_size, packed, system_of
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from symbiotic.models.attention import Attention
from symbiotic.models.places import Places, additive, attention_mask


def flex(q: Tensor, k: Tensor, v: Tensor, size: Size, samples: int) -> Callable[[], Tensor]:
    """flex_attention with the mask as a function, compiled; forward only on the CPU (torch 2.15)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    batch = packed(size, samples)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same_image = (batch.span[b, i] == batch.span[b, j]) & (batch.span[b, i] >= 0)
        return (batch.segment[b, i] == batch.segment[b, j]) & ((i >= j) | same_image)

    blocks = create_block_mask(visible, len(q), None, size.row, size.row, device="cpu")
    compiled = torch.compile(flex_attention)
    detached = [x.detach() for x in (q, k, v)]
    return lambda: compiled(*detached, block_mask=blocks)


def contenders(size: Size, samples: int, with_flex: bool) -> list[Contender]:
    flat = [torch.randn(size.tokens, size.heads, size.head, requires_grad=True) for _ in range(3)]
    places = Places(packed(size, samples), None)
    layer = Attention(model_of_size(size), system_of("standard_moe"))
    q, k, v = (x.unflatten(0, (-1, size.row)).transpose(1, 2) for x in flat)
    alone = [x.unflatten(0, (-1, size.row // samples)).transpose(1, 2) for x in flat]
    mask = attention_mask(packed(size, samples))

    def math() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attend(q, k, v, attn_mask=mask)

    acts = {
        "causal, each sample": lambda: attend(*alone, is_causal=True),
        "ours": lambda: layer.softmax(*flat, places),
        "boolean mask": lambda: attend(q, k, v, attn_mask=mask),
        "float mask, made anew": lambda: attend(q, k, v, attn_mask=additive(mask)),
        "causal rows": lambda: attend(q, k, v, is_causal=True),
        "math": math,
    }
    found = [Contender(name, backward(act, flat)) for name, act in acts.items()]
    if with_flex:
        found.append(Contender("flex_attention, forward only", flex(q, k, v, size, samples)))
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    made = parser(__doc__)
    made.add_argument("--flex", action="store_true")
    asked = chosen(made, arguments)
    tables, seconds = {}, {}
    for size in (SIZES[name] for name in asked.sizes):
        for samples in (2, 4):
            found = race(contenders(size, samples, asked.flex), asked.rounds, asked.clock)
            title = f"{size.name}: rows of {size.row} tokens, {samples} samples each, {size.heads} heads of {size.head}"
            tables[title] = compared(found, "causal, each sample")
            seconds[title] = {c.name: c.seconds for c in found}
    report("attention: under our mask, forward and backward", tables, asked.out, seconds)


if __name__ == "__main__":
    main()
