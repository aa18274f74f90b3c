"""How much memory a training run takes, before it begins: each part of it, per device, and what would fit.

Activations, the output layer's part and the peak come from a step on fake tensors (`dry_run`), weights from an
exact walk of the model, the rest by formula. benchmarks/memory.py checks it against measured peaks.

    sftlab memory --model meta-llama/Llama-2-7b-hf --use-lora --batch-size 4 --device gpu
"""

from dataclasses import dataclass

from sftlab import machine
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.memory import dry_run

# Bytes before there is a model. CPU: Python with all libraries, measured. GPU: what torch's allocator doesn't know of, the
# CUDA context and the libraries' own; measured on an H200 with CUDA 13.0: 0.79 and 0.81 GB.
RUNTIME = {"cpu": 620_000_000, "gpu": 800_000_000}
LIVE = 1_000_000_000  # weights that DeepSpeed keeps gathered at most (stage3_max_live_parameters in sftlab/config/deepspeed)
DATA = 45_000_000  # tokenizer, data set, batches and the Trainer's own, measured on a CPU
# What oneDNN keeps on a CPU in bfloat16: a kernel for each shape of a product. 33 MB with rows of one length, 77 with many.
KERNELS = 75_000_000
# Bytes of state per trained weight. The 8-bit ones keep a scale of 4 bytes for 256 numbers; Adafactor sums of rows and
# columns only, next to nothing.
STATE = {"adamw_torch_fused": 8, "adamw_torch": 8, "adafactor": 0.02, "sgd": 0, "adamw_8bit": 2 + 2 * 4 / 256,
         "paged_adamw_8bit": 2 + 2 * 4 / 256}  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Bytes per device: `parts` by name, in the order of a table; `total` is their sum, the peak."""

    parts: dict[str, int]
    trained_parameters: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def chooses_bf16(config: TrainConfig, plan: MemoryConfig) -> bool:
    """Whether the run would compute in bfloat16: as asked for, else on a GPU, and on a CPU as this machine chooses."""
    if config.bf16 is not None:
        return config.bf16
    return plan.device == "gpu" or machine.choose_precision()[0]


def estimate(
    config: TrainConfig, plan: MemoryConfig, length: int | None = None, trained_share: float = 1.0, shared: int = 0
) -> Estimate:
    """The peak of a run on each device of a plan, in parts.

    Every sequence is taken to be `length` tokens long (max_length, if not given), of which `trained_share` are trained:
    a real batch is rarely as full; on a CPU a batch holds the first `shared` ones once. Over several devices, ZeRO's shares are those of Rajbhandari et al. 2020
    (arXiv:1910.02054, section 5): stage 1 divides the optimizer's state, 2 the gradients, too, 3 the weights, too.
    Raises UserError for a model that can't be had.
    """
    bf16 = chooses_bf16(config, plan)
    held = dry_run.run(
        config, config.batch_size, length or config.max_length, bf16, plan.device == "gpu", trained_share, shared
    )
    weights, trained, gradients = dict(held.weights), held.trained, held.gradients
    state = STATE[config.optim] * held.trained_count
    if plan.zero:  # DeepSpeed keeps a float32 copy of what is trained with the optimizer's state, also of float32
        state += 4 * held.trained_count
        if bf16:
            trained, gradients = trained // 2, gradients // 2
    share = [plan.devices if plan.zero >= stage else 1 for stage in (1, 2, 3)]
    extra = 0
    if (
        plan.zero == 3 and plan.devices > 1
    ):  # the block at work is gathered whole, the next one is on its way, and more is kept
        extra = min(sum(weights.values()) + trained, max(2 * held.block, LIVE * (2 if bf16 else 4)))
    peak = held.fullest
    during = peak.gradients * gradients // max(1, held.gradients) // share[1]
    passes, head = peak.size - peak.gradients - peak.head, peak.head
    if passes + head + during < gradients // share[1]:  # the most is held when the optimizer moves the weights
        passes, head, during = 0, 0, gradients // share[1]
    parts = {f"weights, {dtype}": size // share[2] for dtype, size in weights.items()}
    parts |= {"quantisation constants": held.constants // share[2], "trained weights": trained // share[2],
              "gradients": during, "optimizer": 0 if plan.offload else round(state / share[0]), "activations": passes,
              "output layer's loss": head, "gathered blocks": extra, "data and tokenizer": DATA if plan.device == "cpu" else 0,
              "kernels in bfloat16": KERNELS if plan.device == "cpu" and bf16 else 0, "runtime": RUNTIME[plan.device]}  # fmt: skip
    return Estimate({name: size for name, size in parts.items() if size}, held.trained_count)
