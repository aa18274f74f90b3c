"""Bases stored in 8 or 4 bits by bitsandbytes: its settings, and what it takes to train adapters on top of them."""

import contextlib
import importlib.util
from unittest import mock

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError


def import_bitsandbytes() -> None:
    """Import bitsandbytes where it is installed, without torch's compiler, which takes as long to import as torch itself.

    bitsandbytes 0.50 compiles fallbacks for devices without kernels of their own; a CPU and an NVIDIA GPU have them.
    """
    import torch

    if importlib.util.find_spec("bitsandbytes") is not None:
        with mock.patch.object(torch, "compile", lambda function, **options: function):
            import bitsandbytes  # noqa: F401


def quantization_config(config: TrainConfig):
    """Make bitsandbytes' settings for --use-4bit (NF4, double quantisation) or --use-8bit; None without either."""
    import torch
    from transformers import BitsAndBytesConfig

    if config.use_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    if config.use_4bit:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if config.bf16 else torch.float32,
        )
    return None


@contextlib.contextmanager
def plain_falcon():
    """Make Falcon's linear layers torch's own while a model is loaded; they compute the same.

    transformers 5 quantises layers that are exactly `torch.nn.Linear`; Falcon's subclass would silently stay as it is.
    """
    import torch
    from transformers.models.falcon import modeling_falcon

    with mock.patch.object(modeling_falcon, "FalconLinear", torch.nn.Linear):
        yield


def fix_layers(model, name: str):
    """Let the layers of bitsandbytes be trained on a CPU, and return the model. Raises UserError where it has none.

    On CPUs with AVX-512 BF16, bitsandbytes 0.50 packs 4-bit weights at the first evaluation, for faster inference. Packed
    layers pass no gradient, so training would continue without one, silently.
    """
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    layers = [part for part in model.modules() if isinstance(part, Linear4bit | Linear8bitLt)]
    if not layers:
        raise UserError(f"model {name}: it has no layer that bitsandbytes can quantise; leave that option out.")
    for layer in layers:
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    return model


def dequantize(model):
    """Turn the 8 or 4 bits of a model into float32, in layers of the kind that they were made from.

    transformers 5.23 makes a Linear of each; GPT-2's were Conv1D, which stores its weight transposed.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    stored = [name for name, part in model.named_modules() if getattr(part, "source_cls", None) is Conv1D]
    model = model.dequantize(torch.float32)
    for name in stored:
        linear = model.get_submodule(name)
        layer = Conv1D(linear.out_features, linear.in_features)
        layer.weight, layer.bias = torch.nn.Parameter(linear.weight.T.contiguous()), linear.bias
        model.set_submodule(name, layer)
    return model


def prepare_quantised(model, checkpointing: bool) -> None:
    """Prepare a quantised base with PEFT: all of it frozen, what is not quantised (norms, embeddings) in float32."""
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, checkpointing, {"use_reentrant": False})


def fill_random(model, dtype, device):
    """Give an empty quantised model (`load.build_empty`) random weights; never is more than one matrix there unquantised."""
    import torch

    quantise_one = model.hf_quantizer.get_quantize_ops().convert
    spread = getattr(model.config.get_text_config(), "initializer_range", 0.02)
    for name, part in model.named_modules():
        if not part._parameters and not part._buffers:
            continue
        for own, weight in list(part._parameters.items()):
            if weight is None or weight.device.type != "meta":
                continue
            new = torch.zeros(weight.shape, dtype=dtype, device=device)
            if own == "weight" and hasattr(part, "source_cls"):  # a layer of bitsandbytes
                new.normal_(0, spread)
                new = new.t() if part.source_cls.__name__ == "Conv1D" else new
                path = f"{name}.weight"
                part._parameters[own] = quantise_one({path: new}, full_layer_name=path, model=model)[path]
            else:
                part._parameters[own] = torch.nn.Parameter(new, requires_grad=weight.requires_grad)
        for own, buffer in part._buffers.items():
            part._buffers[own] = None if buffer is None else torch.empty_like(buffer, device=device)
        if not hasattr(part, "source_cls"):
            model._init_weights(part)
    model.tie_weights()
    return model
