"""What to do when a run doesn't fit: the levers, cheapest first, with the exact flags and what each would bring.

python -c "from sftlab import memory_advice; print(*[lever.flags for lever in memory_advice.LEVERS], sep='\\n')"
"""

import dataclasses
import typing
from dataclasses import dataclass, replace

from sftlab import memory
from sftlab.config import MemoryConfig, TrainConfig


@dataclass(frozen=True)
class Lever:
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
    """The change to a base in 8 or 4 bits, with LoRA only, and not in pieces (ZeRO-3)."""

    def change(config: TrainConfig, plan: MemoryConfig):
        if not config.use_lora or plan.zero == 3 or config.use_4bit or getattr(config, option):
            return None
        return replace(config, **{"use_8bit": False, "use_4bit": False, option: True}), plan

    return change


def share_out(stage: int):
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


LEVERS = (
    Lever("--bf16", "no quality, as a rule", compute_low),
    Lever("--gradient-checkpointing", "a third to a half more time; the same result", set_options(gradient_checkpointing=True)),
    Lever("half the --batch-size, twice the --gradient-accumulation-steps", "some speed; the same steps", halve_batch),
    Lever("--deepspeed with ZeRO-2", "some communication; the same result", share_out(2)),
    Lever("--deepspeed with ZeRO-3", "more communication; the same result", share_out(3)),
    Lever("--optim adamw_8bit", "a little precision of the optimizer's state", small_state),
    Lever("--use-lora", "another method: few weights are trained, at a higher --learning-rate",
          set_options(use_lora=True)),
    Lever("--use-8bit", "a little quality, and time", quantise("use_8bit")),
    Lever("--use-4bit", "a little quality: measure it", quantise("use_4bit")),
    Lever("half the --max-length", "longer rows are cut", halve_length),
)  # fmt: skip


def find_path(
    config: TrainConfig, plan: MemoryConfig, room: float, levers=LEVERS, shared: int = 0
) -> list[tuple[Lever, int]] | None:
    """The cheapest levers that together make a run fit, each with the bytes after it; None where none do.

    shared: tokens that all rows begin with, as in `memory.estimate`.

    They are pulled in their order until the run fits, each as often as it helps; then those that turn out not to be needed are taken back.
    """

    def total(state: tuple[TrainConfig, MemoryConfig]) -> int:
        return memory.estimate(*state, shared=shared).total

    pulled: list[Lever] = []
    state = (config, plan)
    for lever in levers:
        while total(state) > room and (changed := lever.change(*state)):
            if total(changed) >= total(state):
                break
            state, pulled = changed, [*pulled, lever]
    if total(state) > room:
        return None
    for lever in dict.fromkeys(pulled):  # the cheap ones may not be needed once a strong one was pulled
        while lever in pulled:
            fewer = list(pulled)
            fewer.remove(lever)
            if apply(fewer, config, plan) is None or total(apply(fewer, config, plan)) > room:
                break
            pulled = fewer
    return [(lever, total(apply(pulled[:number], config, plan))) for number, lever in enumerate(pulled, 1)]


def apply(levers: list[Lever], config: TrainConfig, plan: MemoryConfig) -> tuple[TrainConfig, MemoryConfig] | None:
    """The run and plan after these levers; None where one can't be pulled."""
    state = (config, plan)
    for lever in levers:
        state = lever.change(*state)
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
    levers = LEVERS[:-1] if length else LEVERS
    return tell_path(replace(config, max_length=max(8, length or config.max_length)), plan, room, levers, shared)[0]


def tell_path(config: TrainConfig, plan: MemoryConfig, room: float, levers=LEVERS, shared: int = 0) -> list[str]:
    """What to add so that a run fits, in a line, then each lever of it with its cost."""
    path = find_path(config, plan, room, levers, shared)
    if path is None:
        return [f"nothing makes it fit in {room / 1e9:.1f} GB on {plan.devices} device(s). Take larger ones, more of them (--devices), "
                 "or a smaller model."]  # fmt: skip
    after, new_plan = apply([lever for lever, _ in path], config, plan)
    flags = write_flags(config, after)
    zero = f"ZeRO-{new_plan.zero} over {plan.devices} devices" if new_plan.zero != plan.zero else ""
    lines = [f"to make it fit, add: {' and '.join(part for part in (flags, zero) if part)}"]
    return lines + [f"  {lever.flags}: {total / 1e9:.2f} GB; costs {lever.cost}" for lever, total in path]


def describe(config: TrainConfig, plan: MemoryConfig, room: float) -> list[str]:
    """The advice as lines: the path, then what each lever alone would bring."""
    lines = [*tell_path(config, plan, room), "each alone:"]
    for lever in LEVERS:
        if changed := lever.change(config, plan):
            total = memory.estimate(*changed).total
            lines.append(f"  {lever.flags:<64}{total / 1e9:>9.2f} GB")
    return lines
