"""RMSNorm (Zhang & Sennrich 2019) that keeps its input as it is, and not an fp32 copy.

On a card torch has a kernel for it; on a CPU torch's is composed of nine operators, so the five
that it takes are here.
"""

from functools import partial

import torch
from torch.linalg import vecdot, vector_norm

from llama_lora.hardware.device import without_autocast

EPS = "variance_epsilon", "eps"  # names of what is added


class OnCpu(torch.autograd.Function):
    """x / sqrt(mean(x²) + eps) · weight, computed in fp32; the weight is frozen."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        whole = x.float()
        scale = vector_norm(whole, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return _times(x, scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, upstream):
        x, weight, scale = ctx.saved_tensors
        normal, upstream = _times(x, scale), _times(upstream, weight)
        common = vecdot(upstream, normal, dim=-1)[..., None].div_(-x.shape[-1])
        return upstream.addcmul_(normal, common).mul_(scale).to(x.dtype), None, None


def _times(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """A product in fp32, in memory of its own."""
    return x * factor if x.dtype == torch.float32 else x.float().mul_(factor)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm over the last dimension of `x`, in its shape and dtype."""
    return OnCpu.apply(x, weight, eps) if x.device.type == "cpu" else _of_torch(x, weight, eps)


def _of_torch(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    # Autocast would cast the input, keep it in fp32, and return fp32.
    with without_autocast(x.device.type):
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def set_up(model) -> None:
    """Let the norms of `model` compute so that are the same by value: Llama's, and most others'."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and (eps := _eps(module)) is not None:
            weight = getattr(module, "weight", None)
            if weight is not None and not weight.requires_grad and _is_same(module, eps):
                module.forward = partial(_forward, module, eps)


def _forward(module, eps: float, x: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, module.weight, eps)


def _eps(module) -> float | None:
    return next((getattr(module, name) for name in EPS if hasattr(module, name)), None)


@torch.no_grad()
def _is_same(module, eps: float) -> bool:
    """Whether `rms_norm` gives what `module` does, but for rounding, for small numbers as well."""
    weight = module.weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, *weight.shape, generator=generator) * torch.tensor([[1.0], [eps**0.5]])
    x = x.to(weight.device, weight.dtype)
    own, ours = type(module).forward(module, x), rms_norm(x, weight, eps)
    if own.dtype != ours.dtype or own.shape != ours.shape:
        return False
    rounding = max(1e-6, 2 * torch.finfo(weight.dtype).eps) * own.abs()
    return bool(((own - ours).abs() <= rounding).all())  # so that NaN fails, too
