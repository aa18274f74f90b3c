"""What to do when a run doesn't fit: the cheapest options that make it fit, as flags, and what each would bring.

python -c "from sftlab.memory import advice; help(advice.find_path)"
"""

from dataclasses import asdict, dataclass, replace

from sftlab import machine
from sftlab.config import deepspeed
from sftlab.config.configs import MemoryConfig, TrainConfig
from sftlab.errors import UserError
from sftlab.memory.dry_run import estimate
from sftlab.models import load

SIZES = (8, 16, 24, 40, 80, 141)  # GB of the GPUs that are about: RTX, T4, 4090, A100, A100 and H100, H200
LARGEST, LONGEST = 4096, 131072  # batch, and tokens of a sequence, where the model sets no end
METHODS = {
    "full": {"use_lora": False, "use_dora": False, "use_rslora": False},
    "LoRA": {"use_lora": True},
    "LoRA, 8 bits": {"use_lora": True, "use_8bit": True},
    "LoRA, 4 bits": {"use_lora": True, "use_4bit": True},
}


@dataclass(frozen=True)
class Option:
    """An option, what it costs, and the run and its plan with it. shared: as in `dry_run.estimate`."""

    flags: str
    cost: str
    run: TrainConfig
    plan: MemoryConfig
    shared: int = 0

    @property
    def total(self) -> int:
        return estimate(self.run, self.plan, shared=self.shared).total


def list_options(start: Option, may_cut: bool = True) -> list[Option]:
    """List the options that would change a run, cheapest first. may_cut: whether rows may become shorter."""
    run, plan = start.run, start.plan
    length = run.max_length // 2
    steps = run.gradient_accumulation_steps * 2
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
    names = [option.flags for option in path[1:]]
    for name in dict.fromkeys(names):
        while name in names:
            fewer = list(names)
            fewer.remove(name)
            shorter = follow(start, fewer)
            if shorter is None or shorter[-1].total > room:
                break
            names = fewer
    return follow(start, names)[1:]


def follow(start: Option, names: list[str]) -> list[Option] | None:
    """Apply the options of these names one after the other; None where one of them can't be applied."""
    path = [start]
    for name in names:
        option = next((option for option in list_options(path[-1]) if option.flags == name), None)
        if option is None:
            return None
        path.append(option)
    return path


