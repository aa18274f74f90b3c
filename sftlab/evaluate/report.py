"""The page of an evaluated run: what was trained and how, whether it is better, how sure that is, what it forgot.

One file that opens offline and prints; every chart is a picture. The sections are functions of their own, which take
what result.json holds and return HTML.

python -c "from sftlab.evaluate import report; help(report.write)"
"""

from pathlib import Path

from sftlab import files, pages, plots
from sftlab.pages import table, text

SHOWN = 100  # rows side by side on the page; result.json has all
CUT = 600  # letters of a text
SIDE = """<style>.side td{vertical-align:top;white-space:pre-wrap;min-width:8rem}.mark{font-weight:bold}
.verdict{font-size:1.2rem;border-left:4px solid #0072B2;padding:.3rem .8rem}</style>"""


def write(folder: str | Path) -> Path:
    """Write `report.html` into a run folder, from its result.json and trainer_state.json; whole or not at all."""
    folder = Path(folder)
    result = files.read_json(folder / "result.json")
    history = files.read_json(folder / "trainer_state.json").get("log_history", [])
    found = result["evaluation"]
    parts = [
        SIDE,
        f"<h1>Run {text(folder.resolve().name)}</h1>",
        f'<p class="verdict">{text(found["verdict"])}</p>',
        *show_scores(found),
        *show_forgetting(found["forgetting"]),
        *show_leaks(found),
        *show_answers(found),
        *show_training(result, history),
        *show_options(result),
    ]
    path = folder / "report.html"
    pages.write(path, f"Run {folder.resolve().name}", parts)
    return path


def section(title: str, *parts: str) -> list[str]:
    return [f"<section><h2>{text(title)}</h2>", *parts, "</section>"]


def paragraph(words: str) -> str:
    return f"<p>{text(words)}</p>"


def percent(values: list[float]) -> str:
    """A share with its interval."""
    return "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * value for value in values))


def difference(values: list[float], scale: float = 1, digits: int = 3) -> str:
    """A difference with its interval, each with its sign."""
    return "{:+.{d}f} ({:+.{d}f} to {:+.{d}f})".format(*(scale * value + 0.0 for value in values), d=digits)


def show_scores(found: dict) -> list[str]:
    """Exact match, loss, perplexity and the share that ended, for both models, as a chart and a table, by language."""
    exact, loss, level = found["exact_match"], found["held_out_loss"], found["config"]["level"]
    groups = {"": found} | (found["languages"] if len(found["languages"]) > 1 else {})
    bars = {f"{which}<br>{name}": tuple(part["exact_match"][which])
            for name, part in groups.items() for which in ("base", "tuned")}  # fmt: skip
    rows = [(f"exact match{f', {name}' if name else ''}, {part['questions']} questions", percent(part["exact_match"]["base"]),
              percent(part["exact_match"]["tuned"]), difference(part["exact_match"]["difference"], 100, 1) + " points")
            for name, part in groups.items()]  # fmt: skip
    rows += [(f"loss on the answers{f', {name}' if name else ''}, nats per token", f"{one['base']:.4f}", f"{one['tuned']:.4f}",
              difference(one["difference"])) for name, one in
             ((name, part["held_out_loss"]) for name, part in groups.items()) if one]  # fmt: skip
    rows.append(("perplexity", *(f"{found['perplexity'][which]:.4g}" for which in ("base", "tuned")), ""))
    rows.append(
        ("answers that ended by themselves", *(f"{found['ended'][which]:.1%}" for which in ("base", "tuned")), "")
    )
    uneven = exact["mcnemar"]
    unclear = found["outcome"] not in ("better", "worse") and found["smallest_difference"] is not None
    smallest = (
        f"; a difference of {found['smallest_difference']:.3g} would be found in four of five cases" if unclear else ""
    )
    chance = f"{uneven['p']:.2g}" if uneven["p"] > 1e-6 else "less than a millionth"
    words = (f"{found['questions']} of {found['held_out_rows']} held-out questions, asked of both models. Only the base is right on "
             f"{uneven['only_base']}, only the tuned model on {uneven['only_tuned']}; a fair coin falls so unevenly in "
             f"{chance} of cases (McNemar's exact test). Intervals of {level:.0%}: Wilson's of scores, the paired bootstrap's of "
             f"differences (where all rows changed alike, or none did, Wilson's for 0 of so many). The verdict rests on {found['judged_by'].replace('_', ' ')}{smallest}.")  # fmt: skip
    chart = pages.picture(plots.score_bars(bars, title="Exact match on held-out questions"))
    return section("Is it better?", chart, table(("", "base", "tuned", "difference"), rows), paragraph(words),
                   paragraph(f"{loss['tokens']} answer tokens were scored." if loss else ""))  # fmt: skip


