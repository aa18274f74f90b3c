"""What stands in for kernels when a step is run on fake tensors: it allocates and keeps what they do.

Read off bitsandbytes 0.50 (autograd/_functions.py) and TRL 1.16 (kernels/chunked_logprob.py).
"""

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch.overrides import TorchFunctionMode

from sftlab.models.loss import AnswerLoss

TILE = (4096, 32768)  # tokens and vocabulary of the logits that TRL holds at a time


class QuantisedProduct(torch.autograd.Function):
    """x times a weight that is dequantized to x's dtype for the moment; in 8 bits x is kept, though no gradient asks it."""

    @staticmethod
    def forward(ctx, x, shape, keeps_input):
        ctx.shape, ctx.kept = shape, x if keeps_input else None
        return x @ torch.empty(shape, dtype=x.dtype).t()

    @staticmethod
    def backward(ctx, grad):
        return grad @ torch.empty(ctx.shape, dtype=grad.dtype), None, None


class TiledHead(torch.autograd.Function):
    """The loss as TRL computes it on a GPU: logits in tiles, twice, and gradients summed up in float32."""

    @staticmethod
    def forward(ctx, hidden, weight):
        ctx.compute = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        ctx.save_for_backward(hidden, weight)
        make_tile(hidden, weight, ctx.compute)
        return hidden.new_zeros(())

    @staticmethod
    def backward(ctx, grad):
        parts = ctx.saved_tensors
        needed = zip(parts, ctx.needs_input_grad, strict=True)
        grads = [torch.zeros(part.shape, dtype=torch.float32) if wanted else None for part, wanted in needed]
        make_tile(*parts, ctx.compute)
        return tuple(None if g is None else g.to(part.dtype) for g, part in zip(grads, parts, strict=True))


def make_tile(hidden, weight, dtype) -> None:
    """Allocate a tile of logits and the output layer's part of it at the same time, and let go of both."""
    tile = torch.empty(min(len(hidden), TILE[0]), TILE[1], dtype=dtype)
    part = weight[: TILE[1]].to(dtype)
    del tile, part


class OnGpu(TorchFunctionMode):
    """In a forward pass: dropout keeps a byte per number, in attention none, autocast takes powers in float32."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return drop(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}
        if func is torch.pow and torch.is_tensor(args[0]) and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return func(args[0].float(), *args[1:], **kwargs)
        return func(*args, **kwargs)


def drop(x, p=0.5, training=True, inplace=False):
    return torch.native_dropout(x, p, True)[0] if training and p else x


def head_loss(causal, hidden, gpu: bool, trained: int):
    """The loss of so many of the positions, as it is computed on a GPU or on a CPU. hidden: (batch, length, width)."""
    head = causal.get_output_embeddings()
    flat = hidden.reshape(-1, hidden.shape[-1])
    flat = flat[torch.arange(max(1, min(trained, len(flat))))]
    if gpu:
        return TiledHead.apply(flat, head.weight)
    targets = torch.zeros(len(flat), dtype=torch.long)
    return AnswerLoss.apply(flat, head.weight, getattr(head, "bias", None), targets)[0]


def make_fake(model, config) -> None:
    """Give every weight and buffer of a model on the meta device a fake tensor on the CPU, inside torch's FakeTensorMode.

    The layers of bitsandbytes stay empty, and are stood in for.
    """
    made = {}
    for part in model.modules():
        if isinstance(part, Linear4bit | Linear8bitLt):
            stand_in(part, config)
            continue
        for name, weight in part._parameters.items():
            if weight is not None:
                if weight not in made:
                    empty = torch.empty(weight.shape, dtype=weight.dtype)
                    made[weight] = torch.nn.Parameter(empty, requires_grad=weight.requires_grad)
                part._parameters[name] = made[weight]
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else torch.empty(buffer.shape, dtype=buffer.dtype)


def stand_in(layer, config) -> None:
    """Let a quantised layer compute as its kernel does, as far as memory goes."""
    compute = torch.bfloat16 if config.bf16 else torch.float32
    shape, eight = (layer.out_features, layer.in_features), isinstance(layer, Linear8bitLt)
    bias = None if layer.bias is None else torch.nn.Parameter(torch.empty(shape[0], dtype=compute), requires_grad=False)
    layer.bias = bias

    def forward(x):
        inside = x if eight else x.to(compute)
        out = QuantisedProduct.apply(inside, shape, eight)
        return (out if bias is None else out + bias).to(x.dtype)

    layer.forward = forward
