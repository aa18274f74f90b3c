"""The model card of an export (its template: `card.md`), and its Modelfile for Ollama."""

import contextlib
import dataclasses
import json
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, errors

from sftlab.data import sources, templates
from sftlab.data.readers import BadRow
from sftlab.evaluate import report
from sftlab.export import checks
from sftlab.hub import catalog
from sftlab.train.saved import Run

# Options that are of no interest to others, or are a path of this machine.
LEFT_OUT = {"output_dir", "dataset_path", "model_name", "resume", "overwrite", "deepspeed", "report_to"}
LEFT_OUT |= {"save_steps", "save_total_limit", "logging_steps", "dataloader_num_workers"}


def write_card(run: Run, facts: dict, name: str) -> str:
    """The card as Markdown, with the Hub's metadata in front.

    facts: what export.json holds; name: of the export's folder.
    """
    licence, source, adapter = find_licence(run), name_source(run), facts["kind"] == "adapter"
    card_data = ModelCardData(
        base_model=None if facts["about_base"] else facts["base"],
        license=licence,
        datasets=[source] if source in sources.HUB_IDS.values() else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["sft", "sftlab"] + ["lora"] * run.config.use_lora,
    )
    options = {option: value for option, value in dataclasses.asdict(run.config).items() if option not in LEFT_OUT}
    if not run.config.use_lora:
        options = {option: value for option, value in options.items() if "lora" not in option}
    card = ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).with_name("card.md")),
        adapter=adapter,
        checks=checks.format_checks(facts),
        evaluation=list_evaluation(run.result),
        facts=facts,
        licence=licence,
        loaded_base="PATH/OF/data_samples/tiny-base" if facts["base"] == "tiny-base" else facts["base"],
        name=name,
        options=options,
        run=run,
        source=source,
    )
    return f"{card}\n"


def find_licence(run: Run) -> str:
    """The base's licence: the catalogue's, else that of the base's own card; `other` where neither says."""
    name = run.config.model_name
    here = Path(name).is_dir()
    if not here and (known := catalog.find_model(name)):
        return known.licence
    try:
        card = ModelCard.load(Path(name) / "README.md" if here else name, ignore_metadata_errors=True)
    except (errors.HfHubHTTPError, OSError, ValueError):
        return "other"
    return card.data.license or "other"


def name_source(run: Run) -> str:
    """Where the rows came from, without a path of this machine: a set of the Hub by its id, files by their names."""
    source = str(run.data.get("source", ""))
    if source in sources.HUB_IDS.values() or run.data.get("options", {}).get("hub_id") == source:
        return source
    return ", ".join(Path(part).name for part in source.split(", ")) or "unknown: the data set's folder is gone"


def list_evaluation(result: dict) -> list[tuple]:
    """What `sftlab evaluate` measured, if it has been run: (measure, base, tuned, difference), with intervals."""
    if not (found := result.get("evaluation")):
        return []
    losses = report.row_of_losses("loss on the answers, nats per token", found["held_out_loss"])
    return [report.row_of_shares("exact match", found["exact_match"]), losses]


def write_modelfile(tokenizer, ends: list[str]) -> str:
    """What `ollama create` reads: the folder, the prompt's template in Go's language, and the tokens that end an answer.

    The template is put together from the pieces that the tokenizer's own one writes around made-up turns, and left out, with
    a comment, where these don't make the same prompts for other conversations.
    """
    lines = ["# ollama create NAME -f Modelfile", "FROM ."]
    pieces = find_pieces(tokenizer)
    if pieces is None:
        why = "this model's chat template can't be written in Go's language"
        lines.append(f"# No TEMPLATE: {why}. llama.cpp and vLLM read it.")
    else:
        system, after_system, first, before_answer, after_answer, prompt = pieces
        body = f'{{{{ if eq $m.Role "user" }}}}{{{{ if eq $i 0 }}}}{first}{{{{ end }}}}{{{{ $m.Content }}}}'
        body += f'{{{{ else if eq $m.Role "assistant" }}}}{before_answer}{{{{ $m.Content }}}}{after_answer}'
        if system is not None:
            body += f"{{{{ else }}}}{system}{{{{ $m.Content }}}}{after_system}"
        lines.append(f'TEMPLATE """{{{{ range $i, $m := .Messages }}}}{body}{{{{ end }}}}{{{{ end }}}}{prompt}"""')
    return "\n".join([*lines, *(f"PARAMETER stop {json.dumps(end, ensure_ascii=False)}" for end in ends)]) + "\n"


def find_pieces(tokenizer) -> tuple[str | None, str | None, str, str, str, str] | None:
    """What a template writes before and after a system message, before a first question, around an answer, and as prompt for one.

    The first two are None where it refuses a system message; all of it is None where its prompts are not made so. BOS is
    left out where the tokenizer puts it in front by itself, as Ollama does.
    """
    ids = tokenizer("x")["input_ids"]
    bos = tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""

    def render(*texts: str) -> str:
        roles = ["system"] * (len(texts) % 2 == 0) + ["user", "assistant"] * 2
        chat = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
        return templates.render_prompt(tokenizer, chat).removeprefix(bos)

    def compose(*texts: str) -> str:
        told, (question, *more) = texts[: 1 - len(texts) % 2], texts[1 - len(texts) % 2 :]
        start = "".join(f"{system}{text}{after_system}" for text in told) or first
        pairs = zip(more[::2], more[1::2], strict=True)
        return start + question + "".join(f"{before}{one}{after}{asked}" for one, asked in pairs) + prompt

    system = after_system = None
    try:
        first, prompt = render("Qq1").split("Qq1")
        before, after = render("Qq1", "Aa1", "Qq2").removeprefix(f"{first}Qq1").split("Qq2")[0].split("Aa1")
        with contextlib.suppress(BadRow):
            system, after_system = render("Ss1", "Qq1").removesuffix(f"Qq1{prompt}").split("Ss1")
        tries = [("Why?",), ("Why?", "So.", "How?"), ("Be brief.", "なぜ？"), ("Be brief.", "Why?", "So.", "なぜ？")]
        whole = all(compose(*texts) == render(*texts) for texts in tries[: 2 if system is None else 4])
    except (BadRow, IndexError, ValueError):
        return None
    parts = (system, after_system, first, before, after, prompt)
    return parts if whole and not any("{{" in text or '"""' in text for text in parts if text) else None
