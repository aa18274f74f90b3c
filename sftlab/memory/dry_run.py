"""A training step on fake tensors: how much it would hold, and how much of it at its peak.

The model's own code runs, PEFT's adapters, autocast and gradient checkpointing included, on torch's fake tensors: they
have a shape and a type, and nothing is computed. What each operation would have allocated, and what was freed, is
counted. So there is no formula for each architecture, and a model of 70 billion parameters takes seconds. Only
bitsandbytes' layers and, for a GPU, TRL's head are stood in for, by what their source keeps. It may run in a thread: modes of
torch are each thread's own, and its default dtype, its generator and its functions stay as they are.

    python -c "from sftlab.memory import dry_run; from sftlab.config.configs import TrainConfig; print(dry_run.run(TrainConfig(), 4, 64))"
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import threading
import weakref
from dataclasses import dataclass, replace

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sftlab.config.configs import TrainConfig
from sftlab.errors import UserError

ONE_AT_A_TIME = threading.RLock()  # torch notes in a variable of all threads whether a dispatch mode is on
FEW_LAYERS = (2, 4)  # each layer adds the same amount: these two say how much
MIXED_LAYERS = (6, 12)  # where layers of several kinds take turns, as in Gemma 3


class CantCount(UserError):
    """A model whose code asks for numbers that are not there, so that its memory can't be estimated."""


@dataclass
class Peak:
    """The most bytes that were held: of them `gradients` in gradients of weights, and `head` since `enter_head`."""

    size: int = 0
    gradients: int = 0
    head: int = 0


@dataclass(frozen=True)
class Held:
    """Bytes. weights: those that don't learn, by dtype, `nf4` and `int8` with their constants in `constants`; trained:
    weights that learn; gradients: all of theirs; kept: activations at the end of the forward pass; early, late: the most
    that a step held beside weights up to the end of the output layer, and in the layers' backward pass; block: all
    weights of the largest block of layers.
    """

    weights: dict[str, int]
    constants: int
    trained: int
    trained_count: int
    gradients: int
    kept: int
    early: Peak
    late: Peak
    block: int

    @property
    def fullest(self) -> Peak:
        return max(self.early, self.late, key=lambda peak: peak.size)

    @property
    def peak(self) -> int:
        return self.fullest.size


def run(config: TrainConfig, batch_size: int, length: int, bf16: bool = False, gpu: bool = False,
        trained_share: float = 1.0, shared: int = 0) -> Held:  # fmt: skip
    """What one optimizer step holds, of gradient_accumulation_steps batches of (batch_size, length) tokens.

    bf16: compute in bfloat16. gpu: the way the loss is computed there, on `trained_share` of the positions. shared: tokens that
    all rows begin with, which a row without padding holds once on a CPU. Raises UserError for a model that can't be had.
    """
    names = ("model_name", "use_lora", "lora_r", "lora_target_modules", "use_dora", "lora_dropout", "use_4bit", "use_8bit",
             "gradient_checkpointing", "use_flash_attention", "trust_remote_code")  # fmt: skip
    options = {name: getattr(config, name) for name in names} | {"bf16": bf16}
    options["gradient_accumulation_steps"] = min(2, config.gradient_accumulation_steps)  # more hold no more
    with counting(config):
        return _run(tuple(options.items()), batch_size, length, gpu, trained_share, shared)


@contextlib.contextmanager
def counting(config: TrainConfig):
    """Turns whatever goes wrong with a model's code inside into CantCount: a run shall not fail by its estimate."""
    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # which tells each of its failures
    try:
        with ONE_AT_A_TIME:
            yield
    except UserError:
        raise
    except Exception as error:  # a mixture of experts asks for numbers, another model builds layers in its own way …
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise CantCount(
            f"model {config.model_name}: a step of it can't be counted without its numbers ({reason})."
        ) from error


@functools.lru_cache(maxsize=256)
def _run(options: tuple, *shape) -> Held:
    config = TrainConfig(**dict(options))
    settings = read_settings(config.model_name, config.trust_remote_code)
    inner = settings.get_text_config()
    layers = inner.num_hidden_layers
    fewer, more = MIXED_LAYERS if len(set(getattr(inner, "layer_types", None) or [])) > 1 else FEW_LAYERS
    if layers <= MIXED_LAYERS[1]:
        return _step(config, settings, layers, *shape)
    one, two = (dataclasses.asdict(_step(config, settings, count, *shape)) for count in (fewer, more))
    line = _extend(one, two, (layers - fewer) / (more - fewer))
    return Held(**line | {name: Peak(**line[name]) for name in ("early", "late")})


