"""The form of a training's hyperparameters, for a notebook: edit, see what it comes to, take it elsewhere, start it.

The form edits one configuration, `form.config`, which is always the last valid one; only its Start button runs anything.
The fields come from `TrainConfig`; the browser's part is in `sftlab/form`. Where nobody is there to fill in a form
(papermill, nbval, `sftlab run`) none is shown, and the configuration goes on as it is.

    form = widgets.hyperparameters(TrainConfig(use_lora=True)); form
"""

import dataclasses
import functools
from pathlib import Path

import anywidget
import ipywidgets
import traitlets

from sftlab import config_file, files, form_commands, form_fields, form_worker, presets
from sftlab.config import LaunchConfig, TrainConfig
from sftlab.headless import has_reader
from sftlab.options import UserError

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
        fields=form_fields.describe(),
        presets=[{"name": GIVEN, "title": "what the notebook gave"}, {"name": DEFAULTS, "title": "of `sftlab train`"},
                 *({"name": preset.name, "title": presets.say(preset)} for preset in presets.PRESETS)],
    )  # fmt: skip
    area = ipywidgets.VBox()
    form = ipywidgets.VBox([controls, area])
    form.config = edited or config

    def tell(rows: list[dict], done: bool) -> None:
        controls.figures = {"rows": rows, "words": "" if done else WORKING}

    draft = Draft(config, notebook, Path(saved) if saved else None, launch, form_fields.to_texts(form.config), controls, area,
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
        fill(draft, {name: form_fields.to_text(form_fields.FIELDS[name].default)})
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
        return fill(draft, form_fields.to_texts(config), f"{name}: all options set")
    preset = presets.find_preset(name)
    changes = ", ".join(presets.list_changes(draft.form.config, preset)) or "nothing to change"
    texts = {option: form_fields.to_text(value) for option, value in preset.options.items()}
    fill(draft, texts, f"{name} ({presets.say(preset)}): {changes}")


def start(draft: Draft) -> None:
    """Start the run of the present configuration, and show its panel below; what is refused is said beside the button."""
    if form_fields.read(draft.texts, draft.form.config).config is None:
        return show(draft)
    from sftlab import run_panel, runs

    try:
        run = runs.start(draft.form.config, draft.launch)
    except UserError as error:
        return show(draft, said=str(error))
    draft.area.children = [run_panel.make_panel(run)]
    show(draft, said=f"started: {draft.form.config.output_dir}")


def show(draft: Draft, notice: str = "", said: str = "") -> None:
    """Read what is typed, keep it if it's valid, and show all that follows from it. said: what stands beside Start."""
    form, controls = draft.form, draft.controls
    reading = form_fields.read(draft.texts, form.config)
    if reading.config is None:
        form_worker.drop(draft.worker)
        controls.figures = {"rows": [], "words": "known when the marked fields are mended"}
    elif reading.config != form.config or controls.figures["words"] != WORKING and not controls.figures["rows"]:
        form.config = reading.config
        form_worker.drop(draft.worker)  # first, or an answer to an earlier question could still come in between
        controls.figures = {"rows": [], "words": WORKING}
        form_worker.ask(draft.worker, form.config)
        if draft.saved:
            text = config_file.write(form.config, everything=True)
            files.write_text(draft.saved, f"{FROM}{draft.given.hash()}\n{text}")
    offers = offer_folder(draft.texts, form.config)
    said = said or "; ".join(offer["words"] for offer in offers.values())
    launch = draft.launch or LaunchConfig(gpus_per_node=count_gpus())
    controls.state = {
        "revision": draft.revision, "texts": dict(draft.texts), "changed": reading.changed, "problems": reading.problems,
        "offers": offers, "notice": notice, "ready": reading.config is not None,
        "why": f"mend first: {', '.join(reading.problems)}" if reading.problems else said,
        "place": f"To be run in {Path.cwd()}" + ("; of the last valid configuration" if reading.problems else ""),
        "forms": form_commands.list_forms(form.config, launch, draft.notebook, draft.given),
    }  # fmt: skip


def offer_folder(texts: dict[str, str], config: TrainConfig) -> dict:
    """A free name where the run folder exists, unless it is gone on in or replaced on purpose."""
    if config.resume or config.overwrite or not (free := form_fields.find_free(texts["output_dir"])):
        return {}
    return {"output_dir": {"words": f"{texts['output_dir']} exists, and stays as it is; take {free}", "text": free}}


def read_saved(path: Path, given: TrainConfig) -> TrainConfig | None:
    """What was edited before, if the form was given the same then; other parameters of the notebook begin anew."""
    if not path.is_file() or not path.read_text(encoding="utf-8").startswith(f"{FROM}{given.hash()}\n"):
        return None
    return config_file.build(path)


def count_gpus() -> int:
    from sftlab import launch

    return launch.count_gpus()
