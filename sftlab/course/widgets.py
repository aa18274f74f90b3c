"""The form of a training's hyperparameters, for a notebook: edit, see what follows, take it elsewhere, start it.

The form edits one configuration, `form.config`, which is always the last valid one; only its Start button runs anything.
The fields come from `TrainConfig`; the browser's part is in `sftlab/course/form`. Where nobody is there to fill in a form
(papermill, nbval, `sftlab run`) none is shown, and the configuration is used as it is.

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
import torch
import traitlets

from sftlab import machine
from sftlab.config import deepspeed as deepspeed_configs
from sftlab.config import text as config_text
from sftlab.config.configs import GROUPS, LaunchConfig, TrainConfig
from sftlab.config.options import check_value
from sftlab.data import dataset, prepared
from sftlab.errors import UserError
from sftlab.hub import catalog
from sftlab.memory import dry_run, duration
from sftlab.models import load
from sftlab.runs import background, launcher, panel
from sftlab.train import forecast

BROWSER = Path(__file__).resolve().parent / "form"
AUTO = {"": "auto", "true": "yes", "false": "no"}  # of a bool that may be left to the machine
FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
SUGGESTIONS = {"model_name": [model.hub_id for model in catalog.MODELS], "deepspeed": deepspeed_configs.list_names()}
measure_rate = functools.cache(duration.measure_rate)  # or the time would seem to depend on options that don't matter


class Controls(anywidget.AnyWidget):
    """The part of the form that is drawn in the browser. It sends messages; all that it shows is in these traits."""

    _esm, _css = BROWSER / "form.js", BROWSER / "form.css"
    fields = traitlets.List().tag(sync=True)
    opened = traitlets.List(list(GROUPS[:-1])).tag(sync=True)  # all but hardware
    state = traitlets.Dict().tag(sync=True)
    figures = traitlets.Dict({"rows": [], "words": ""}).tag(sync=True)


def hyperparameters(config: TrainConfig, notebook=None):
    """A form for a configuration, to be shown as the last line of a cell; `.config` is the present one.

    notebook: the one whose papermill command is shown (default: 08).
    """
    if panel.has_reader():
        return Form(config, notebook)
    print(f"nobody is here to fill in a form: the configuration is used as it was given ({config.hash()})")
    return types.SimpleNamespace(config=config, _ipython_display_=lambda: None)  # the line above is enough


class Form(ipywidgets.VBox):
    """The form of `hyperparameters`. config: the last valid configuration; texts: what stands in each field."""

    def __init__(self, config: TrainConfig, notebook=None):
        self.controls, self.area = Controls(fields=list_fields()), ipywidgets.VBox()
        super().__init__([self.controls, self.area])
        load.quiet_libraries()
        self.given, self.notebook = config, notebook
        self.config, self.texts = config, {name: to_text(getattr(config, name)) for name in FIELDS}
        self.controls.on_msg(lambda _, message, buffers: self.answer(message))
        self.update()

    def answer(self, message: dict) -> None:
        """Do what the browser asks for: set (name to text), start, or estimate, once nothing has been typed for a moment."""
        if "start" in message:
            return self.start()
        if "estimate" in message:
            return self.estimate()
        self.texts |= {name: str(text) for name, text in message["set"].items() if name in self.texts}
        self.update()

    def start(self) -> None:
        """Start the run of the present configuration, and show its panel below; a refusal stands beside the button."""
        words = f"started: {self.config.output_dir}"
        try:
            if self.controls.state["ready"]:
                self.area.children = [panel.make_panel(background.start(self.config))]
        except UserError as error:
            words = str(error)
        self.update(words)

    def estimate(self) -> None:
        """Show the figures of the present configuration. What is typed meanwhile is read afterwards, and asks again."""
        if self.controls.figures["rows"] or not self.controls.state["ready"]:
            return
        try:
            self.show_figures(list(find_figures(self.config)))
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.show_figures([make_figure("figures", "not known", reason, bad=True)])

    def show_figures(self, rows: list[dict], words: str = "") -> None:
        self.controls.figures = {"rows": rows, "words": words}

    def update(self, beside_start: str = "") -> None:
        """Read what is typed, keep it if it's valid, and show all that follows from it."""
        config, problems, changed = read(self.texts)
        if config is None:
            self.show_figures([], "known when the marked fields are fixed")
        elif config != self.config or not self.controls.figures["rows"]:
            self.config = config
            self.show_figures([], "working it out …")
        devices = LaunchConfig(gpus_per_node=launcher.count_gpus())
        self.controls.state = {
            "texts": dict(self.texts),
            "changed": changed,
            "problems": problems,
            "ready": config is not None,
            "why": f"fix first: {', '.join(problems)}" if problems else beside_start,
            "place": f"To be run in {Path.cwd()}" + ("; of the last valid configuration" if problems else ""),
            "forms": config_text.list_forms(self.config, devices, self.notebook, self.given),
        }


