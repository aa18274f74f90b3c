"""The form of a training's hyperparameters, for a notebook: edit, see what it comes to, take it elsewhere, start it.

The form edits one configuration, `form.config`, which is always the last valid one; only its Start button runs anything.
The fields come from `TrainConfig`; the browser's part is in `sftlab/course/form`. Where nobody is there to fill in a form
(papermill, nbval, `sftlab run`) none is shown, and the configuration goes on as it is.

    form = widgets.hyperparameters(TrainConfig(use_lora=True)); form
"""

import dataclasses
import functools
import re
import types
import typing
from pathlib import Path

import anywidget
import ipywidgets
import traitlets

from sftlab import files
from sftlab.config import conflicts, presets
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config import text as config_text
from sftlab.config.configs import GROUPS, LaunchConfig, TrainConfig
from sftlab.config.options import check_value
from sftlab.course import form_worker
from sftlab.data.dataset import FACTS
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.runs.panel import has_reader

BROWSER = Path(__file__).resolve().parent / "form"
GIVEN, DEFAULTS = "as given", "all defaults"  # two presets that the form itself has
FROM = "# edited in a form that was given "  # how a saved file begins
WORKING = "working it out …"


class Controls(anywidget.AnyWidget):
    """The part of the form that is drawn in the browser. It sends messages; all that it shows is in these traits."""

    _esm, _css = BROWSER / "form.js", BROWSER / "form.css"
    fields = traitlets.List().tag(sync=True)
    presets = traitlets.List().tag(sync=True)
    opened = traitlets.List(["model", "data", "LoRA", "optimisation"]).tag(sync=True)
    state = traitlets.Dict().tag(sync=True)
    figures = traitlets.Dict({"rows": [], "words": ""}).tag(sync=True)


@dataclasses.dataclass(frozen=True)
class Unshown:
    """What stands for the form where nobody could fill it in; `config` is the configuration as it was given."""

    config: TrainConfig

    def _ipython_display_(self) -> None:
        """Nothing: the line that `hyperparameters` printed has said all."""


def hyperparameters(config: TrainConfig, notebook=None, *, saved=None, launch: LaunchConfig | None = None):
    """A form for a configuration, to be shown as the last line of a cell; `.config` is the present one.

    notebook: the one whose papermill command is shown (default: 08); saved: a YAML file that keeps what is edited, from which
    the form goes on after the kernel was restarted, as long as the same configuration is given; launch: how several devices are started, for Start, too.
    """
    if has_reader():
        return make_form(config, notebook, saved=saved, launch=launch)
    print(f"nobody is here to fill in a form: the configuration goes on as it was given ({config.hash()})")
    return Unshown(config)


@dataclasses.dataclass
class Draft:
    """What a form is made of: what it was given, the texts in its fields, and the parts that it's shown with.

    revision: rises when the texts change from here, which tells the browser to write them into its fields.
    """

    given: TrainConfig
    notebook: str | Path | None
    saved: Path | None
    launch: LaunchConfig | None
    texts: dict[str, str]
    controls: Controls
    area: ipywidgets.VBox
    form: ipywidgets.VBox
    worker: form_worker.Worker
    revision: int = 0


def make_form(config: TrainConfig, notebook=None, *, saved=None, launch: LaunchConfig | None = None) -> ipywidgets.VBox:
    """The form of `hyperparameters`, whoever is there. `form.take(message)` does what a message from the browser asks for."""
    edited = read_saved(Path(saved), config) if saved else None
    controls = Controls(
        fields=describe(),
        presets=[{"name": GIVEN, "title": "what the notebook gave"}, {"name": DEFAULTS, "title": "of `sftlab train`"},
                 *({"name": preset.name, "title": presets.say(preset)} for preset in presets.PRESETS)],
    )  # fmt: skip
    area = ipywidgets.VBox()
    form = ipywidgets.VBox([controls, area])
    form.config = edited or config

    def tell(rows: list[dict], done: bool) -> None:
        controls.figures = {"rows": rows, "words": "" if done else WORKING}

    draft = Draft(config, notebook, Path(saved) if saved else None, launch, to_texts(form.config), controls, area,
                  form, form_worker.Worker(tell))  # fmt: skip
    form.take, form.worker = functools.partial(take, draft), draft.worker
    controls.on_msg(lambda _, message, buffers: take(draft, message))
    show(draft, f"goes on from {saved}; the preset {GIVEN!r} goes back to what the notebook gave" if edited else "")
    return form


