"""What a training run holds, before it begins: a step on fake tensors is counted, and the peak estimated from it.

The model's own code runs, PEFT's adapters, autocast and gradient checkpointing included, on torch's fake tensors, which have
a shape and a type and no numbers. What each operation would have allocated and freed is counted, so there is no formula for
each architecture, and a model of 70 billion parameters takes seconds. Only the layers of bitsandbytes and, for a GPU, TRL's
head are replaced (`kernels`). benchmarks/memory.py compares the result with measured peaks.

    sftlab memory meta-llama/Llama-2-7b-hf --use-lora --batch-size 4 --device gpu
"""

import collections
import contextlib
import copy
import functools
import logging
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.models import adapters, attention, load, quantise
from sftlab.models.load import read_settings
from sftlab.models.loss import has_plain_head

FEW_LAYERS = (2, 4)  # each layer adds the same amount: these two say how much
MIXED_LAYERS = (6, 12)  # where layers of several kinds take turns, as in Gemma 3
# Bytes before there is a model. CPU: Python with all libraries, measured. GPU: what torch's allocator doesn't know of, the
# CUDA context and the libraries' own; measured on an H200 with CUDA 13.0: 0.79 and 0.81 GB.
RUNTIME = {"cpu": 620_000_000, "gpu": 800_000_000}
LIVE = 1_000_000_000  # weights that DeepSpeed keeps gathered at most (stage3_max_live_parameters in sftlab/config/deepspeed)
DATA = 45_000_000  # tokenizer, data set, batches and the Trainer's own, measured on a CPU
# What oneDNN keeps on a CPU in bfloat16: a kernel for each shape of a product. 33 MB with rows of one length, 77 with many.
KERNELS = 75_000_000
# Bytes of the optimizer per trained weight. Adafactor keeps sums of rows and columns only; 8 bits have a scale for 256 numbers.
STATE = {"adamw_torch_fused": 8, "adamw_torch": 8, "adafactor": 0.02, "sgd": 0}
STATE |= dict.fromkeys(("adamw_8bit", "paged_adamw_8bit"), 2 + 2 * 4 / 256)
OF_STEP = (
    "model_name trust_remote_code use_lora lora_r lora_target_modules lora_target_parameters lora_dropout use_dora"
)
OF_STEP += " use_4bit use_8bit gradient_checkpointing use_flash_attention"  # the options that change what a step holds


class CantCount(UserError):
    """A model whose code asks for numbers that are not there, so that its memory can't be estimated."""


class Peak(NamedTuple):
    """The most bytes that were held: of them `gradients` in gradients of weights, and `head` in the output layer."""

    size: int = 0
    gradients: int = 0
    head: int = 0


class Held(NamedTuple):
    """Bytes of one step, and `trained`: how many weights learn, each of 4 bytes.

    weights: those that don't learn, by dtype; gradients: all of those that do; early, late: the most that was held beside
    weights up to the end of the output layer, and in the layers' backward pass.
    """

    weights: dict[str, int]
    trained: int
    gradients: int
    early: Peak
    late: Peak


@dataclass(frozen=True)
class Estimate:
    """Bytes per device: `parts` by name, in the order of a table; `total` is their sum, the peak."""

    parts: dict[str, int]
    trained_parameters: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def estimate(config: TrainConfig, plan: MemoryConfig, length=None, trained_share=1.0, shared=0) -> Estimate:
    """Estimate the peak of a run on each device of a plan, in parts.

    Every sequence is taken to be `length` tokens long (default: max_length), of which `trained_share` are in the loss; on a
    CPU a batch holds the first `shared` ones once. ZeRO divides as in Rajbhandari et al. 2020 (arXiv:1910.02054, section 5):
    stage 1 the optimizer's state, 2 the gradients, too, 3 the weights, too. Raises UserError for a model that can't be had.
    """
    cpu, bf16 = plan.device == "cpu", load.choose_precision(config, plan.device)[0]
    held = run(config, config.batch_size, length or config.max_length, bf16, not cpu, trained_share, shared)
    trained, gradients, state = 4 * held.trained, held.gradients, STATE[config.optim] * held.trained
    if plan.zero:  # DeepSpeed keeps a float32 copy of what is trained with the optimizer's state, also of float32
        state += 4 * held.trained
        if bf16:
            trained, gradients = trained // 2, gradients // 2
    over_state, over_gradients, over_weights = (plan.devices if plan.zero >= stage else 1 for stage in (1, 2, 3))
    gathered = 0
    if over_weights > 1:  # the block at work is gathered whole, and others stay
        gathered = min(sum(held.weights.values()) + trained, LIVE * (2 if bf16 else 4))
    peak, last = max(held.early, held.late), gradients // over_gradients
    during = peak.gradients * gradients // max(1, held.gradients) // over_gradients
    activations, head = peak.size - peak.gradients - peak.head, peak.head
    if activations + head + during < last:  # the most is held when the optimizer moves the weights
        activations, head, during = 0, 0, last
    parts = {f"weights, {kind}": size // over_weights for kind, size in held.weights.items()} | {
        "trained weights": trained // over_weights,
        "gradients": during,
        "optimizer": 0 if plan.offload else round(state / over_state),
        "activations": activations,
        "output layer's loss": head,
        "gathered blocks": gathered,
        "data and tokenizer": DATA * cpu,
        "kernels in bfloat16": KERNELS * (cpu and bf16),
        "runtime": RUNTIME[plan.device],
    }
    return Estimate({name: size for name, size in parts.items() if size}, held.trained)


