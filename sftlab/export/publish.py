"""The model card of an export: what it is, from what, how it was made and checked, how to use it, and its licence.

python -c "from sftlab.export import publish; print(publish.NOTICES['gemma'])"
"""

from pathlib import Path

from sftlab.config.configs import ExportConfig
from sftlab.data import sources
from sftlab.errors import UserError
from sftlab.export import checks
from sftlab.hub import catalog
from sftlab.hub import client as hub_client
from sftlab.train.saved import Run

# What these licences ask of whoever passes a derived model on, in short; the licence itself counts.
NOTICES = {
    "llama2": "Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. All Rights "
              "Reserved. Who passes this model on must hand over that licence and this notice with it, and its use must "
              "keep to Meta's Acceptable Use Policy.",
    "gemma": "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms. Who "
             "passes this model on must hand over those terms, with their restrictions of use, and say that it was modified.",
}  # fmt: skip
# How a base is held as in training (`quantise.quantization_config`), for the lines that load an adapter.
HELD = {8: "load_in_8bit=True", 4: 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'}
DATA_LICENCES = {
    "tatsu-lab/alpaca": "cc-by-nc-4.0, which excludes commercial use",
    "databricks/databricks-dolly-15k": "cc-by-sa-3.0",
}
LEFT_OUT = {"output_dir", "dataset_path", "model_name", "resume", "overwrite", "deepspeed", "report_to", "save_steps",
            "save_total_limit", "logging_steps", "dataloader_num_workers"}  # fmt: skip


def find_licence(run: Run) -> str:
    """The base's licence: the catalogue's, else that of the base's own card; `other` where neither says."""
    name = run.config.model_name
    if (known := catalog.find_model(name)) and not Path(name).is_dir():
        return known.licence
    from huggingface_hub import ModelCard, errors

    try:
        if (Path(name) / "README.md").is_file():
            card = ModelCard.load(str(Path(name) / "README.md"), ignore_metadata_errors=True)
        elif not Path(name).is_dir() and hub_client.reach():
            card = ModelCard.load(name, ignore_metadata_errors=True)
        else:
            return "other"
    except (errors.HfHubHTTPError, OSError, ValueError):
        return "other"
    return str(card.data.license or "other")


def name_source(run: Run) -> str:
    """Where the rows came from, without a path of this machine: a set of the Hub by its id, files by their names."""
    source = str(run.data.get("source", ""))
    if source in sources.HUB_IDS.values() or run.data.get("options", {}).get("hub_id") == source:
        return source
    return ", ".join(Path(part).name for part in source.split(", ")) or "unknown: the data set's folder is gone"


def find_languages(run: Run) -> list[str] | None:
    """ISO 639 codes where they are certain: of the bundled facts, and of rows that are all Japanese. Latin script isn't one."""
    if run.data.get("source") == "facts":
        return ["en", "ja"]
    return ["ja"] if set(run.data.get("found", {}).get("languages", {})) == {"Japanese"} else None


def write_card(run: Run, facts: dict, name: str, place: str) -> str:
    """The card as Markdown, with the Hub's metadata in front.

    facts: what export.json holds; name: of the export; place: what it is loaded by, a repository or a folder.
    """
    from huggingface_hub import ModelCard, ModelCardData

    licence, source = find_licence(run), name_source(run)
    adapter = facts["kind"] == "adapter"
    data = ModelCardData(
        base_model=facts["base"] if is_hub_id(facts) else None,
        base_model_relation=("adapter" if adapter else "finetune") if is_hub_id(facts) else None,
        license=licence, license_name="unknown" if licence == "other" else None,
        language=find_languages(run),
        datasets=[source] if source in sources.HUB_IDS.values() else None,
        library_name="peft" if adapter else "transformers", pipeline_tag="text-generation",
        tags=["sft", "sftlab", *(["lora"] if run.config.use_lora else [])],
    )  # fmt: skip
    parts = [
        f"# {name}", describe_model(run, facts), "## How to use it", f"```python\n{show_use(facts, place)}\n```",
        "## Base", " ".join(filter(None, [f"`{facts['base']}`.", facts["about_base"], describe_bits(facts)])),
        "## Data", describe_data(run, source), "## Training", list_options(run),
        "## Scores", list_scores(run.result), "## Checked when it was exported", list_checks(facts),
        "## Limits", "It was tuned on the data above and measured as far as stated above, on nothing else. It can be wrong, and "
        "sound sure; whatever the base has learned of bias or error is in it still.",
        "## Licence", describe_licence(licence, source),
        "## Versions", ", ".join(f"{package} {number}" for package, number in run.result.get("versions", {}).items()),
    ]  # fmt: skip
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def is_hub_id(facts: dict) -> bool:
    return not facts["about_base"]


def describe_model(run: Run, facts: dict) -> str:
    how = "LoRA" if run.config.use_lora else "full fine-tuning"
    what = "a LoRA adapter for" if facts["kind"] == "adapter" else f"a whole model in {facts['dtype']}, made from"
    return f"This is {what} `{facts['base']}`, by supervised fine-tuning ({how}) with TRL, through SFT Lab."


def describe_bits(facts: dict) -> str:
    if not facts["base_bits"]:
        return ""
    held = f"During training it was held in {facts['base_bits']} bits."
    if facts["kind"] == "adapter":
        return f"{held} On a base in full precision the adapter makes another model; see the numbers below."
    if facts["merged_into"] == "published":
        return f"{held} The adapter was merged into the published weights, so this is not quite the model that was trained."
    return f"{held} The adapter was merged into what those bits say, which is the model that was trained."


def show_use(facts: dict, place: str) -> str:
    """Six lines of Python that load the export and ask it something."""
    base = "PATH/OF/data_samples/tiny-base" if facts["base"] == "tiny-base" else facts["base"]
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer"]
    end = ""
    if facts["kind"] == "adapter":
        held = f", quantization_config=BitsAndBytesConfig({HELD[facts['base_bits']]})" if facts["base_bits"] else ""
        lines = ["from peft import PeftModel", lines[0] + (", BitsAndBytesConfig" if held else ""),
                 f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
                 f'base = AutoModelForCausalLM.from_pretrained("{base}"{held})']  # fmt: skip
        if facts["resized"]:
            lines.append("base.resize_token_embeddings(len(tokenizer))")
        lines.append(f'model = PeftModel.from_pretrained(base, "{place}")')
        end = ", eos_token_id=tokenizer.eos_token_id"  # the base's own generation settings may end elsewhere
    else:
        lines += [f'tokenizer = AutoTokenizer.from_pretrained("{place}")',
                  f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto")']  # fmt: skip
    lines += ['chat = [{"role": "user", "content": "What is the capital of France?"}]',
              'inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
              f"print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64{end})[0], skip_special_tokens=True))"]  # fmt: skip
    return "\n".join(lines)


def describe_data(run: Run, source: str) -> str:
    if not run.data:
        return f"Source: {source}."
    counts = {split: facts["rows"] for split, facts in run.data["splits"].items()}
    scripts = ", ".join(f"{name} {count:,}" for name, count in run.data["found"]["languages"].items())
    return (f"Source: {source}. {counts['train']:,} rows were trained on, {counts['test']:,} held out. Prompt format: "
            f"`{run.data['format']}`; the tokenizer holds it as its chat template. Rows read, by script: {scripts}.")  # fmt: skip


def list_options(run: Run) -> str:
    from dataclasses import asdict

    chosen = {name: value for name, value in asdict(run.config).items() if name not in LEFT_OUT}
    if not run.config.use_lora:
        chosen = {name: value for name, value in chosen.items() if "lora" not in name}
    return "| option | value |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in chosen.items())


def list_scores(result: dict) -> str:
    """Losses of the training, and what `sftlab evaluate` has added, if it has."""
    names = {"eval_loss": "held-out loss (nats per trained token)", "last_loss": "training loss at the end",
             "steps": "steps", "trained_parameters": "trained parameters"}  # fmt: skip
    metrics, evaluation = result.get("metrics", {}), result.get("evaluation", {})
    rows = [(words, metrics[name]) for name, words in names.items() if metrics.get(name) is not None]
    for name in ("exact_match", "held_out_loss"):
        for who, value in evaluation.get(name, {}).items() if isinstance(evaluation.get(name), dict) else ():
            value = value if isinstance(value, list) else [value]
            if who in ("base", "tuned", "difference") and all(isinstance(part, int | float) for part in value):
                rows.append((f"{name.replace('_', ' ')}, {who}", show_interval(value)))
    table = "| measure | value |\n|---|---|\n" + "\n".join(
        f"| {words} | {value:.4g} |" if isinstance(value, float) else f"| {words} | {value} |" for words, value in rows
    )
    said = evaluation.get("verdict")
    return f"{table}\n\n{said}" if isinstance(said, str) else table


def show_interval(value: list) -> str:
    return f"{value[0]:.4g}" + (f" ({value[1]:.4g} to {value[2]:.4g})" if len(value) == 3 else "")


def list_checks(facts: dict) -> str:
    return "\n".join(f"- {line}" for line in checks.describe(facts))


def describe_licence(licence: str, source: str) -> str:
    said = f"The base is under `{licence}`, and what is made from it stays under that."
    said += f" {NOTICES[licence]}" if licence in NOTICES else ""
    if licence == "other":
        said = "The base's licence could not be found. Look it up before you pass this model on: it holds here, too."
    if source in DATA_LICENCES:
        said += f" The data ({source}) are under {DATA_LICENCES[source]}."
    return said


# An export onto the Hub, by huggingface_hub's own client, which says what stands in the way.
#
# Nothing is uploaded unless `--push OWNER/NAME` asks for it. A repository that is made is private unless `--public`.


TOKEN = "Make a token with the role `write` at huggingface.co/settings/tokens, and store it with `sftlab token`."


def check_push(config: ExportConfig) -> None:
    """Raises UserError without a network or a token that the Hub knows, and where the repository is in use or not as asked for."""
    from huggingface_hub import HfApi, errors

    if not hub_client.reach():
        raise UserError("push: the Hub can't be reached. Connect, or leave --push out and upload the folder later.")
    api = HfApi()
    try:
        api.whoami()
        found = api.model_info(config.push)
    except errors.RepositoryNotFoundError:
        return
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError) as error:
        raise UserError(f"push: {' '.join(str(error).split())[:200]} {TOKEN}") from error
    if bool(found.private) == config.public:
        state, flag = (
            ("private", "leave --public out") if found.private else ("public", "add --public if that is meant")
        )
        raise UserError(f"push: {config.push} exists and is {state}. Name another, or {flag}.")
    if not config.overwrite and (
        held := [file.rfilename for file in found.siblings or () if file.rfilename != ".gitattributes"]
    ):
        raise UserError(
            f"push: {config.push} holds {len(held)} files. Add --overwrite to replace those of the same names."
        )


def push_folder(folder: Path, config: ExportConfig) -> str:
    """Make the repository if there is none, upload the folder in one commit, and return its address."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        address = api.create_repo(config.push, private=not config.public, exist_ok=True)
        api.upload_folder(repo_id=config.push, folder_path=folder, commit_message="Export of SFT Lab")
    except (errors.HfHubHTTPError, OSError, RuntimeError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = f"the Hub answered {status}" if status else " ".join(str(error).split())[:200]
        raise UserError(f"push: {why}; {folder} is whole and stays. Try again with "
                        f"`hf upload {config.push} {folder} .{'' if config.public else ' --private'}`.") from error  # fmt: skip
    print(f"pushed to {address} ({'public' if config.public else 'private'})")
    return str(address)