def take(draft: Draft, message: dict) -> None:
    """Do what the browser asks for: set (name to text), reset (a name), preset (a name), start."""
    if "set" in message:
        typed = {name: str(text) for name, text in message["set"].items() if name in draft.texts}
        if message.get("fill"):
            return fill(draft, typed)
        draft.texts.update(typed)
        show(draft)
    elif message.get("reset") in draft.texts:
        name = message["reset"]
        fill(draft, {name: to_text(FIELDS[name].default)})
    elif "preset" in message:
        use_preset(draft, message["preset"])
    elif "start" in message:
        start(draft)


def fill(draft: Draft, texts: dict[str, str], notice: str = "") -> None:
    """Put texts into fields."""
    draft.texts.update(texts)
    draft.revision += 1
    show(draft, notice)


def use_preset(draft: Draft, name: str) -> None:
    """Fill in what a preset sets, and say what that changed."""
    if name in (GIVEN, DEFAULTS):
        config = draft.given if name == GIVEN else TrainConfig()
        return fill(draft, to_texts(config), f"{name}: all options set")
    preset = presets.find_preset(name)
    changes = ", ".join(presets.list_changes(draft.form.config, preset)) or "nothing to change"
    texts = {option: to_text(value) for option, value in preset.options.items()}
    fill(draft, texts, f"{name} ({presets.say(preset)}): {changes}")


def start(draft: Draft) -> None:
    """Start the run of the present configuration, and show its panel below; what is refused is said beside the button."""
    if read(draft.texts, draft.form.config).config is None:
        return show(draft)
    from sftlab.runs import background, panel

    try:
        run = background.start(draft.form.config, draft.launch)
    except UserError as error:
        return show(draft, said=str(error))
    draft.area.children = [panel.make_panel(run)]
    show(draft, said=f"started: {draft.form.config.output_dir}")


def show(draft: Draft, notice: str = "", said: str = "") -> None:
    """Read what is typed, keep it if it's valid, and show all that follows from it. said: what stands beside Start."""
    form, controls = draft.form, draft.controls
    reading = read(draft.texts, form.config)
    if reading.config is None:
        form_worker.drop(draft.worker)
        controls.figures = {"rows": [], "words": "known when the marked fields are mended"}
    elif reading.config != form.config or controls.figures["words"] != WORKING and not controls.figures["rows"]:
        form.config = reading.config
        form_worker.drop(draft.worker)  # first, or an answer to an earlier question could still come in between
        controls.figures = {"rows": [], "words": WORKING}
        form_worker.ask(draft.worker, form.config)
        if draft.saved:
            text = config_text.write(form.config, everything=True)
            files.write_text(draft.saved, f"{FROM}{draft.given.hash()}\n{text}")
    offers = offer_folder(draft.texts, form.config)
    said = said or "; ".join(offer["words"] for offer in offers.values())
    launch = draft.launch or LaunchConfig(gpus_per_node=count_gpus())
    controls.state = {
        "revision": draft.revision, "texts": dict(draft.texts), "changed": reading.changed, "problems": reading.problems,
        "offers": offers, "notice": notice, "ready": reading.config is not None,
        "why": f"mend first: {', '.join(reading.problems)}" if reading.problems else said,
        "place": f"To be run in {Path.cwd()}" + ("; of the last valid configuration" if reading.problems else ""),
        "forms": config_text.list_forms(form.config, launch, draft.notebook, draft.given),
    }  # fmt: skip


def offer_folder(texts: dict[str, str], config: TrainConfig) -> dict:
    """A free name where the run folder exists, unless it is gone on in or replaced on purpose."""
    if config.resume or config.overwrite or not (free := find_free(texts["output_dir"])):
        return {}
    return {"output_dir": {"words": f"{texts['output_dir']} exists, and stays as it is; take {free}", "text": free}}


