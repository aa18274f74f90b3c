"""The model card: true, with code that runs, and without a path of this machine. The push: private, asked for, checked before."""

import base64
import json
import re
from urllib.parse import urlsplit

import pytest

from sftlab import cli
from sftlab.config.configs import ExportConfig
from sftlab.errors import UserError
from sftlab.export import folder, publish
from sftlab.hub import stand_in
from sftlab.models import load
from sftlab.train import saved


@pytest.fixture(scope="module")
def exports(tuned_run, tmp_path_factory) -> dict:
    """The tuned run's exports by their kind, merged and adapter: (folder, what export.json holds)."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for kind in ("merged", "adapter"):
        config = ExportConfig(run_dir=str(tuned_run), output_dir=str(place / kind), kind=kind)
        made[kind] = place / kind, folder.export(config)
    return made


@pytest.mark.parametrize(("kind", "library"), [("merged", "transformers"), ("adapter", "peft")])
def test_the_card_is_true_and_its_code_runs_and_names_no_path_of_this_machine(
    kind, library, exports, tuned_run, monkeypatch, capsys
):
    from huggingface_hub import ModelCard

    place, facts = exports[kind]
    card = ModelCard.load(place / "README.md")
    assert card.data.license == "mit"
    assert (card.data.pipeline_tag, card.data.library_name) == ("text-generation", library)
    assert (place / "Modelfile").exists() == (kind == "merged") and "vllm serve" in card.text
    assert "128 rows were trained on, 64 held out" in card.text and "| held-out loss" in card.text
    assert not re.search(r"\n{3,}", card.text) and "| lora_r | 16 |" in card.text
    ours = [str(path.parent).encode() for path in (place, tuned_run, load.TINY_BASE)]
    for file in place.iterdir():
        assert not any(path in file.read_bytes() for path in ours), file
    code = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    monkeypatch.chdir(place.parent)
    exec(code.replace("PATH/OF/data_samples/tiny-base", str(load.TINY_BASE)), {})
    assert "capital of France" in capsys.readouterr().out
    assert facts["checks"]["reloaded"]["relative"] < 1e-5


def test_the_code_for_an_adapter_on_a_quantised_base_holds_it_as_in_training(tuned_run, exports):
    run = saved.open_run(tuned_run)
    facts = exports["adapter"][1] | {"base": "owner/name", "about_base": "", "base_bits": 4, "resized": True}
    card = publish.write_card(run, facts, "mine", "me/mine")
    code = re.search(r"```python\n(.*?)```", card, re.S)[1]
    compile(code, "card", "exec")
    assert 'from_pretrained("owner/name", quantization_config=BitsAndBytesConfig(load_in_4bit=True' in code
    assert code.index("resize_token_embeddings") < code.index('PeftModel.from_pretrained(base, "me/mine")')
    assert "base_model: owner/name" in card


def test_scores_of_an_evaluation_and_the_licence_of_the_base_are_in_the_card(tuned_run, exports, tmp_path):
    run, facts = saved.open_run(tuned_run), exports["merged"][1]
    run.result["evaluation"] = {
        "verdict": "Better.",
        "exact_match": {"base": [0.1, 0.05, 0.2], "tuned": [0.9, 0.8, 0.95], "difference": [0.8, 0.7, 0.9]},
        "held_out_loss": {"base": 3.25, "tuned": 0.5, "difference": [-2.75, -3, -2]},
    }
    run.config.model_name = "meta-llama/Llama-2-7b-hf"
    card = publish.write_card(run, facts, "mine", "mine")
    assert "license: llama2" in card and "LLAMA 2 Community License" in card
    for line in ("| 90.0 % (80.0 to 95.0) | +80.0 (+70.0 to +90.0) points |", "| 3.2500 | 0.5000 |", "\nBetter.\n"):
        assert line in card
    run.config.model_name = str(tmp_path)
    assert "could not be found" in publish.write_card(run, facts, "mine", "mine")
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    assert publish.find_licence(run) == "apache-2.0"


class Hub(stand_in.StandIn):
    """As much of a Hub as a push asks for. `repos`: what it says of its repositories."""

    repos = {}

    def do_GET(self):
        name = "/".join(urlsplit(self.path).path.split("/")[3:5])
        if name not in self.repos:
            return super().do_GET()
        self.send(200, "", "", {"id": name, "sha": stand_in.COMMIT, **self.repos[name]})

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers["Content-Length"])), urlsplit(self.path).path
        address, answer = f"http://{self.headers['Host']}", {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            if wanted["organization"] == "ours":
                return self.send(403, "", "You don't have the rights to create a model under the namespace ours")
            name = f"{wanted['organization']}/{wanted['name']}"
            self.repos[name] = {"private": wanted.get("visibility") == "private", "siblings": []}
            answer = {"url": f"{address}/{name}", "id": name, "name": name}
        elif path.endswith("/preupload/main"):
            paths = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
        elif path.endswith("/commit/main"):
            files = [line["value"] for line in map(json.loads, body.decode().splitlines()) if line["key"] == "file"]
            self.repos["/".join(path.split("/")[3:5])]["siblings"] = [
                {"rfilename": file["path"], "size": len(base64.b64decode(file["content"]))} for file in files
            ]
            answer = {"commitOid": stand_in.COMMIT, "commitUrl": f"{address}/me/mine/commit/{stand_in.COMMIT}"}
        self.send(200, "", "", answer)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The client at a Hub that takes files, with a token that may write."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    Hub.repos = {}
    with stand_in.serving(Hub) as address:
        with stand_in.visiting(address, tmp_path / "home", stand_in.TOKENS["write"]):
            yield Hub


def test_a_push_makes_a_private_repository_of_the_whole_export(hub, tuned_run, tmp_path, capsys):
    place = tmp_path / "out"
    arguments = ["--kind", "adapter", "--output-dir", str(place), "--push", "me/mine"]
    assert cli.main(["export", str(tuned_run), *arguments]) == 0
    assert "(private)" in capsys.readouterr().out and hub.repos["me/mine"]["private"]
    pushed = {file["rfilename"]: file["size"] for file in hub.repos["me/mine"]["siblings"]}
    assert pushed == {file.name: file.stat().st_size for file in place.iterdir()}
    assert '"me/mine"' in (place / "README.md").read_text(encoding="utf-8")


def test_a_push_is_public_when_asked_for_and_where_it_fails_prints_how_to_try_again(hub, tmp_path):
    (tmp_path / "README.md").write_text("# mine", encoding="utf-8")
    publish.push_folder(tmp_path, ExportConfig(push="me/open", public=True))
    assert not hub.repos["me/open"]["private"]
    with pytest.raises(UserError, match=f"push: 403.*`hf upload ours/x {tmp_path} . --private`"):
        publish.push_folder(tmp_path, ExportConfig(push="ours/x"))
    assert (tmp_path / "README.md").is_file()


def test_a_repository_in_use_or_open_to_all_is_refused(hub):
    used = [{"rfilename": "model.safetensors"}]
    hub.repos |= {"me/used": {"private": True, "siblings": used}, "me/open": {"private": False, "siblings": []}}
    publish.check_push(ExportConfig(push="me/used", overwrite=True))
    for repo, message in (("me/used", "me/used holds 1 files.*--overwrite"), ("me/open", "exists and is public")):
        with pytest.raises(UserError, match=message):
            publish.check_push(ExportConfig(push=repo))


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (None, "no token found.*`sftlab token`"),
        ("unknown", "Invalid user token.*role `write`"),
        ("read", "the Hub can't be reached"),
    ],
)
def test_a_token_or_a_hub_that_is_not_there_is_named_before_the_work(
    token, message, hub_address, tuned_run, tmp_path, capsys
):
    address = "http://127.0.0.1:9" if token == "read" else hub_address
    with stand_in.visiting(address, tmp_path / "home", token and stand_in.TOKENS[token]):
        assert cli.main(["export", str(tuned_run), "--output-dir", str(tmp_path / "out"), "--push", "me/x"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error) and len(error.strip().splitlines()) == 1 and not (tmp_path / "out").exists()