def _extend(one, two, steps: float):
    """The straight line through two numbers, or through each pair of numbers in two dicts."""
    if isinstance(one, dict):
        return {name: _extend(one[name], two[name], steps) for name in one}
    return max(0, round(one + (two - one) * steps))


def read_settings(name: str, trust_remote_code: bool = False):
    """transformers' configuration of any model, without a network where the catalogue knows its shape."""
    from pathlib import Path

    from sftlab.hub import catalog
    from sftlab.models import load

    known = catalog.find_model(name)
    if known and known.name != "tiny-base" and not name.startswith(catalog.RANDOM) and not Path(name).is_dir():
        name = f"random:{name}"
    return load.read_settings(name, trust_remote_code)


def build(config: TrainConfig, settings, layers: int):
    """The model of a run without bytes (torch's meta device), as it would be trained: quantised, with adapters."""
    import torch
    from peft import get_peft_model

    from sftlab.models import load, quantise

    settings = copy.deepcopy(settings)
    inner = settings.get_text_config()
    inner.num_hidden_layers = layers
    inner.pad_token_id = None  # or some models look for padding in ids that are not there
    if getattr(inner, "layer_types", None):
        inner.layer_types = inner.layer_types[:layers]
    dtype = torch.bfloat16 if config.bf16 and config.use_lora else torch.float32
    model = quantise.build_empty(settings, dtype, quantise.quantization_config(config), config.trust_remote_code)
    if config.use_4bit or config.use_8bit:
        quantise.prepare_quantised(model, config)
    lora = load.lora_config(config)
    if lora:
        load.check_targets(model, lora.target_modules)
        if lora.use_dora and (config.use_4bit or config.use_8bit):
            raise RuntimeError("DoRA reads the lengths of quantised weights, which are not there")
        with torch.device("meta"):  # PEFT's low_cpu_mem_usage replaces a method of all modules meanwhile
            model = get_peft_model(model, lora)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()
    return model.train()


