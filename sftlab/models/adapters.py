"""LoRA on a CPU in fewer passes over memory: PEFT's layers, with the low-rank branch as one operation.

PEFT computes dropout, A, B, the scaling and the sum one by one, and under autocast casts in between; each is a pass over all
activations, forward and backward. Here the branch is two products and a sum, and dropout draws 16 bits a number.

    python benchmarks/train.py --cases tiny-base
"""

import functools

import torch
from peft.tuners.lora.layer import Linear, LoraLayer


class Branch(torch.autograd.Function):
    """result + scale * dropout(x) Aᵀ Bᵀ, the low-rank update of Hu et al. 2021 (arXiv:2106.09685, section 4.1).

    result: (tokens, out), x: (tokens, in), a: (r, in), b: (out, r), of any dtype; computed in result's. dropout: 0 to 1, the
    probability that a number of x is left out. Returns (tokens, out), as a tensor of its own.
    """

    @staticmethod
    def forward(ctx, result, x, a, b, scale, dropout):
        dtype, kept = result.dtype, None
        ctx.dtypes = x.dtype, a.dtype, b.dtype
        x, a, b = x.to(dtype), a.to(dtype), b.to(dtype)
        if dropout:
            kept = draw_kept(x.shape, dropout)
            x, scale = x * kept, scale / (1 - dropout)
        inner = x @ a.t()
        ctx.save_for_backward(x, a, b, inner, kept)
        ctx.scale = scale
        return torch.addmm(result, inner, b.t(), alpha=scale)

    @staticmethod
    def backward(ctx, grad):
        x, a, b, inner, kept = ctx.saved_tensors
        grad_inner, grad_x = (grad @ b).mul_(ctx.scale), None
        if ctx.needs_input_grad[1]:
            grad_x = grad_inner @ a
            grad_x = (grad_x if kept is None else grad_x.mul_(kept)).to(ctx.dtypes[0])
        grad_a = (grad_inner.t() @ x).to(ctx.dtypes[1])
        grad_b = (grad.t() @ inner).to(ctx.dtypes[2]).mul_(ctx.scale)
        return grad, grad_x, grad_a, grad_b, None, None


def draw_kept(shape, dropout: float) -> torch.Tensor:
    """Which numbers dropout keeps: a bool tensor, each False with the probability `dropout`, to one part in 65,536.

    torch's own draws 32 bits for each number, on one core.
    """
    count = shape[0] * shape[1]
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)
    return (bits.view(torch.int16)[:count] >= round(dropout * 2**16) - 2**15).view(shape)


class FastLinear(Linear):
    """PEFT's LoRA layer with `Branch`; whatever is not plain LoRA with one adapter goes PEFT's way."""

    def forward(self, x, *args, **kwargs):
        name, *more = self.active_adapters or [None]
        plain = not (self.disable_adapters or self.merged or more or args or kwargs)
        if not plain or name not in self.lora_A or name in self.lora_variant or self.lora_B[name].bias is not None:
            return super().forward(x, *args, **kwargs)
        a, b, dropout = self.lora_A[name].weight, self.lora_B[name].weight, self.lora_dropout[name]
        if x.dtype != a.dtype and not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        result = self.base_layer(x)
        p = dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0
        flat, inputs = result.reshape(-1, result.shape[-1]), x.reshape(-1, x.shape[-1])
        return Branch.apply(flat, inputs, a, b, self.scaling[name], p).view(result.shape)


def prepare(model, bf16: bool, cpu: bool) -> None:
    """Let a model's adapters compute as the lab trains them: on a CPU in fewer passes, elsewhere without needless casts.

    bf16: whether it trains under bfloat16 autocast. PEFT 0.21 casts each adapter's input to the adapter's float32, autocast
    casts it back for the product, and the copy is kept for the backward pass where dropout keeps its input. The numbers are
    the same without it. Outside autocast, where a model is asked after a run, the cast is needed, and made; so it is with
    DoRA, which computes the lengths of its weights in the precision of the input.
    """
    for part in model.modules():
        if cpu and type(part) is Linear:
            part.__class__ = FastLinear
        if bf16 and isinstance(part, LoraLayer) and not part.lora_variant:
            part._cast_input_dtype = functools.partial(cast_outside_autocast, part)


def cast_outside_autocast(part, x, dtype):
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(part)._cast_input_dtype(part, x, dtype)