def read_saved(path: Path, given: TrainConfig) -> TrainConfig | None:
    """What was edited before, if the form was given the same then; other parameters of the notebook begin anew."""
    if not path.is_file() or not path.read_text(encoding="utf-8").startswith(f"{FROM}{given.hash()}\n"):
        return None
    return config_text.build(path)


def count_gpus() -> int:
    from sftlab.runs import launcher

    return launcher.count_gpus()


AUTO = {"": "auto", "true": "yes", "false": "no"}  # of a bool that may be left to the machine
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}


def describe() -> list[dict]:
    """What a browser needs to draw each control: name, group, kind (text, number, choice, flag), choices, suggestions, help,
    range and default in words."""
    fields = sorted(FIELDS.values(), key=lambda field: GROUPS.index(field.metadata["group"]))
    return [describe_field(field) for field in fields]


def describe_field(field: dataclasses.Field) -> dict:
    kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
    open_bool = kind is bool and isinstance(field.type, types.UnionType)
    choices = AUTO if open_bool else {choice: choice for choice in field.metadata["choices"]}
    shape = "choice" if choices else "flag" if kind is bool else "number" if kind in (int, float) else "text"
    suggestions = {
        "model_name": [model.hub_id for model in catalog.MODELS],
        "deepspeed": deepspeed_configs.list_names(),
    }
    return {
        "name": field.name, "group": field.metadata["group"], "kind": shape, "choices": list(choices.items()),
        "suggestions": suggestions.get(field.name, []), "help": field.metadata["help"], "range": tell_range(field, kind),
        "default": choices.get(to_text(field.default)) or tell(field.default),
    }  # fmt: skip


def tell_range(field: dataclasses.Field, kind: type) -> str:
    """What a number may be, in words: `a whole number, at least 1`."""
    if kind not in (int, float):
        return ""
    low, high = field.metadata["low"], field.metadata["high"]
    sort = "a whole number" if kind is int else "a number"
    limits = [f"at least {low:.10g}"] if low is not None else []
    return ", ".join([sort, *(limits if high is None else [f"{low:.10g} to {high:.10g}"])])


def tell(value: object) -> str:
    """A default in words."""
    return {None: "empty", True: "on", False: "off"}[value] if value is None or value is True or value is False else to_text(value)  # fmt: skip


def to_text(value: object) -> str:
    """A value as it's typed; `check_value` reads it back as the same."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_texts(config: TrainConfig) -> dict[str, str]:
    return {name: to_text(getattr(config, name)) for name in FIELDS}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What was typed, read: the configuration, or None where something is refused; the reason for each option concerned;
    and the options that are not at their default."""

    config: TrainConfig | None
    problems: dict[str, str]
    changed: list[str]


def read(texts: dict[str, str], last: TrainConfig) -> Reading:
    """Read all that is typed. last: the last valid configuration, which stands in for what is refused when conflicts are sought."""
    values, problems = {}, {}
    for name, field in FIELDS.items():
        try:
            values[name] = check_value(field, texts[name])
        except UserError as error:
            problems[name] = str(error)
    refused = set(problems)
    changed = [name for name in FIELDS if name in refused or values[name] != FIELDS[name].default]
    stand_in = types.SimpleNamespace(**dataclasses.asdict(last) | values)
    try:
        for conflict in conflicts.find(stand_in):
            named = find_options(" ".join(conflict.options), str(conflict))
            concerned = [
                name for name in named if name in changed or f"no {name}" in conflict.options
            ]  # not: A of `A or B`
            problems = {name: str(conflict) for name in concerned or named} | problems
        config = TrainConfig(**values) if not problems else None
    except UserError as error:
        config, problems = None, problems | {name: str(error) for name in find_options(str(error).split(":")[0], "")}
    return Reading(config, problems, changed)


def find_options(words: str, others: str) -> list[str]:
    """The options that are named in `words`; if there are none in them, those in `others`, else the first one of all."""
    for text in (words, others):
        if found := [name for name in re.findall(r"\w+", text) if name in FIELDS]:
            return found
    return ["model_name"]


