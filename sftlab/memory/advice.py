"""What to do when a run doesn't fit: the cheapest options that make it fit, as flags, and what each would bring."""

from dataclasses import dataclass, replace

from sftlab import machine
from sftlab.config import deepspeed
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.config.text import to_flags
from sftlab.errors import UserError
from sftlab.memory.dry_run import estimate
from sftlab.models import load


@dataclass(frozen=True)
class Option:
    """A run and its plan, by which option they came about, and what that costs. shared: as in `dry_run.estimate`."""

    run: TrainConfig
    plan: MemoryConfig
    shared: int = 0
    flags: str = ""
    cost: str = ""

    @property
    def total(self) -> int:
        return estimate(self.run, self.plan, shared=self.shared).total


def list_options(start: Option, may_cut: bool = True) -> list[Option]:
    """List the options that would change a run, cheapest first. may_cut: whether rows may become shorter."""
    run, plan = start.run, start.plan
    length, steps = run.max_length // 2, run.gradient_accumulation_steps * 2
    shardable = plan.devices > 1
    quantized = run.use_4bit or run.use_8bit
    quantizable = run.use_lora and not run.use_dora and plan.zero < 3
    large_state = not run.use_lora and not plan.zero and run.optim.startswith("adamw_torch")
    rows = (  # flags, cost, the fields that are set, where it applies
        ("--bf16", "no quality, as a rule", plan.device == "gpu" and run.bf16 is False and {"bf16": True}),
        ("--gradient-checkpointing", "a third to a half more time; the same result", {"gradient_checkpointing": True}),
        (
            "half the --batch-size, twice the --gradient-accumulation-steps",
            "some speed; the same steps",
            run.batch_size % 2 == 0 and {"batch_size": run.batch_size // 2, "gradient_accumulation_steps": steps},
        ),
        ("--deepspeed with ZeRO-2", "some communication; the same result", shardable and plan.zero < 2 and {"zero": 2}),
        ("--deepspeed with ZeRO-3", "more communication; the same result", shardable and not quantized and {"zero": 3}),
        ("--optim adamw_8bit", "a little precision of the optimizer's state", large_state and {"optim": "adamw_8bit"}),
        ("--use-lora", "another method: few weights are trained, at a higher --learning-rate", {"use_lora": True}),
        ("--use-8bit", "a little quality, and time", quantizable and not quantized and {"use_8bit": True}),
        ("--use-4bit", "a little quality: measure it", quantizable and {"use_8bit": False, "use_4bit": True}),
        ("half the --max-length", "longer rows are cut", may_cut and length >= 256 and {"max_length": length}),
    )
    options = []
    for flags, cost, changes in rows:
        changes = dict(changes or {})
        new_plan = replace(plan, zero=changes.pop("zero", plan.zero))
        new_run = replace(run, **changes)
        if (new_run, new_plan) != (run, plan):
            options.append(replace(start, flags=flags, cost=cost, run=new_run, plan=new_plan))
    return options


def find_path(start: Option, room: float, may_cut: bool = True) -> list[Option] | None:
    """Find the cheapest options that together make a run fit in `room` bytes, each after those before it; None if none do.

    The cheapest one that helps is taken until the run fits; then those that turn out not to be needed are left out.
    """
    path = [start]
    while path[-1].total > room:
        better = (option for option in list_options(path[-1], may_cut) if option.total < path[-1].total)
        if (option := next(better, None)) is None:
            return None
        path.append(option)
    for option in path[1:]:
        names = [other.flags for other in path[1:]]
        names.remove(option.flags)
        shorter = follow(start, names)
        if shorter and shorter[-1].total <= room:
            path = shorter
    return path[1:]


def follow(start: Option, names: list[str]) -> list[Option] | None:
    """Apply the options of these names one after the other: the start and each; None where one of them can't be applied."""
    path = [start]
    for name in names:
        option = next((option for option in list_options(path[-1]) if option.flags == name), None)
        if option is None:
            return None
        path.append(option)
    return path


def advise(start: Option, room: float, may_cut: bool = True) -> list[str]:
    """Write what to add so that a run fits in `room` bytes in a line, then each option of it with its cost."""
    path = find_path(start, room, may_cut)
    if path is None:
        devices = f"{start.plan.devices} device(s). Take larger ones, more of them (--devices), or a smaller model."
        return [f"nothing makes it fit in {room / 1e9:.1f} GB on {devices}"]
    end = path[-1] if path else start
    added = [" ".join(to_flags(end.run, start.run))]
    if end.plan.zero != start.plan.zero:
        added.append(f"ZeRO-{end.plan.zero} over {end.plan.devices} devices")
    lines = [f"  {option.flags}: {option.total / 1e9:.2f} GB; costs {option.cost}" for option in path]
    return [f"to make it fit, add: {' and '.join(filter(None, added))}", *lines]


def find_largest(config: TrainConfig, plan: MemoryConfig, room: float, name: str, most: int) -> int:
    """Find the largest power of two up to `most` for an option at which the run fits in `room` bytes; 0: none does."""
    largest, value = 0, 1 if name == "batch_size" else 8
    while value <= most and estimate(replace(config, **{name: value}), plan).total <= room:
        largest, value = value, 2 * value
    return largest


def format_estimate(config: TrainConfig, plan: MemoryConfig) -> list[str]:
    """Write the estimate as lines for a terminal: parts, what fits where, and advice where it doesn't."""
    if config.deepspeed and not plan.zero:
        plan = replace(plan, zero=deepspeed.find_stage(config.deepspeed), offload=deepspeed.offloads(config.deepspeed))
    if plan.zero == 3 and (config.use_4bit or config.use_8bit):
        raise UserError("zero: stage 3 shards every weight, a quantised one is whole on each device; take --zero 2.")
    whole, gpu = estimate(config, plan), plan.device == "gpu"
    bf16 = "bfloat16" if load.choose_precision(config, plan.device)[0] else "float32"
    where = f"each of {plan.devices} devices, ZeRO-{plan.zero}" if plan.devices > 1 else f"one {plan.device.upper()}"
    batches = f"batches of {config.batch_size} x {config.max_length} tokens"
    lines = [
        f"{config.model_name} on {where}: {batches}, computed in {bf16}, {whole.trained_parameters:,} parameters trained",
        *(f"  {name:<24}{size / 1e9:>10.3f} GB" for name, size in whole.parts.items()),
        f"  {'peak':<24}{whole.total / 1e9:>10.3f} GB",
    ]
    if room := plan.room * 1e9 if plan.room else machine.find_limit(gpu):
        fits = whole.total <= room
        positions = load.find_positions(load.read_settings(config.model_name, config.trust_remote_code))
        batch = find_largest(config, plan, room, "batch_size", 2**12)
        length = find_largest(config, plan, room, "max_length", min(positions, 2**20))
        lines += [
            f"{'fits' if fits else 'does not fit'} in {room / 1e9:.1f} GB",
            f"largest batch of 1, 2, 4, … at {config.max_length} tokens: {batch or 'none'}",
            f"longest sequences of 8, 16, 32, … tokens at a batch of {config.batch_size}: {length or 'none'}",
        ]
        if not fits:
            lines += advise(Option(config, plan), room)
    return lines