def run(config: TrainConfig, batch_size: int, length: int, bf16=False, gpu=False, trained_share=1.0, shared=0) -> Held:
    """Count what one optimizer step holds, of gradient_accumulation_steps batches of (batch_size, length) tokens.

    bf16: compute in bfloat16. gpu: as on a GPU. trained_share, shared: as in `estimate`. Raises UserError for a model that
    can't be had, CantCount for one whose step can't be counted.
    """
    options = {name: getattr(config, name) for name in OF_STEP.split()} | {"bf16": bf16}
    options["gradient_accumulation_steps"] = min(2, config.gradient_accumulation_steps)  # more hold no more
    with counting(config):
        return _run(tuple(options.items()), batch_size, length, gpu, trained_share, shared)


@contextlib.contextmanager
def counting(config: TrainConfig):
    """Turn whatever goes wrong with a model's code inside into CantCount: a run shall not fail by its estimate."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # which reports each of its failures
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a mixture of experts asks for numbers, another model builds layers in its own way …
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CantCount(f"model {config.model_name}: a step of it can't be counted ({reason}).") from error


@functools.lru_cache(maxsize=256)
def _run(options: tuple, *shape) -> Held:
    config = TrainConfig(**dict(options))
    settings = read_settings(config.model_name, config.trust_remote_code)
    inner = settings.get_text_config()
    layers = inner.num_hidden_layers
    fewer, more = MIXED_LAYERS if len(set(getattr(inner, "layer_types", None) or [])) > 1 else FEW_LAYERS
    if layers <= MIXED_LAYERS[1]:
        return _count_step(config, settings, layers, shape)
    one, two = (_count_step(config, settings, count, shape) for count in (fewer, more))
    steps = (layers - fewer) / (more - fewer)  # the straight line through the two, in each of their numbers
    return tree_map(lambda first, second: max(0, round(first + (second - first) * steps)), one, two)


def build(config: TrainConfig, settings, layers: int):
    """Build the model of a run without bytes (torch's meta device), as it would be trained: quantised, with adapters."""
    from peft import get_peft_model

    settings = copy.deepcopy(settings)
    inner = settings.get_text_config()
    inner.num_hidden_layers = layers
    inner.pad_token_id = None  # or some models look for padding in ids that are not there
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:layers]
    dtype = torch.bfloat16 if config.bf16 and config.use_lora else torch.float32
    quantization = quantise.quantization_config(config)
    model = load.build_empty(settings, dtype, quantization, config.trust_remote_code)
    if quantization:
        quantise.prepare_quantised(model, config.gradient_checkpointing)
    if lora := load.lora_config(config):
        load.check_targets(model, lora)
        model = get_peft_model(model, lora, low_cpu_mem_usage=True)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return model.train()