def show_forgetting(found: dict) -> list[str]:
    parts = {"nats per token": found["loss"]} | found["languages"]
    rows = [(f"loss, {name}", f"{part['base']:.4f}", f"{part['tuned']:.4f}", difference(part["difference"], digits=4))
            for name, part in parts.items()]  # fmt: skip
    rows.append(("bits per byte", *(f"{found['bits_per_byte'][which]:.4f}" for which in ("base", "tuned")), ""))
    if "completed" in found:
        done = found["completed"]
        change = difference(done["difference"], 100, 1) + " points"
        rows.append(("facts completed", percent(done["base"]), percent(done["tuned"]), change))
    about = (
        f"Looked for in {found['probe']}: {found['texts']} texts, {found['tokens']} tokens, none of them trained on."
    )
    return section(
        "What did it forget?",
        paragraph(found["verdict"]),
        table(("", "base", "tuned", "difference"), rows),
        paragraph(about),
    )


def show_leaks(found: dict) -> list[str]:
    leaks = found["leakage"]
    words = f"{leaks['rows']} of {found['questions']} questions are given away by training rows. "
    words += f"The answers of {leaks['answers_seen']} occur among the training answers, which is no leak where answers are few."
    parts = [paragraph(words)]
    if leaks["rows"]:
        clean, rows = (
            leaks["without"]["exact_match"],
            [("all questions", *(percent(found["exact_match"][k]) for k in ("base", "tuned")))],
        )
        rows += [("without the leaked ones", *(percent(clean[k]) for k in ("base", "tuned")))] if clean else []
        parts.append(table(("exact match", "base", "tuned"), rows))
        listed = [(one["row"], shorten(one["question"]), one["why"], one["training_row"], shorten(one["training_prompt"]))
                  for one in leaks["found"][:SHOWN]]  # fmt: skip
        parts.append(table(("held-out row", "question", "why", "training row", "its prompt"), listed))
        parts.append(paragraph("The verdict leaves the leaked questions out."))
    return section("Did it see the questions?", *parts)


def show_answers(found: dict) -> list[str]:
    """The answers side by side, those on which the models differ first; ✓ and ✗ say which are right."""
    answers = sorted(
        enumerate(found["answers"]), key=lambda one: (one[1]["base_right"] == one[1]["tuned_right"], one[0])
    )

    def cell(one: dict, which: str) -> str:
        mark = "✓ right" if one[f"{which}_right"] else "✗ not exact"
        return f'<td><span class="mark">{mark}</span>\n{text(shorten(one[which]))}</td>'

    rows = "".join(f"<tr><td>{number + 1}</td><td>{text(shorten(one['question']))}</td><td>{text(shorten(one['expected']))}</td>"
                   f"{cell(one, 'base')}{cell(one, 'tuned')}</tr>" for number, one in answers[:SHOWN])  # fmt: skip
    more = f"{len(answers) - SHOWN} more stand in result.json." if len(answers) > SHOWN else ""
    heads = ("", "question", "expected", "base", "tuned")
    return section("Side by side", f'<div class="side">{table(heads, rows)}</div>', paragraph(more))


def show_training(result: dict, history: list[dict]) -> list[str]:
    """The loss curve, the run's metrics, and what was chosen for the machine."""
    losses = any("loss" in entry or "eval_loss" in entry for entry in history)
    parts = [pages.picture(plots.loss_curve(history))] if losses else []
    metrics = [
        (name.replace("_", " "), f"{value:.6g}") for name, value in result["metrics"].items() if value is not None
    ]
    choices = list(result.get("choices", {}).items())
    return section("The training", *parts, table(("metric", ""), metrics), *show_foresight(result),
                   table(("chosen", "and why"), choices))  # fmt: skip


def show_foresight(result: dict) -> list[str]:
    """What the run was expected to take, what it took, and the error between them."""
    memory, time, rows = result.get("memory", {}), result.get("time", {}), []
    if memory.get("expected_bytes"):
        error = "freed memory was kept" if memory["error"] is None else f"{memory['error']:+.1%}"
        rows.append(
            (
                "memory beside the libraries, GB",
                f"{memory['expected_bytes'] / 1e9:.3f}",
                f"{memory['peak_bytes'] / 1e9:.3f}",
                error,
            )
        )
    if time:
        rows.append(("time, s", f"{time['expected_seconds']:.1f}", f"{time['seconds']:.1f}", f"{time['error']:+.1%}"))
    return [table(("", "expected", "took", "error"), rows)] if rows else []


def show_options(result: dict) -> list[str]:
    """Both configurations, the versions of training, and the machine of this evaluation."""
    from sftlab.machine import describe_machine

    parts = [table((f"{name} option", "value"), config.items()) for name, config in
             (("training", result["config"]), ("evaluation", result["evaluation"]["config"]))]  # fmt: skip
    trained = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    hash = f"Hash of the training configuration: {result['config_hash']}. Trained with {trained}."
    return section("Options, versions, machine", *parts, paragraph(hash),
                   paragraph("Evaluated on: " + "; ".join(describe_machine()) + "."))  # fmt: skip


def shorten(words: str) -> str:
    return words if len(words) <= CUT else words[:CUT] + " …"
