"""What a run would come to, for a form to show while one types: trained parameters, steps, memory, time.

python -c "from sftlab import form_estimate as f, config; print(*f.find_figures(config.TrainConfig()), sep='\\n')"
"""

import dataclasses
import functools
import typing
from pathlib import Path

from sftlab.config import TrainConfig
from sftlab.options import UserError
from sftlab.prepared import FACTS


@functools.lru_cache(maxsize=4)
def read_lengths(path: str, changed: int, max_length: int, packing: bool) -> tuple[list[int], list[int], float, int]:
    """(tokens of each training row, of each held-out row, share of tokens that is trained, tokens that all rows begin with)
    of a prepared set.

    changed: when the set was made, so that one made anew is read anew.
    """
    from sftlab import batches, data

    splits, report = data.load_prepared(path)
    train, test = (batches.cut_rows(splits[name], max_length, whole=packing) for name in ("train", "test"))
    counts = report["splits"]["train"]
    shared = batches.count_shared(train[0], test[0])
    return train[1], test[1], counts["trained_tokens"] / counts["tokens"], shared


def find_lengths(config: TrainConfig) -> tuple[list[int], list[int], float, int]:
    """`read_lengths` of a configuration's set, the held-out rows as many as are looked at, and only the tokens that its batches
    hold once. Raises UserError without a set.
    """
    from sftlab import batches

    facts = Path(config.dataset_path) / FACTS
    changed = facts.stat().st_mtime_ns if facts.is_file() else 0
    train, test, share, shared = read_lengths(config.dataset_path, changed, config.max_length, config.packing)
    if not train:
        raise UserError(f"max_length: within {config.max_length} tokens no row has an answer left; raise it.")
    shared = batches.limit_shared(config, shared)
    return train, test[: config.eval_samples or len(test)], share, shared


@functools.lru_cache(maxsize=32)
def build_empty(**options: object):
    from sftlab import dry_run

    config = TrainConfig(**options)
    settings = dry_run.read_settings(config.model_name, config.trust_remote_code)
    return dry_run.build(config, settings, settings.get_text_config().num_hidden_layers)


def build_model(config: TrainConfig):
    """The model of a run without bytes, not quantised, with its adapters. Raises UserError for one that can't be had."""
    from sftlab import dry_run

    names = ("model_name", "trust_remote_code", "use_lora", "lora_r", "lora_target_modules", "use_dora")
    with dry_run.counting(config):
        return build_empty(**{name: getattr(config, name) for name in names})


def find_figures(config: TrainConfig) -> typing.Iterator[dict]:
    """What a run on this machine, in one process, would come to: {name, value, note, bad} for each figure, as they come.

    A figure that can't be had says why; none of them fails.
    """
    try:
        lengths = find_lengths(config)
        yield count_steps(config, lengths[0])
    except UserError as error:
        lengths = None
        yield figure("steps", "not known", error, bad=True)
    try:
        yield count_parameters(config)
        if lengths:
            yield time_run(config, lengths)
        yield from weigh(config, lengths)
    except UserError as error:
        yield figure("model", "can't be counted", error, bad=True)


def figure(name: str, value: object, note: object = "", bad: bool = False) -> dict:
    return {"name": name, "value": str(value), "note": str(note), "bad": bad}


def count_steps(config: TrainConfig, lengths: list[int]) -> dict:
    from sftlab import distributed, run_time

    processes = distributed.read_world().size
    epoch, steps = run_time.count_steps(config, lengths, processes)
    each = config.batch_size * config.gradient_accumulation_steps * processes
    kind = "packed sequences" if config.packing else "rows"
    return figure("steps", f"{steps:,}", f"{epoch:,} in an epoch of {len(lengths):,} rows; {kind} in a step: {each}")


def count_parameters(config: TrainConfig) -> dict:
    weights = list(build_model(config).parameters())
    trained = sum(weight.numel() for weight in weights if weight.requires_grad)
    base = sum(weight.numel() for weight in weights) - (trained if config.use_lora else 0)
    return figure("trained parameters", f"{trained:,}", f"{100 * trained / base:.2g} % of the model's {base:,}")


def weigh(config: TrainConfig, lengths) -> typing.Iterator[dict]:
    """The peak of memory against this machine's room; where it doesn't fit, then also the cheapest flags that make it fit."""
    import torch

    from sftlab import dry_run, machine, memory, memory_advice, run_memory

    gpu = torch.cuda.is_available()
    plan, bf16 = run_memory.make_plan(config, gpu), wants_bf16(config)
    run, length, share, shared = dataclasses.replace(config, bf16=bf16), None, 1.0, 0
    try:
        if lengths:
            tokens, share = run_memory.fill_batch(config, lengths[0], lengths[2], bf16)
            length, shared = -(-tokens // config.batch_size), lengths[3]
        total = memory.estimate(run, plan, length, share, shared).total
    except dry_run.CantCount as error:
        yield figure("memory", "not estimated", error)
        return
    room = machine.free_memory(True) if gpu else machine.find_limit(False)
    note = f"in the {room / 1e9:.1f} GB that {'the GPU' if gpu else 'this machine'} has free; computed in {'bfloat16' if bf16 else 'float32'}"
    note += "" if lengths else ", with every row at max_length"
    if total <= room:
        yield figure("memory", f"{total / 1e9:.2f} GB: fits", note)
        return
    yield figure("memory", f"{total / 1e9:.2f} GB: does not fit", note, bad=True)
    yield figure("advice", memory_advice.advise(run, plan, room, length), bad=True)


def wants_bf16(config: TrainConfig) -> bool:
    """Whether the run computes in bfloat16, here."""
    from sftlab import models

    return models.choose_precision(config)[0]


@functools.lru_cache(maxsize=2)
def measure_rate(bf16: bool, gpu: bool) -> float:
    """Measured once, or the time would change with what else the machine does, and seem to depend on an option."""
    from sftlab import run_time

    return run_time.measure_rate(bf16, gpu)


def time_run(config: TrainConfig, lengths) -> dict:
    import torch

    from sftlab import run_time

    gpu, bf16 = torch.cuda.is_available(), wants_bf16(config)
    rate, device = measure_rate(bf16, gpu), "cuda" if gpu else "cpu"
    expected, _ = run_time.expect(config, build_model(config), lengths[0], lengths[1], bf16, device, rate, lengths[3])
    note = "on this machine as it is now, a third less to half as much again; beside it some seconds to load"
    return figure("time", f"about {run_time.say(expected['expected_seconds'])}", note)