def write_flags(before: TrainConfig, after: TrainConfig) -> str:
    """Write the options in which two runs differ as flags of `sftlab train`."""
    words = []
    for name, value in asdict(after).items():
        flag = name.replace("_", "-")
        if value != getattr(before, name):
            words.append(f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(words)


def advise(config: TrainConfig, plan: MemoryConfig, room: float, length: int | None = None, shared: int = 0) -> str:
    """Say in a sentence what to add so that a run fits. length: of its sequences, where that is known."""
    config = replace(config, max_length=max(8, length or config.max_length))
    return format_path(Option("", "", config, plan, shared), room, may_cut=not length)[0]


def format_path(start: Option, room: float, may_cut: bool = True) -> list[str]:
    """Write what to add so that a run fits in a line, then each option of it with its cost."""
    path = find_path(start, room, may_cut)
    if path is None:
        devices = f"{start.plan.devices} device(s). Take larger ones, more of them (--devices), or a smaller model."
        return [f"nothing makes it fit in {room / 1e9:.1f} GB on {devices}"]
    end = path[-1] if path else start
    added = [write_flags(start.run, end.run)]
    if end.plan.zero != start.plan.zero:
        added.append(f"ZeRO-{end.plan.zero} over {end.plan.devices} devices")
    lines = [f"  {option.flags}: {option.total / 1e9:.2f} GB; costs {option.cost}" for option in path]
    return [f"to make it fit, add: {' and '.join(filter(None, added))}", *lines]


def describe_advice(config: TrainConfig, plan: MemoryConfig, room: float) -> list[str]:
    """Write the advice as lines: what to add, then what each option alone would bring."""
    start = Option("", "", config, plan)
    alone = [f"  {option.flags:<64}{option.total / 1e9:>9.2f} GB" for option in list_options(start)]
    return [*format_path(start, room), "each alone:", *alone]


def find_largest(config: TrainConfig, plan: MemoryConfig, room: float) -> tuple[int, int]:
    """Find the largest batch at max_length and the longest sequence at this batch size that fit in `room` bytes, or 0.

    No sequence is longer than the model has positions for, and no batch larger than LARGEST. The length is found in steps of 8
    tokens, both to one part in 64.
    """

    def fits(batch_size: int, length: int) -> float:
        return room - estimate(replace(config, batch_size=batch_size, max_length=length), plan).total

    settings = load.read_settings(config.model_name, config.trust_remote_code).get_text_config()
    longest = getattr(settings, "max_position_embeddings", None) or LONGEST
    batch = find_last(lambda count: fits(count, config.max_length), LARGEST, config.batch_size)
    eights = find_last(lambda count: fits(config.batch_size, 8 * count), longest // 8, config.max_length // 8)
    return batch, 8 * eights


def find_last(left, most: int, tried: int) -> int:
    """Find the last number up to `most` at which something is left, to one part in 64, or 0.

    left: falls with the number, nearly along a straight line, which is followed from `tried` on.
    """
    found, last, too_many = {}, 0, most + 1
    while too_many - last > (least := max(1, last // 64)):
        tried = min(max(tried, last + least), too_many - 1)
        found[tried] = left(tried)
        last, too_many = (tried, too_many) if found[tried] >= 0 else (last, tried)
        near = sorted(found, key=lambda number: abs(found[number]))[:2]
        if len(near) == 2 and len(found) < 8 and (fall := found[near[0]] - found[near[1]]):
            tried = near[0] + int(found[near[0]] * (near[1] - near[0]) / fall)
        else:  # no line yet, or it doesn't lead there
            tried = 2 * last if too_many > most else (last + too_many) // 2
    return last


def list_methods(config: TrainConfig, plan: MemoryConfig) -> list[tuple[str, int, int | None]]:
    """List (method, bytes per GPU, the smallest of SIZES that holds it or None), for the same model, batch and length."""
    methods = []
    for name, changes in METHODS.items():
        run = replace(config, **{"use_4bit": False, "use_8bit": False} | changes)
        stage = min(plan.zero, 2) if run.use_4bit or run.use_8bit else plan.zero
        total = estimate(run, replace(plan, device="gpu", zero=stage)).total
        methods.append((name, total, next((size for size in SIZES if total <= size * 1e9), None)))
    return methods


def format_estimate(config: TrainConfig, plan: MemoryConfig) -> list[str]:
    """Write the estimate as lines for a terminal: parts, what fits where, and advice where it doesn't."""
    if config.deepspeed and not plan.zero:
        stage, offload = deepspeed.find_stage(config.deepspeed), deepspeed.offloads(config.deepspeed)
        plan = replace(plan, zero=stage, offload=offload)
    if plan.zero == 3 and (config.use_4bit or config.use_8bit):
        words = "stage 3 shards every weight, and a quantised one is whole on each device"
        raise UserError(f"zero: {words}; take --zero 2.")
    whole, gpu = estimate(config, plan), plan.device == "gpu"
    bf16 = "bfloat16" if load.choose_precision(config, plan.device)[0] else "float32"
    where = f"each of {plan.devices} devices, ZeRO-{plan.zero}" if plan.devices > 1 else f"one {plan.device.upper()}"
    batches = f"batches of {config.batch_size} x {config.max_length} tokens"
    sizes = (whole.parts | {"peak": whole.total}).items()
    lines = [
        f"{config.model_name} on {where}: {batches}, computed in {bf16}, {whole.trained_parameters:,} parameters trained",
        *(f"  {name:<24}{size / 1e9:>10.3f} GB" for name, size in sizes),
    ]
    room = plan.room * 1e9 if plan.room else machine.find_limit(gpu)
    if not gpu:
        kept = f"kept for speed, it may be up to twice that (room: {room / 1e9:.1f} GB)"
        lines.append(f"  This is with freed memory given back; {kept}.")
    if room:
        batch, length = find_largest(config, plan, room)
        lines.append(f"{'fits' if whole.total <= room else 'does not fit'} in {room / 1e9:.1f} GB")
        largest = f"largest batch at {config.max_length} tokens: {batch or 'none'}"
        lines.append(f"{largest}; longest sequences at a batch of {config.batch_size}: {length or 'none'}")
        if whole.total > room:
            lines += describe_advice(config, plan, room)
    lines.append(f"\non a GPU{', each' if plan.devices > 1 else ''}:")
    for name, total, size in list_methods(config, plan):
        fits = f"fits in {size} GB" if size else f"more than {SIZES[-1]} GB"
        lines.append(f"  {name:<24}{total / 1e9:>10.1f} GB  {fits}")
    return lines