def _count_step(config: TrainConfig, settings, layers: int, shape: tuple) -> Held:
    from sftlab.memory import kernels

    batch_size, length, gpu, trained_share, shared = shape
    as_on_device = kernels.OnGpu if gpu else contextlib.nullcontext
    model = build(config, settings, layers)
    if config.gradient_checkpointing:
        again = {"context_fn": lambda: (contextlib.nullcontext(), as_on_device())}  # it is off in a backward pass
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False} | again)
        if config.use_lora:
            model.enable_input_require_grads()
    adapters.prepare(model, config.bf16, cpu=not gpu)
    causal = model.get_base_model() if config.use_lora else model
    inputs = {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
    if not gpu and attention.choose(model, config.use_flash_attention, config.bf16)[0] == attention.VARLEN:
        attention.set_attention(model, None)  # rows without padding, in one
        shares = batch_size > 1 and has_plain_head(causal)  # as `run.make_trainer` shares
        shared = min(shared, length - 1) if shares else 0
        inputs = attention.packed_inputs([[0] * length] * batch_size, shared=shared)
    weights = count(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kernels.make_fake(model, config)
        with as_on_device(), LiveBytes(model) as counter:
            for _ in range(config.gradient_accumulation_steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                    hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state
                    counter.enter_head()
                    loss = kernels.head_loss(causal, hidden, gpu, round(trained_share * batch_size * length))
                hidden.register_hook(counter.leave_head)
                loss.backward(torch.ones_like(loss))
                del hidden, loss
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return Held(weights, trained, counter.gradients, counter.early, counter.late)


def lies_in_rows(config: TrainConfig, bf16: bool) -> bool:
    """Whether the model's attention would let samples lie in one row without padding, asked of an empty copy."""
    with counting(config):
        model = build(config, read_settings(config.model_name, config.trust_remote_code), 1)
    return attention.takes_rows(attention.choose(model, config.use_flash_attention, bf16)[0])


def count(model) -> dict[str, int]:
    """Count the bytes of the weights that don't learn by dtype, with bitsandbytes' constants, each stored weight once.

    4 bits: half a byte each; a scale for 64 weights, itself in 8 bits, with one of 4 bytes for 256 scales (QLoRA,
    arXiv:2305.14314, section 3); two codebooks and an offset. 8 bits: a byte each, and 4 bytes for each row.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    found = collections.Counter()
    for weight in model.parameters():
        if isinstance(weight, Params4bit):
            scales = -(-weight.numel() // 64)
            found["nf4"] += -(-weight.numel() // 2)
            found["quantisation constants"] += scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
        elif isinstance(weight, Int8Params):
            found["int8"] += weight.numel()
            found["quantisation constants"] += 4 * weight.shape[0]
        elif not weight.requires_grad:
            found[str(weight.dtype).removeprefix("torch.")] += weight.nbytes
    return dict(found)


class LiveBytes(TorchDispatchMode):
    """Count the live bytes of all that operations make while this is on, the weights of `model` left out.

    now: bytes; gradients: bytes of the weights' gradients so far; early, late: the peaks up to the end of the output
    layer, and after it, in the backward pass of the layers. `peak` is the larger one, in bytes.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.gradients = self.before_head = 0
        self.early, self.late, self.phase = Peak(), Peak(), "layers forward"
        self.live, self.counted = {}, set()
        for part in (*model.parameters(), *model.buffers()):
            self.live[part.untyped_storage()._cdata] = None
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self.add_gradient)

    @property
    def peak(self) -> int:
        return max(self.early, self.late).size

    def enter_head(self) -> None:
        self.phase, self.before_head = "head", self.now

    def leave_head(self, grad=None) -> None:
        """The head is done when the gradient of what went into it is there: a hook for that tensor."""
        self.phase = "layers backward"

    def add_gradient(self, weight) -> None:
        if id(weight) not in self.counted:  # later batches add to the same tensor
            self.counted.add(id(weight))
            self.gradients += weight.grad.nbytes

    def free(self, key: int, size: int) -> None:
        if self.live.pop(key, None) is not None:
            self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            storage = part.untyped_storage() if hasattr(part, "untyped_storage") else None
            if storage is None or storage._cdata in self.live:
                continue
            key, size = storage._cdata, storage.nbytes()
            self.live[key] = weakref.ref(storage, lambda _, key=key, size=size: self.free(key, size))
            self.now += size
            peak = Peak(self.now, self.gradients, self.now - self.before_head if self.phase == "head" else 0)
            if self.phase == "layers backward":
                self.late = max(self.late, peak)
            else:
                self.early = max(self.early, peak)
        return out
