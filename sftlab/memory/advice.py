"""What to do when a run doesn't fit: the options, cheapest first, with the exact flags and what each would bring.

python -c "from sftlab.memory import advice; print(*[option.flags for option in advice.OPTIONS], sep='\\n')"
"""

import dataclasses
import typing
from dataclasses import dataclass, replace

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory import dry_run, parts
from sftlab.memory.parts import chooses_bf16, estimate


@dataclass(frozen=True)
class Option:
    """A change to a run: what it costs, and how it is made. `change` returns the new (run, plan), or None: no use."""

    flags: str
    cost: str
    change: typing.Callable[[TrainConfig, MemoryConfig], tuple[TrainConfig, MemoryConfig] | None]


def set_options(**options: object):
    """The change that sets these options of the run, where they aren't set already."""

    def change(config: TrainConfig, plan: MemoryConfig):
        changed = replace(config, **options)
        return None if changed == config else (changed, plan)

    return change


def halve_batch(config: TrainConfig, plan: MemoryConfig):
    """Half the batch, and twice the accumulation: the same rows in each optimizer step."""
    if config.batch_size % 2:
        return None
    steps = config.gradient_accumulation_steps * 2
    return replace(config, batch_size=config.batch_size // 2, gradient_accumulation_steps=steps), plan


def halve_length(config: TrainConfig, plan: MemoryConfig):
    return (replace(config, max_length=config.max_length // 2), plan) if config.max_length >= 512 else None


def quantise(option: str):
    """The change to a base in 8 or 4 bits, with LoRA only, and not sharded (ZeRO-3)."""

    def change(config: TrainConfig, plan: MemoryConfig):
        if not config.use_lora or plan.zero == 3 or config.use_4bit or getattr(config, option):
            return None
        return replace(config, **{"use_8bit": False, "use_4bit": False, option: True}), plan

    return change


def shard(stage: int):
    """The change to a ZeRO stage over the devices that there are."""

    def change(config: TrainConfig, plan: MemoryConfig):
        quantised = config.use_4bit or config.use_8bit
        if plan.devices == 1 or plan.zero >= stage or stage == 3 and quantised:
            return None
        return config, replace(plan, zero=stage)

    return change


def compute_low(config: TrainConfig, plan: MemoryConfig):
    """bfloat16 on a GPU; on a CPU it's for the user to ask for: most are slow in it."""
    return (replace(config, bf16=True), plan) if plan.device == "gpu" and config.bf16 is False else None


def small_state(config: TrainConfig, plan: MemoryConfig):
    if config.use_lora or plan.zero or config.optim in ("adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"):
        return None
    return replace(config, optim="adamw_8bit"), plan


OPTIONS = (
    Option("--bf16", "no quality, as a rule", compute_low),
    Option("--gradient-checkpointing", "a third to a half more time; the same result", set_options(gradient_checkpointing=True)),
    Option("half the --batch-size, twice the --gradient-accumulation-steps", "some speed; the same steps", halve_batch),
    Option("--deepspeed with ZeRO-2", "some communication; the same result", shard(2)),
    Option("--deepspeed with ZeRO-3", "more communication; the same result", shard(3)),
    Option("--optim adamw_8bit", "a little precision of the optimizer's state", small_state),
    Option("--use-lora", "another method: few weights are trained, at a higher --learning-rate",
          set_options(use_lora=True)),
    Option("--use-8bit", "a little quality, and time", quantise("use_8bit")),
    Option("--use-4bit", "a little quality: measure it", quantise("use_4bit")),
    Option("half the --max-length", "longer rows are cut", halve_length),
)  # fmt: skip


def find_path(
    config: TrainConfig, plan: MemoryConfig, room: float, options=OPTIONS, shared: int = 0
) -> list[tuple[Option, int]] | None:
    """The cheapest options that together make a run fit, each with the bytes after it; None where none do.

    shared: tokens that all rows begin with, as in `parts.estimate`.

    They are tried in their order until the run fits, each as often as it helps; then those that turn out not to be needed are taken back.
    """

    def total(state: tuple[TrainConfig, MemoryConfig]) -> int:
        return parts.estimate(*state, shared=shared).total

    tried: list[Option] = []
    state = (config, plan)
    for option in options:
        while total(state) > room and (changed := option.change(*state)):
            if total(changed) >= total(state):
                break
            state, tried = changed, [*tried, option]
    if total(state) > room:
        return None
    for option in dict.fromkeys(tried):  # the cheap ones may not be needed once a strong one was tried
        while option in tried:
            fewer = list(tried)
            fewer.remove(option)
            if apply(fewer, config, plan) is None or total(apply(fewer, config, plan)) > room:
                break
            tried = fewer
    return [(option, total(apply(tried[:number], config, plan))) for number, option in enumerate(tried, 1)]


def apply(options: list[Option], config: TrainConfig, plan: MemoryConfig) -> tuple[TrainConfig, MemoryConfig] | None:
    """The run and plan after these options; None where one can't be applied."""
    state = (config, plan)
    for option in options:
        state = option.change(*state)
        if state is None:
            return None
    return state


def write_flags(before: TrainConfig, after: TrainConfig) -> str:
    """The options in which two runs differ, as flags of `sftlab train`."""
    changed = [(field.name, getattr(after, field.name)) for field in dataclasses.fields(after)
               if getattr(before, field.name) != getattr(after, field.name)]  # fmt: skip
    words = []
    for name, value in changed:
        flag = name.replace("_", "-")
        words.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(words)


def advise(config: TrainConfig, plan: MemoryConfig, room: float, length: int | None = None, shared: int = 0) -> str:
    """The cheapest change that makes a run fit, in a sentence. length: of its sequences, where that is known."""
    options = OPTIONS[:-1] if length else OPTIONS
    return tell_path(replace(config, max_length=max(8, length or config.max_length)), plan, room, options, shared)[0]


def tell_path(config: TrainConfig, plan: MemoryConfig, room: float, options=OPTIONS, shared: int = 0) -> list[str]:
    """What to add so that a run fits, in a line, then each option of it with its cost."""
    path = find_path(config, plan, room, options, shared)
    if path is None:
        return [f"nothing makes it fit in {room / 1e9:.1f} GB on {plan.devices} device(s). Take larger ones, more of them (--devices), "
                 "or a smaller model."]  # fmt: skip
    after, new_plan = apply([option for option, _ in path], config, plan)
    flags = write_flags(config, after)
    zero = f"ZeRO-{new_plan.zero} over {plan.devices} devices" if new_plan.zero != plan.zero else ""
    lines = [f"to make it fit, add: {' and '.join(part for part in (flags, zero) if part)}"]
    return lines + [f"  {option.flags}: {total / 1e9:.2f} GB; costs {option.cost}" for option, total in path]


def describe_advice(config: TrainConfig, plan: MemoryConfig, room: float) -> list[str]:
    """The advice as lines: the path, then what each option alone would bring."""
    lines = [*tell_path(config, plan, room), "each alone:"]
    for option in OPTIONS:
        if changed := option.change(config, plan):
            total = parts.estimate(*changed).total
            lines.append(f"  {option.flags:<64}{total / 1e9:>9.2f} GB")
    return lines


SIZES = (8, 16, 24, 40, 80, 141)  # GB of the GPUs that are about: RTX, T4, 4090, A100, A100 and H100, H200
LARGEST, LONGEST = 4096, 131072  # batch, and tokens of a sequence, where the model sets no end
METHODS = (
    ("full", {"use_lora": False, "use_dora": False, "use_rslora": False}),
    ("LoRA", {"use_lora": True}),
    ("LoRA, 8 bits", {"use_lora": True, "use_8bit": True}),
    ("LoRA, 4 bits", {"use_lora": True, "use_4bit": True}),
)


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
    if plan.zero == 3 and (config.use_4bit or config.use_8bit):
        raise UserError(
            "zero: stage 3 shards pieces of every weight, and a quantised one is whole on each device; take --zero 2."
        )
    if config.deepspeed and not plan.zero:
        plan = replace(
            plan,
            zero=deepspeed_configs.find_stage(config.deepspeed),
            offload=deepspeed_configs.offloads(config.deepspeed),
        )
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
            lines += describe_advice(config, plan, room)
    lines.append(f"\non a GPU{', each' if plan.devices > 1 else ''}:")
    for name, total, size in list_methods(config, plan):
        lines.append(
            f"  {name:<24}{total / 1e9:>10.1f} GB  {f'fits in {size} GB' if size else f'more than {SIZES[-1]} GB'}"
        )
    return lines