def list_fields() -> list[dict]:
    """What a browser needs to draw each control: name, group, kind (text, number, choice, flag), choices, suggestions, help,
    range, default as text and in words."""
    found = []
    for field in sorted(FIELDS.values(), key=lambda field: GROUPS.index(field.metadata["group"])):
        kind = field.type if isinstance(field.type, type) else typing.get_args(field.type)[0]
        low, high, choices = (field.metadata[key] for key in ("low", "high", "choices"))
        left_open = kind is bool and isinstance(field.type, types.UnionType)
        choices = AUTO if left_open else {choice: choice for choice in choices}
        default, words = to_text(field.default), {"": "empty", "true": "on", "false": "off"} | choices
        limits = "" if low is None else f", at least {low:.10g}" if high is None else f", {low:.10g} to {high:.10g}"
        found.append(
            {
                "name": field.name,
                "group": field.metadata["group"],
                "help": field.metadata["help"],
                "kind": "choice" if choices else {bool: "flag", int: "number", float: "number"}.get(kind, "text"),
                "choices": list(choices.items()),
                "suggestions": SUGGESTIONS.get(field.name, []),
                "range": {int: f"a whole number{limits}", float: f"a number{limits}"}.get(kind, ""),
                "initial": default,
                "default": words.get(default, default),
            }
        )
    return found


def to_text(value: object) -> str:
    """A value as it's typed; `check_value` reads it back as the same."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def read(texts: dict[str, str]) -> tuple[TrainConfig | None, dict[str, str], list[str]]:
    """What was typed, read: (the configuration, or None where something is refused; the reason for each option concerned; the
    options that are not at their default)."""
    values, problems, config = {}, {}, None
    for name, field in FIELDS.items():
        try:
            values[name] = check_value(field, texts[name])
        except UserError as error:
            problems[name] = str(error)
    changed = [name for name in FIELDS if name in problems or values[name] != FIELDS[name].default]
    try:
        config = None if problems else TrainConfig(**values)
    except UserError as error:  # options that don't go together are named before the colon
        named = [name for name in re.findall(r"\w+", str(error).split(":")[0]) if name in FIELDS] or ["model_name"]
        problems = {name: str(error) for name in [name for name in named if name in changed] or named}
    return config, problems, changed


def make_figure(name: str, value: str, note: object = "", bad: bool = False) -> dict:
    return {"name": name, "value": value, "note": str(note), "bad": bad}


def find_figures(config: TrainConfig) -> typing.Iterator[dict]:
    """What a run on this machine, in one process, would take: {name, value, note, bad} for each figure, as they come.

    What the user can fix is explained in a figure in place of those that can't be had for it.
    """
    try:
        splits, report = dataset.load_prepared(config.dataset_path)
        train, lengths, rows, held_out = prepared.cut_splits(config, splits)
        counts, shared = report["splits"]["train"], prepared.find_shared(config, train, rows)
        epoch, steps = duration.count_steps(config, lengths)
        kind = "packed sequences" if config.packing else "rows"
        each = config.batch_size * config.gradient_accumulation_steps
        note = f"{epoch:,} in an epoch of {len(lengths):,} rows; {kind} in a step: {each}"
        yield make_figure("steps", f"{steps:,}", note)
        bf16, gpu = load.choose_precision(config)[0], torch.cuda.is_available()
        with dry_run.counting(config):
            settings = load.read_settings(config.model_name, config.trust_remote_code)
            plain = dataclasses.replace(config, use_4bit=False, use_8bit=False)
            model = dry_run.build(plain, settings, settings.get_text_config().num_hidden_layers)
        trained, frozen = (sum(p.numel() for p in model.parameters() if p.requires_grad == on) for on in (True, False))
        base = frozen if config.use_lora else trained
        yield make_figure("trained parameters", f"{trained:,}", f"{100 * trained / base:.2g} % of the model's {base:,}")
        device, rate = "cuda" if gpu else "cpu", measure_rate(bf16)
        expected, _ = duration.expect(config, model, lengths, held_out, bf16, device, rate, shared)
        note = "on this machine as it is now, a third less to half as much again; beside it some seconds to load"
        yield make_figure("time", f"about {duration.format_seconds(expected['expected_seconds'])}", note)
        tokens, share = forecast.fill_batch(config, lengths, counts["trained_tokens"] / counts["tokens"], bf16)
        run, plan = dataclasses.replace(config, bf16=bf16), forecast.make_plan(config, gpu)
        total = dry_run.estimate(run, plan, -(-tokens // config.batch_size), share, shared).total
        room = machine.free_memory(True) if gpu else machine.find_limit(False)
        note = f"{room / 1e9:.1f} GB are free; computed in {'bfloat16' if bf16 else 'float32'}"
        note += "" if total <= room else "; `sftlab memory` with these options lists what would fit"
        fits = "fits" if total <= room else "does not fit"
        yield make_figure("memory", f"{total / 1e9:.2f} GB: {fits}", note, bad=total > room)
    except UserError as error:
        yield make_figure("other figures", "not known", error, bad=True)
