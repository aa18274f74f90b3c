"""Bases held in 8 or 4 bits by bitsandbytes: its settings, and what it takes to train adapters beside them.

python -c "from sftlab import quantise; print(quantise.quantization_config)"
"""

import contextlib

from sftlab.config import TrainConfig


def quantization_config(config: TrainConfig):
    """bitsandbytes' settings for --use-4bit (NF4, double quantisation) or --use-8bit; None without either."""
    import torch
    from transformers import BitsAndBytesConfig

    if config.use_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.use_4bit:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                  bnb_4bit_compute_dtype=dtype)  # fmt: skip
    return None


@contextlib.contextmanager
def plain_falcon():
    """Falcon's linear layers as torch's own while a model is loaded; they compute the same.

    transformers 5 quantises layers that are exactly `torch.nn.Linear`; Falcon's are a subclass, and would silently stay
    as they are.
    """
    import torch
    from transformers.models.falcon import modeling_falcon

    own, modeling_falcon.FalconLinear = modeling_falcon.FalconLinear, torch.nn.Linear
    try:
        yield
    finally:
        modeling_falcon.FalconLinear = own


def count_quantised(model) -> int:
    """How many layers bitsandbytes holds in 8 or 4 bits."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    return sum(isinstance(part, Linear4bit | Linear8bitLt) for part in model.modules())


def keep_gradients(model):
    """Keep 4-bit layers as they are in evaluation on a CPU, and return the model.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 packs the weights at the first evaluation, for faster inference. Packed
    layers pass no gradient, so training would go on without one, silently.
    """
    from bitsandbytes.nn import Linear4bit

    for part in model.modules():
        if isinstance(part, Linear4bit):
            part.support_avx512bf16_for_cpu = False
    return model


def prepare_quantised(model, config: TrainConfig) -> None:
    """PEFT's preparation of a quantised base: all of it frozen, what is not quantised (norms, embeddings) in float32.

    With --gradient-checkpointing the embeddings' output requires a gradient, or the layers would pass none.
    """
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing,
                                    gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip
