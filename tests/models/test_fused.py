"""The passes written by hand: values and gradients are those of the plain formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional as F

from symbiotic.models.attention import rope_angles
from symbiotic.models.fused import RMSNorm, combine, gather, rotate, scale_gradient, swiglu


def drawn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def same(one: Callable[..., Tensor], other: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Values, and the gradients of a weighted sum of them."""
    made = []
    for act in (one, other):
        y = act(*inputs)
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        made.append([y, *torch.autograd.grad((y * weights).sum(), inputs)])
    for found, expected in zip(*made, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(5, 8), (3, 2, 8)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    norm, plain = (kind(8, eps=0.1, dtype=torch.float64) for kind in (RMSNorm, nn.RMSNorm))
    for module in (norm, plain):
        module.weight.data.copy_(torch.linspace(0.5, 2, 8))
    x = drawn(*shape)
    same(norm, plain, x)
    assert norm.state_dict().keys() == plain.state_dict().keys()
    grads = [torch.autograd.grad(module(x).square().sum(), module.weight)[0] for module in (norm, plain)]
    torch.testing.assert_close(*grads)


def test_a_norm_that_is_frozen_or_read_only_has_the_other_gradient() -> None:
    norm, x = RMSNorm(8, eps=1e-6), drawn(5, 8, dtype=torch.float32)
    norm(x.detach()).sum().backward()
    assert norm.weight.grad is not None
    norm.requires_grad_(False)
    assert torch.autograd.grad(norm(x).sum(), x)[0].abs().max() > 0


def test_swiglu() -> None:
    same(swiglu, lambda x: F.silu(x[:, :6]) * x[:, 6:], drawn(5, 12))


def test_gathering_and_combining_are_indexing_and_a_sum() -> None:
    """Seven tokens of two assignments each, sorted by expert."""
    experts = torch.randint(4, (14,), generator=torch.Generator().manual_seed(0))
    order = experts.sort(stable=True).indices
    place = order.argsort()
    same(lambda x: gather(x, order, place), lambda x: x[order // 2], drawn(7, 3))
    plain = lambda y, gates: (y[place].view(7, 2, 3) * gates[..., None]).sum(1)  # noqa: E731
    same(lambda y, gates: combine(y, gates, order, place), plain, drawn(14, 3), drawn(7, 2))
    assert gradcheck(lambda y, gates: combine(y, gates, order, place), (drawn(14, 3), drawn(7, 2)))


def test_outputs_in_bfloat16_are_combined_in_the_precision_of_the_gates() -> None:
    order = torch.randperm(14, generator=torch.Generator().manual_seed(1))
    place, y = order.argsort(), torch.randn(14, 3).bfloat16().requires_grad_()
    gates = torch.rand(7, 2).requires_grad_()
    by_hand = (y.float()[place].view(7, 2, 3) * gates[..., None]).sum(1)
    made = combine(y, gates, order, place)
    assert made.dtype == torch.float32
    assert torch.equal(made, by_hand)
    found, expected = (torch.autograd.grad(out.square().sum(), (y, gates)) for out in (made, by_hand))
    torch.testing.assert_close(found, expected)


def test_the_scale_is_of_the_gradient_alone() -> None:
    x, scale = drawn(4, 3), torch.tensor([[0.0], [0.1], [1.0], [2.0]], dtype=torch.float64)
    assert torch.equal(scale_gradient(x, scale), x)
    (found,) = torch.autograd.grad(scale_gradient(x, scale).sum(), x)
    assert torch.equal(found, scale.expand(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_queries_and_keys_have_the_products_of_the_formula(dtype: torch.dtype) -> None:
    """(q R_i) . (k R_j), R the rotation of RoFormer in the convention of Llama: pairs (i, i + h/2)."""
    angles = rope_angles(torch.tensor([0, 3, 11]), 8, 100.0)
    cos, sin = (torch.cat([a, a], -1) for a in angles)

    def formula(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin

    def products(turn: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda q, k: torch.einsum("ihd,jhd->hij", turn(q).float(), turn(k).float())

    q, k = drawn(3, 2, 8, dtype=dtype), (2 * drawn(3, 2, 8, dtype=dtype)).detach().requires_grad_()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    turned, plain = (products(turn)(q, k) for turn in (lambda x: rotate(x, angles), formula))
    torch.testing.assert_close(turned, plain, **tolerance)
    grads = [torch.autograd.grad(made.square().sum(), (q, k)) for made in (turned, plain)]
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance["rtol"], atol=tolerance["atol"] * 20)
