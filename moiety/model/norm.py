"""Norms of the residual stream: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450).

RMSNorm has a backward of its own: torch's is made of a dozen separate passes on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moiety.backends import cpu_attention
from moiety.config import ModelConfig

__all__ = ["LayerNorm", "Norm", "RMSNorm", "norm_of", "unit_length"]


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight_D)
        ctx.eps = eps
        return F.rms_norm(x, weight_D.shape, weight_D, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight_D = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        x_ND, grad_ND = x.reshape(-1, x.shape[-1]).to(wide), grad.reshape(-1, x.shape[-1]).to(wide)
        inverse_N = torch.linalg.vector_norm(x_ND, dim=-1).square().div_(x.shape[-1]).add_(ctx.eps).rsqrt_()
        normed_ND = x_ND * inverse_N[:, None]
        product_ND = grad_ND * normed_ND
        grad_weight = product_ND.sum(0)
        shift_N = product_ND @ weight_D.to(wide) / x.shape[-1]
        grad_x = (grad_ND * weight_D.to(wide)).sub_(normed_ND.mul_(shift_N[:, None])).mul_(inverse_N[:, None])
        return grad_x.view(x.shape).to(x.dtype), grad_weight.to(weight_D.dtype), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis.

    Args:
        width: Size of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        if cpu_attention.norms(
            x, self.weight
        ):  # one pass: at one token torch's own costs as much as a matrix
            return cpu_attention.rms_norm(x, self.weight, self.eps)
        y: Tensor = _RMSNorm.apply(x, self.weight.to(x.dtype), self.eps)
        return y


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias, over the last axis.

    Args:
        width: Size of the last axis.
        eps: Added to the variance.
        bias: Have a bias.
    """

    def __init__(self, width: int, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.layer_norm(x, self.weight.shape, self.weight.to(x.dtype), bias, self.eps).to(x.dtype)


Norm = RMSNorm | LayerNorm


def norm_of(config: ModelConfig) -> Norm:
    """A norm of the residual stream, as the model has them."""
    if config.norm == "rms":
        return RMSNorm(config.d_model, config.norm_eps)
    return LayerNorm(config.d_model, config.norm_eps, config.norm_bias)


def unit_length(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, without weights; in float32 at least, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.rms_norm(wide, x.shape[-1:], None, eps).to(x.dtype)
