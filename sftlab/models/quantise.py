"""Bases held in 8 or 4 bits by bitsandbytes: its settings, and what it takes to train adapters beside them.

python -c "from sftlab.models import quantise; print(quantise.quantization_config)"
"""

import contextlib
import copy
import functools
import importlib.util
import os
from unittest import mock

from sftlab.config.configs import TrainConfig
from sftlab.models import remote_code


def import_bitsandbytes() -> None:
    """Import bitsandbytes where it is installed, without torch's compiler, which takes as long to import as torch itself.

    bitsandbytes 0.50 compiles fallbacks for devices that it has no kernels for; a CPU and an NVIDIA GPU have theirs. PEFT
    imports it whether a model is quantised or not.
    """
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        return
    with mock.patch.object(torch, "compile", lambda function, **options: function):
        import bitsandbytes  # noqa: F401


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


def keep_scales(model):
    """Keep the scales of 8-bit layers where PEFT reads their weights for DoRA on a CPU, and return the model.

    PEFT 0.21 (`dequantize_module_weight`) puts a copy of the weight in its place that has no scales, and bitsandbytes 0.50
    takes the weight's scales over at the next call, whatever they are: the layer would be left without any.
    """
    from bitsandbytes.nn import Linear8bitLt

    for part in model.modules():
        if isinstance(part, Linear8bitLt):
            part.init_8bit_state = functools.partial(take_state, part)
    return model


def take_state(layer) -> None:
    scales = layer.state.SCB
    type(layer).init_8bit_state(layer)
    layer.state.SCB = scales if layer.state.SCB is None else layer.state.SCB


def prepare_quantised(model, config: TrainConfig) -> None:
    """PEFT's preparation of a quantised base: all of it frozen, what is not quantised (norms, embeddings) in float32.

    With --gradient-checkpointing the embeddings' output requires a gradient, or the layers would pass none.
    """
    from peft import prepare_model_for_kbit_training

    prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing,
                                    gradient_checkpointing_kwargs={"use_reentrant": False})  # fmt: skip


def build_empty(settings, dtype, quantization=None, trust_remote_code: bool = False):
    """A model of transformers' configuration `settings` without bytes (torch's meta device), its layers as bitsandbytes
    would hold them. dtype: of all that isn't quantised; quantization: what `quantization_config` returns;
    trust_remote_code: whether code that comes with the model may run.

    Nothing that another thread sees is changed: transformers sets torch's default dtype while it builds in a given one, so
    it's told none, and accelerate's `init_empty_weights` replaces a method of all modules, where `torch.device` has this thread only.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.quantizers import AutoHfQuantizer

    name, settings = settings.name_or_path, copy.deepcopy(settings)
    for part in (settings, *(getattr(settings, key) for key in settings.sub_configs)):
        if part is not None:
            part.dtype = None
    with torch.device("meta"), remote_code.guarded(name, name, trust_remote_code):
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=trust_remote_code)
    model.config.dtype = dtype
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    for part in model.modules():
        if type(part).__name__ == "FalconLinear":  # as in `plain_falcon`
            part.__class__ = torch.nn.Linear
    model.tie_weights()
    if quantization:
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.preprocess_model(model=model, device_map=None)
        quantizer.postprocess_model(model)
        model.hf_quantizer = quantizer
    return model


def build_random(settings, dtype, quantization, device):
    """A quantised model with random weights: each is made on `device` in `dtype`, quantised, and let go.

    No more than one matrix is ever there unquantised, so a model of 70 billion parameters needs 4 bits of room for each.
    """
    import torch
    from tqdm.auto import tqdm

    model = build_empty(settings, dtype, quantization)
    quantise_one = model.hf_quantizer.get_quantize_ops().convert
    spread = getattr(settings.get_text_config(), "initializer_range", 0.02)
    parts = [(name, part) for name, part in model.named_modules() if part._parameters or part._buffers]
    quiet = "TQDM_DISABLE" in os.environ or model.num_parameters() < 1e9
    for name, part in tqdm(parts, desc="random weights", leave=False, disable=quiet):
        for own, weight in list(part._parameters.items()):
            if weight is None or weight.device.type != "meta":
                continue
            new = torch.zeros(weight.shape, dtype=dtype, device=device)
            if own == "weight" and hasattr(part, "source_cls"):  # a layer of bitsandbytes
                new.normal_(0, spread)
                new = new.t() if part.source_cls.__name__ == "Conv1D" else new
                new = quantise_one({f"{name}.weight": new}, full_layer_name=f"{name}.weight", model=model)[
                    f"{name}.weight"
                ]
            else:
                new = torch.nn.Parameter(new, requires_grad=weight.requires_grad)
            part._parameters[own] = new
        for own, buffer in part._buffers.items():
            part._buffers[own] = None if buffer is None else torch.empty_like(buffer, device=device)
        if not hasattr(part, "source_cls"):
            model._init_weights(part)
    model.tie_weights()
    return model
