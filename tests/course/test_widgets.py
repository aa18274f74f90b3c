"""The form edits one configuration, keeps what was typed, refuses aloud, never shows outdated figures, and runs nothing itself."""

import dataclasses
from pathlib import Path

import ipywidgets
import pytest

from sftlab.config.configs import TrainConfig
from sftlab.course import widgets
from sftlab.models import load
from sftlab.runs import background, panel

QLORA = TrainConfig(use_4bit=True, use_lora=True)
REFUSED = [
    ("lora_r", "0", "at least 1"),
    ("learning_rate", "fast", "2e-4 or 0.0002"),
    ("deepspeed", "zero9", "Did you"),
]
CONFLICTS = [("use_8bit", "true", "choose one of them"), ("deepspeed", "zero3", "--deepspeed zero2")]  # with use_4bit


def make(config: TrainConfig):
    form = widgets.Form(config)
    return form, form.children[0]


def test_every_option_is_a_control_of_a_group_with_help_range_and_default():
    config = TrainConfig(bf16=False, learning_rate=1e-5, deepspeed="zero2", use_lora=True)
    form, controls = make(config)
    fields = {field["name"]: field for field in controls.fields}
    assert set(fields) == {field.name for field in dataclasses.fields(TrainConfig)}
    assert all(field["help"] and field["group"] and field["default"] for field in fields.values())
    rank = fields["lora_r"]
    assert (rank["kind"], rank["range"], rank["default"]) == ("number", "a whole number, at least 1", "16")
    assert dict(fields["bf16"]["choices"]) == {"": "auto", "true": "yes", "false": "no"}
    assert [name for name, _ in fields["optim"]["choices"]] == list(widgets.FIELDS["optim"].metadata["choices"])
    assert widgets.read(form.texts)[0] == config
    form.answer({"set": {name: field["initial"] for name, field in fields.items()}})
    assert form.config == TrainConfig() and controls.state["changed"] == []
    form.answer({"set": {"learning_rate": "2e-3", "lora_r": " 8", "bf16": "false", "deepspeed": ""}})
    assert form.config == TrainConfig(learning_rate=2e-3, lora_r=8, bf16=False) and controls.state["ready"]
    assert set(controls.state["changed"]) == {"learning_rate", "lora_r", "bf16"}


@pytest.mark.parametrize(("name", "text", "message"), REFUSED + CONFLICTS)
def test_what_is_refused_stays_in_its_field_and_is_said_there_and_where_it_conflicts(name, text, message):
    form, controls = make(QLORA)
    form.show_figures([widgets.make_figure("steps", "8")])
    form.answer({"set": {name: text}})
    form.answer({"estimate": True})
    assert form.config == QLORA and message in controls.state["problems"][name]
    assert set(controls.state["problems"]) - {name} == ({"use_4bit"} if (name, text, message) in CONFLICTS else set())
    assert controls.state["texts"][name] == text and name in controls.state["why"] and not controls.state["ready"]
    assert not controls.figures["rows"]  # nothing that was known before is shown as if it held
    form.answer({"start": True})
    assert form.children[1].children == ()
    form.answer({"set": {name: widgets.to_text(getattr(QLORA, name))}})
    assert controls.state["ready"] and not controls.state["problems"]


def test_start_runs_what_is_shown_and_reports_what_is_refused(monkeypatch, tmp_path):
    folder, started = tmp_path / "実行", []
    with monkeypatch.context() as patched:
        patched.setattr(panel, "make_panel", lambda run: ipywidgets.Label(str(run)))
        patched.setattr(background, "start", lambda config: started.append(config) or folder)
        form, controls = make(TrainConfig(output_dir=str(folder)))
        form.answer({"set": {"lora_r": "8"}})
        assert not started
        form.answer({"start": True})
    assert started == [form.config] and form.children[1].children[0].value == str(folder)
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    form.answer({"start": True})  # the real one, which refuses a folder that holds something
    assert str(folder) in controls.state["why"] and (folder / "run.json").read_text() == "{}"


def test_figures_are_worked_out_once_when_asked_for_and_a_failure_is_one_line(monkeypatch):
    worked_out = []

    def find_figures(config):
        worked_out.append(config.lora_r)
        if config.lora_r == 4:
            raise ValueError("first\n  second")
        yield widgets.make_figure("rank", str(config.lora_r))

    monkeypatch.setattr(widgets, "find_figures", find_figures)
    form, controls = make(TrainConfig(lora_r=3))
    assert controls.figures == {"rows": [], "words": "working it out …"}
    for _ in range(2):  # two views of the form ask for the same
        form.answer({"estimate": True})
    assert controls.figures["rows"][0]["value"] == "3" and not controls.figures["words"]
    form.answer({"set": {"lora_r": "4"}})
    assert not controls.figures["rows"]
    form.answer({"estimate": True})
    (found,) = controls.figures["rows"]
    assert worked_out == [3, 4] and (found["note"], found["bad"]) == ("ValueError: first second", True)


def test_figures_are_those_of_the_run(dataset):
    def ask(**options) -> dict:
        shared = {"dataset_path": str(dataset), "use_lora": True, "max_length": 128, "bf16": False}
        return {one["name"]: one for one in widgets.find_figures(TrainConfig(**shared, **options))}

    found = ask(lora_r=8, batch_size=8, gradient_accumulation_steps=3, num_epochs=2)
    model = load.load_model("tiny-base")
    widths = [(p.in_features, p.out_features) for n, p in model.named_modules() if n.endswith("_proj")]
    assert found["trained parameters"]["value"] == f"{sum(8 * (a + b) for a, b in widths):,}"
    assert found["steps"]["value"] == "12"  # 128 rows: 16 batches, 6 steps of 3 in each epoch
    assert "fits" in found["memory"]["value"] and found["time"]["value"].startswith("about")
    assert "can't be reached" in ask(model_name="nobody/nothing")["other figures"]["note"]
    large = ask(model_name="random:Llama-2-70b-hf")["memory"]
    assert "does not fit" in large["value"] and "sftlab memory" in large["note"]


def test_a_form_is_made_only_where_someone_sits(monkeypatch, capsys):
    """The notebook's own tests run without a reader, and tests/test_browser.py has a front-end that says it has one."""
    given = TrainConfig(lora_r=8, use_lora=True)
    assert widgets.hyperparameters(given).config == given and "nobody is here" in capsys.readouterr().out
    monkeypatch.setattr(panel, "has_reader", lambda: True)
    assert isinstance(widgets.hyperparameters(given), widgets.Form) and not capsys.readouterr().out


def test_the_browser_gets_no_html():
    script = (Path(widgets.__file__).parent / "form" / "form.js").read_text(encoding="utf-8")
    assert "innerHTML" not in script and "insertAdjacentHTML" not in script and "eval(" not in script
