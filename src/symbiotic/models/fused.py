"""Passes over activations that autograd would make several of: written by hand, with as few as they need.

Each computes what the formula in its docstring says, forward and backward, and keeps nothing but its inputs for the
way back. Inside a compiled block the compiler does that for SwiGLU and rotation; the plain formulas stand there.
Suffixes: N tokens, D width, F expert hidden, K of top-k, A = N*K assignments, H heads, h head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """`x / sqrt(mean(x^2) + eps) * w`. On the CPU torch (2.15) goes back through it in a dozen passes."""

    def forward(self, x: Tensor) -> Tensor:
        plain = x.device.type != "cpu" or x.dtype != self.weight.dtype
        return super().forward(x) if plain else _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(Function):
    """With r = 1 / sqrt(mean(x^2) + eps): dx = r (g w - x r^2 mean(g w x)), dw = sum of g x r over the tokens."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, eps: float) -> Tensor:
        r = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, r, w)
        return (x * r).mul_(w)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, r, w = ctx.saved_tensors
        by_w = (g * x).mul_(r)
        along = (by_w @ w)[..., None].mul_(r).div_(-x.shape[-1])
        by_x = (x * along).addcmul_(g, w).mul_(r) if ctx.needs_input_grad[0] else None
        return by_x, by_w.flatten(0, -2).sum(0), None


def swiglu(gate_up: Tensor) -> Tensor:
    """[..., 2F] -> [..., F]: `silu(gate) * up`, gate and up fused in one product."""
    if torch.compiler.is_compiling():
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up
    return _SwiGLU.apply(gate_up)


class _SwiGLU(Function):
    """d up = g silu(gate), d gate = g up silu'(gate), both written where they belong."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        by_both = torch.empty_like(gate_up)
        by_gate, by_up = by_both.chunk(2, dim=-1)
        torch.mul(F.silu(gate), g, out=by_up)
        torch.ops.aten.silu_backward.grad_input(g * up, gate, grad_input=by_gate)
        return by_both


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """x, with its gradient multiplied by `scale`: `sg(x) + c (x - sg(x))` (Symbiotic-MoE).

    It stands in the forward graph and per token, because Adam is scale-free: scaling `.grad` afterwards is not
    the same thing. `scale` is a tensor, so that a change of phase changes no graph.
    """
    return _ScaleGradient.apply(x, scale)


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return g * scale.to(g.dtype), None


def gather(x_ND: Tensor, order_A: Tensor, place_A: Tensor) -> Tensor:
    """[A, D]: the token of each assignment, in the order of `order_A`, whose inverse is `place_A`.

    The gradient is gathered back and summed over K, in the place of a scatter-add.
    """
    return _Gather.apply(x_ND, order_A, place_A)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_A: Tensor, place_A: Tensor) -> Tensor:
        ctx.save_for_backward(place_A)
        ctx.top_k = len(order_A) // len(x_ND)
        return x_ND.index_select(0, order_A // ctx.top_k)

    @staticmethod
    def backward(ctx: Any, g_AD: Tensor) -> tuple[Tensor, None, None]:
        (place_A,) = ctx.saved_tensors
        return g_AD.index_select(0, place_A).unflatten(0, (-1, ctx.top_k)).sum(1), None, None


def combine(y_AD: Tensor, gates_NK: Tensor, order_A: Tensor, place_A: Tensor) -> Tensor:
    """[N, D]: the sum over K, in the order of the gates, of gates times outputs; arguments as in `gather`."""
    return _Combine.apply(y_AD, gates_NK, order_A, place_A)


class _Combine(Function):
    @staticmethod
    def forward(ctx: Any, y_AD: Tensor, gates_NK: Tensor, order_A: Tensor, place_A: Tensor) -> Tensor:
        ctx.save_for_backward(y_AD, gates_NK, order_A, place_A)
        return (y_AD.index_select(0, place_A).view(*gates_NK.shape, -1) * gates_NK[..., None]).sum(1)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_AD, gates_NK, order_A, place_A = ctx.saved_tensors
        g_AD = g_ND.index_select(0, order_A // gates_NK.shape[1])
        by_gate_A = torch.linalg.vecdot(y_AD.to(g_AD.dtype), g_AD)
        by_gates_NK = by_gate_A.index_select(0, place_A).view_as(gates_NK)
        return g_AD.mul_(gates_NK.reshape(-1, 1).index_select(0, order_A)), by_gates_NK, None, None


def rotate(x_NHh: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + h/2) of each head, the convention of the Llama and Qwen families; cos, sin [N, 1, h/2].

    What comes out has the two of a pair beside each other: queries and keys are rotated alike, and their products do
    not know the order of the head's numbers. So it is one product of complex numbers.
    """
    cos, sin = angles
    first, second = x_NHh.chunk(2, dim=-1)
    if x_NHh.dtype == torch.float32 and not torch.compiler.is_compiling():  # compilers make nothing of complex numbers
        return _Rotate.apply(x_NHh, torch.complex(cos, sin))
    cos, sin = cos.to(x_NHh.dtype), sin.to(x_NHh.dtype)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x_NHh: Tensor, turn_N1h: Tensor) -> Tensor:
        ctx.save_for_backward(turn_N1h)
        return torch.view_as_real(torch.complex(*x_NHh.chunk(2, dim=-1)).mul_(turn_N1h)).flatten(-2)

    @staticmethod
    def backward(ctx: Any, g_NHh: Tensor) -> tuple[Tensor, None]:
        (turn_N1h,) = ctx.saved_tensors
        by_x = torch.view_as_complex(g_NHh.unflatten(-1, (-1, 2)).contiguous()) * turn_N1h.conj()
        return torch.cat([by_x.real, by_x.imag], dim=-1), None
