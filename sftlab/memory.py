"""How much memory a training run takes, before it begins: each part of it, per device, and what would fit.

Activations, the output layer's part and the peak come from a step on tensors without bytes (`dry_run`), weights from an
exact walk of the model, the rest by formula. benchmarks/memory.py checks it against measured peaks.

    sftlab memory --model meta-llama/Llama-2-7b-hf --use-lora --batch-size 4 --device gpu
"""

from dataclasses import dataclass, replace

from sftlab import dry_run, machine, zero
from sftlab.config import MemoryConfig, TrainConfig
from sftlab.options import UserError

SIZES = (8, 16, 24, 40, 80, 141)  # GB of the GPUs that are about: RTX, T4, 4090, A100, A100 and H100, H200
# Bytes before there is a model. CPU: Python with all libraries, measured. GPU: what torch's allocator doesn't know of, the
# CUDA context and the libraries' own; measured on an H200 with CUDA 13.0: 0.79 and 0.81 GB.
RUNTIME = {"cpu": 620_000_000, "gpu": 800_000_000}
LIVE = 1_000_000_000  # weights that DeepSpeed keeps gathered at most (stage3_max_live_parameters in sftlab/configs)
DATA = 45_000_000  # tokenizer, data set, batches and the Trainer's own, measured on a CPU
# What oneDNN keeps on a CPU in bfloat16: a kernel for each shape of a product. 33 MB with rows of one length, 77 with many.
KERNELS = 75_000_000
# Bytes of state per trained weight. The 8-bit ones keep a scale of 4 bytes for 256 numbers; Adafactor sums of rows and
# columns only, next to nothing.
STATE = {"adamw_torch_fused": 8, "adamw_torch": 8, "adafactor": 0.02, "sgd": 0, "adamw_8bit": 2 + 2 * 4 / 256,
         "paged_adamw_8bit": 2 + 2 * 4 / 256}  # fmt: skip
LARGEST, LONGEST = 4096, 131072  # batch, and tokens of a sequence, where the model sets no end
METHODS = (
    ("full", {"use_lora": False, "use_dora": False, "use_rslora": False}),
    ("LoRA", {"use_lora": True}),
    ("LoRA, 8 bits", {"use_lora": True, "use_8bit": True}),
    ("LoRA, 4 bits", {"use_lora": True, "use_4bit": True}),
)


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


def find_largest(config: TrainConfig, plan: MemoryConfig, room: float) -> tuple[int, int]:
    """(largest batch at max_length, longest sequence at this batch size) that fit in `room` bytes; 0 where nothing does.

    No sequence is longer than the model has positions for, and no batch is looked for above LARGEST. The length is found in
    steps of 8 tokens, both to one part in 64.
    """

    def total(batch_size: int, length: int) -> int:
        return estimate(replace(config, batch_size=batch_size, max_length=length), plan).total

    def find(at, most: int, tried: int) -> int:
        """The largest number up to `most` whose total fits, to one part in 64, from `tried` on along a straight line."""
        sizes, fits, too_many = {}, 0, most + 1
        while too_many - fits > (least := max(1, fits // 64)):
            tried = min(max(tried, fits + least), too_many - 1)
            sizes[tried] = at(tried)
            fits, too_many = (tried, too_many) if sizes[tried] <= room else (fits, tried)
            near = sorted(sizes, key=lambda number: abs(sizes[number] - room))[:2]
            if len(near) == 2 and len(sizes) < 8 and (rise := sizes[near[1]] - sizes[near[0]]):
                tried = near[0] + int((room - sizes[near[0]]) * (near[1] - near[0]) / rise)
            else:  # no line yet, or it doesn't lead there
                tried = 2 * fits if too_many > most else (fits + too_many) // 2
        return fits

    settings = dry_run.read_settings(config.model_name, config.trust_remote_code).get_text_config()
    longest = getattr(settings, "max_position_embeddings", None) or LONGEST
    batch = find(lambda count: total(count, config.max_length), LARGEST, config.batch_size)
    eights = find(lambda count: total(config.batch_size, 8 * count), longest // 8, config.max_length // 8)
    return batch, 8 * eights


def list_methods(config: TrainConfig, plan: MemoryConfig) -> list[tuple[str, int, int | None]]:
    """(method, bytes per device, the smallest of SIZES that holds it or None), for the same model, batch and length."""
    plain, out = replace(config, use_4bit=False, use_8bit=False), []
    for name, changes in METHODS:
        run = replace(plain, **changes)
        stage = min(plan.zero, 2) if run.use_4bit or run.use_8bit else plan.zero  # as `describe` refuses
        total = estimate(run, replace(plan, device="gpu", zero=stage)).total
        out.append((name, total, next((size for size in SIZES if total <= size * 1e9), None)))
    return out


def describe(config: TrainConfig, plan: MemoryConfig) -> list[str]:
    """The estimate as lines for a terminal: parts, what fits where, and advice where it doesn't."""
    from sftlab import memory_advice

    if plan.zero == 3 and (config.use_4bit or config.use_8bit):
        raise UserError(
            "zero: stage 3 shares out pieces of every weight, and a quantised one is whole on each device; take --zero 2."
        )
    if config.deepspeed and not plan.zero:
        plan = replace(plan, zero=zero.find_stage(config.deepspeed), offload=zero.offloads(config.deepspeed))
    whole = estimate(config, plan)
    bf16 = "bfloat16" if chooses_bf16(config, plan) else "float32"
    where = f"each of {plan.devices} devices, ZeRO-{plan.zero}" if plan.devices > 1 else f"one {plan.device.upper()}"
    lines = [
        f"{config.model_name} on {where}: batches of {config.batch_size} x {config.max_length} tokens, computed in {bf16}, "
        f"{whole.trained_parameters:,} parameters trained",
        *(f"  {name:<24}{size / 1e9:>10.3f} GB" for name, size in whole.parts.items()),
        f"  {'peak':<24}{whole.total / 1e9:>10.3f} GB",
    ]
    room = plan.room * 1e9 if plan.room else machine.find_limit(plan.device == "gpu")
    if plan.device == "cpu":
        lines.append(
            f"  This is with freed memory given back; kept for speed, it may be up to twice that (room: {room / 1e9:.1f} GB)."
        )
    if room:
        fits = whole.total <= room
        lines.append(f"{'fits' if fits else 'does not fit'} in {room / 1e9:.1f} GB")
        batch, length = find_largest(config, plan, room)
        lines.append(f"largest batch at {config.max_length} tokens: {batch or 'none'}; "
                     f"longest sequences at a batch of {config.batch_size}: {length or 'none'}")  # fmt: skip
        if not fits:
            lines += memory_advice.describe(config, plan, room)
    lines.append(f"\non a GPU{', each' if plan.devices > 1 else ''}:")
    for name, total, size in list_methods(config, plan):
        lines.append(
            f"  {name:<24}{total / 1e9:>10.1f} GB  {f'fits in {size} GB' if size else f'more than {SIZES[-1]} GB'}"
        )
    return lines