def _step(
    config: TrainConfig,
    settings,
    layers: int,
    batch_size: int,
    length: int,
    gpu: bool,
    trained_share: float,
    shared: int,
) -> Held:
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from sftlab.memory import kernels
    from sftlab.models import adapters, attention
    from sftlab.models.loss import has_plain_head

    if gpu:  # whose attention kernels have dropout without a matrix of scores, which the ones for CPUs would make
        settings = copy.deepcopy(settings)
        dropouts = {"attention_dropout", "attn_pdrop"} & set(vars(settings.get_text_config()))
        settings.get_text_config().update(dict.fromkeys(dropouts, 0.0))
    model = build(config, settings, layers)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(
            {
                "use_reentrant": False,
                "preserve_rng_state": False,  # else torch's generator, which is that of all threads, would be set back
                "context_fn": lambda: (contextlib.nullcontext(), kernels.as_on(gpu)),  # off in a backward pass
            }
        )
        if config.use_lora:
            model.enable_input_require_grads()
    adapters.prepare(model, config.bf16, cpu=not gpu)
    in_rows = not gpu and attention.choose(model, config.use_flash_attention, config.bf16)[0] == attention.VARLEN
    if in_rows:
        attention.set_attention(model, None)
    causal = model.get_base_model() if config.use_lora else model
    shared = min(shared, length - 1) if batch_size > 1 and has_plain_head(causal) else 0  # as `run.make_trainer` shares
    inputs = (
        attention.packed_inputs([[0] * length] * batch_size, shared=shared)
        if in_rows
        else {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
    )
    held, constants = count(model)
    block = max((count_block(part) for part in find_blocks(causal)), default=0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        kernels.make_fake(model, config)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        counter = LiveBytes(model)
        with kernels.as_on(gpu), counter:
            for _ in range(config.gradient_accumulation_steps):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.bf16):
                    hidden = causal.base_model(**inputs, use_cache=False).last_hidden_state
                    counter.enter_head()
                    loss = kernels.head_loss(causal, hidden, gpu, round(trained_share * batch_size * length))
                hidden.register_hook(counter.leave_head)
                kept = counter.before_head - counter.gradients
                loss.backward(torch.ones_like(loss))
                del hidden, loss
        return Held(held, constants, sum(w.nbytes for w in trained), sum(w.numel() for w in trained), counter.gradients,
                    kept, counter.early, counter.late, block)  # fmt: skip


def count_embedding(config: TrainConfig) -> int:
    """Numbers in the input embedding of a run's model."""
    settings = read_settings(config.model_name, config.trust_remote_code).get_text_config()
    return settings.vocab_size * settings.hidden_size


def lies_in_rows(config: TrainConfig, bf16: bool) -> bool:
    """Whether the model's attention would let samples lie in one row without padding, asked of an empty copy."""
    from sftlab.models import attention

    plain = replace(config, use_lora=False, use_4bit=False, use_8bit=False, use_dora=False, use_rslora=False)
    with counting(config):
        model = build(plain, read_settings(config.model_name, config.trust_remote_code), 1)
    return attention.choose(model, config.use_flash_attention, bf16)[0].startswith(
        ("flash_attention", attention.VARLEN)
    )


def count(model) -> tuple[dict[str, int], int]:
    """(dtype -> bytes of the weights that don't learn, bytes of bitsandbytes' constants), each stored weight once.

    4 bits: half a byte each; a scale for 64 weights, itself in 8 bits, with one of 4 bytes for 256 scales (QLoRA,
    arXiv:2305.14314, section 3); two codebooks and an offset. 8 bits: a byte each, and 4 bytes for each row.
    """
    from bitsandbytes.nn import Int8Params, Params4bit

    held, constants = {}, 0
    for weight in model.parameters():
        if isinstance(weight, Params4bit):
            scales = -(-weight.numel() // 64)
            held["nf4"] = held.get("nf4", 0) + -(-weight.numel() // 2)
            constants += scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)
        elif isinstance(weight, Int8Params):
            held["int8"] = held.get("int8", 0) + weight.numel()
            constants += 4 * weight.shape[0]
        elif not weight.requires_grad:
            dtype = str(weight.dtype).removeprefix("torch.")
            held[dtype] = held.get(dtype, 0) + weight.nbytes
    return held, constants


def count_block(block) -> int:
    """Bytes of all weights of a block, those that learn, too."""
    return sum(count(block)[0].values()) + sum(weight.nbytes for weight in block.parameters() if weight.requires_grad)


def find_blocks(causal) -> list:
    """The blocks of a model, such as its decoder layers: the entries of its longest ModuleList."""
    import torch

    lists = [part for part in causal.modules() if isinstance(part, torch.nn.ModuleList)]
    return list(max(lists, key=len, default=[]))


class LiveBytes(TorchDispatchMode):
    """Live bytes of all that operations make while this is on, the weights of `model` left out.

    now: bytes; gradients: bytes of the weights' gradients so far; early, late: the peaks up to the end of the output
    layer, and after it, in the backward pass of the layers. `peak` is the larger one, in bytes.
    """

    def __init__(self, model):
        super().__init__()
        self.now = self.gradients = self.before_head = 0
        self.early, self.late, self.in_head, self.in_layers = Peak(), Peak(), False, False
        self.live, self.counted = {}, set()
        for part in (*model.parameters(), *model.buffers()):
            self.live[part.untyped_storage()._cdata] = None
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self.add_gradient)

    @property
    def peak(self) -> int:
        return max(self.early.size, self.late.size)

    def enter_head(self) -> None:
        self.in_head, self.in_layers, self.before_head = True, False, self.now

    def leave_head(self, slope=None) -> None:
        """The head is done when the gradient of what went into it is there: a hook for that tensor."""
        self.in_head, self.in_layers = False, True

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
            if storage is not None and storage._cdata not in self.live:
                key, size = storage._cdata, storage.nbytes()
                self.live[key] = weakref.ref(storage, lambda _, key=key, size=size: self.free(key, size))
                self.now += size
                peak = self.late if self.in_layers else self.early
                if self.now > peak.size:
                    peak.size, peak.gradients = self.now, self.gradients
                    peak.head = self.now - self.before_head if self.in_head else 0
        return out
