"""What LoRA's adapters compute beside the libraries: dropout in fewer random bits, and no needless casts.

python benchmarks/train.py --cases tiny-base
"""

import functools

import torch


class FastDropout(torch.nn.Dropout):
    """Dropout for a CPU that draws 16 bits a number, where torch draws 32, on one core."""

    def forward(self, x):
        if not self.training:
            return x
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)
        kept = bits.view(torch.int16)[: x.numel()] >= round(self.p * 2**16) - 2**15
        return x * kept.view(x.shape) / (1 - self.p)


def prepare(model, bf16: bool, cpu: bool) -> None:
    """Let a model's adapters compute as the lab trains them: dropout for a CPU, and no needless casts.

    bf16: whether it trains under bfloat16 autocast. PEFT 0.21 casts each adapter's input to the adapter's float32, autocast
    casts it back for the product, and the copy is kept for the backward pass where dropout keeps its input. The numbers are
    the same without it. Outside autocast, where a model is asked after a run, the cast is needed, and made; so it is with
    DoRA, which computes the lengths of its weights in the precision of the input.
    """
    from peft.tuners.lora.layer import LoraLayer

    for part in model.modules():
        if not isinstance(part, LoraLayer) or part.lora_variant:
            continue
        for dropout in part.lora_dropout.values() if cpu else ():
            if isinstance(dropout, torch.nn.Dropout):
                dropout.__class__ = FastDropout
        if bf16:
            part._cast_input_dtype = functools.partial(cast_outside_autocast, part)


def cast_outside_autocast(part, x, dtype):
    if x is not None and torch.is_autocast_enabled(x.device.type):
        return x
    return type(part)._cast_input_dtype(part, x, dtype)