def find_free(folder: str) -> str | None:
    """Another name for a run folder that exists and holds something: the next one with a number; None for one that is free."""

    def is_free(path: Path) -> bool:
        return not path.exists() or path.is_dir() and not any(path.iterdir())

    if is_free(Path(folder)):
        return None
    stem, number = re.fullmatch(r"(.*?)(?:-(\d+))?", folder.rstrip("/"), re.DOTALL).groups()
    count = int(number or 1) + 1
    while not is_free(Path(f"{stem}-{count}")):
        count += 1
    return f"{stem}-{count}"


@functools.lru_cache(maxsize=4)
def read_lengths(path: str, changed: int, max_length: int, packing: bool) -> tuple[list[int], list[int], float, int]:
    """(tokens of each training row, of each held-out row, share of tokens that is trained, tokens that all rows begin with)
    of a prepared set.

    changed: when the set was made, so that one made anew is read anew.
    """
    from sftlab.data import dataset
    from sftlab.train import trainer

    splits, report = dataset.load_prepared(path)
    train, test = (trainer.cut_rows(splits[name], max_length, whole=packing) for name in ("train", "test"))
    counts = report["splits"]["train"]
    shared = trainer.count_shared(train[0], test[0])
    return train[1], test[1], counts["trained_tokens"] / counts["tokens"], shared


def find_lengths(config: TrainConfig) -> tuple[list[int], list[int], float, int]:
    """`read_lengths` of a configuration's set, the held-out rows as many as are looked at, and only the tokens that its batches
    hold once. Raises UserError without a set.
    """
    from sftlab.train import trainer

    facts = Path(config.dataset_path) / FACTS
    changed = facts.stat().st_mtime_ns if facts.is_file() else 0
    train, test, share, shared = read_lengths(config.dataset_path, changed, config.max_length, config.packing)
    if not train:
        raise UserError(f"max_length: within {config.max_length} tokens no row has an answer left; raise it.")
    shared = trainer.limit_shared(config, shared)
    return train, test[: config.eval_samples or len(test)], share, shared


@functools.lru_cache(maxsize=32)
def build_empty(**options: object):
    from sftlab.memory import dry_run

    config = TrainConfig(**options)
    settings = dry_run.read_settings(config.model_name, config.trust_remote_code)
    return dry_run.build(config, settings, settings.get_text_config().num_hidden_layers)


def build_model(config: TrainConfig):
    """The model of a run without bytes, not quantised, with its adapters. Raises UserError for one that can't be had."""
    from sftlab.memory import dry_run

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
    from sftlab.memory import duration
    from sftlab.train import distributed

    processes = distributed.read_world().size
    epoch, steps = duration.count_steps(config, lengths, processes)
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

    from sftlab import machine
    from sftlab.memory import advice, dry_run, parts
    from sftlab.train import forecast

    gpu = torch.cuda.is_available()
    plan, bf16 = forecast.make_plan(config, gpu), wants_bf16(config)
    run, length, share, shared = dataclasses.replace(config, bf16=bf16), None, 1.0, 0
    try:
        if lengths:
            tokens, share = forecast.fill_batch(config, lengths[0], lengths[2], bf16)
            length, shared = -(-tokens // config.batch_size), lengths[3]
        total = parts.estimate(run, plan, length, share, shared).total
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
    yield figure("advice", advice.advise(run, plan, room, length), bad=True)


def wants_bf16(config: TrainConfig) -> bool:
    """Whether the run computes in bfloat16, here."""
    from sftlab.models import load

    return load.choose_precision(config)[0]


@functools.lru_cache(maxsize=2)
def measure_rate(bf16: bool, gpu: bool) -> float:
    """Measured once, or the time would change with what else the machine does, and seem to depend on an option."""
    from sftlab.memory import duration

    return duration.measure_rate(bf16, gpu)


def time_run(config: TrainConfig, lengths) -> dict:
    import torch

    from sftlab.memory import duration
    from sftlab.train import distributed

    gpu, bf16 = torch.cuda.is_available(), wants_bf16(config)
    rate, device = measure_rate(bf16, gpu), "cuda" if gpu else "cpu"
    expected, _ = duration.expect(
        config,
        build_model(config),
        lengths[0],
        lengths[1],
        bf16,
        device,
        rate,
        lengths[3],
        distributed.read_world().size,
    )
    note = "on this machine as it is now, a third less to half as much again; beside it some seconds to load"
    return figure("time", f"about {duration.say(expected['expected_seconds'])}", note)
