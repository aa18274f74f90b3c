"""Exercises that check themselves: their texts lie in notebooks/exercises/NN.yaml, their cells and solutions in the notebooks.

A cell begins with `# Your turn 03.1`, leaves `...` for the reader to replace, and ends in `course.check("03.1", answer)`.
While the dots stand there the notebook goes on. `right` and `when` in the YAML file are Python expressions of `answer`
and of the notebook's own names; `like` is a wrong answer of that kind, or `...` where this run has none. With
SFTLAB_SOLUTIONS=1, as in the tests, each open exercise is solved by the solution that is folded away below it, and all
its wrong answers are tried.

    python -c "from sftlab.course import exercises; exercises.hint('00.1')"
"""

import functools
import os
import re
import time
from types import SimpleNamespace

from sftlab import files
from sftlab.course import notebook
from sftlab.errors import UserError, near_match
from sftlab.language import translate

FOLDER = files.ROOT / "notebooks"
TEXTS = ("title", "form", "then", "say", "hints")  # the keys whose values the reader sees
SOLUTION = r"<summary>Solution {}</summary>\s*```python\n(.*?)```"


@functools.cache
def list_exercises() -> dict[str, dict]:
    """All exercises and predictions of the course by number, such as 03.1: title, level, minutes, form, right, wrong, hints."""
    import yaml

    found = {}
    for path in sorted((FOLDER / "exercises").glob("*.yaml")):
        found |= yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def find_exercise(number: str) -> dict:
    """One of `list_exercises`, in the notebook's language; raises UserError for a number that isn't there."""
    known = list_exercises()
    if number not in known:
        raise UserError(f"exercise: there is no {number!r}.{near_match(number, known)}")
    return replace_texts(known[number], translate)


def replace_texts(facts, rewrite, key=""):
    """A copy of an exercise's facts with each text that the reader sees passed through `rewrite`."""
    if isinstance(facts, dict):
        return {name: replace_texts(value, rewrite, name) for name, value in facts.items()}
    if isinstance(facts, list):
        return [replace_texts(value, rewrite, key) for value in facts]
    return rewrite(facts) if key in TEXTS else facts


def exercise(number: str) -> None:
    """Print what an exercise is about, how hard it is, how long it takes, and what an answer looks like."""
    facts = find_exercise(number)
    level = "●" * facts["level"] + "○" * (3 - facts["level"])
    time_needed = translate(f"about {facts['minutes']} min · hint:")
    print(f"{number} · {facts['title']} · {level} · {time_needed} course.hint({number!r})")
    print(translate(f"Your answer: {facts['form']}."))


def check(number: str, answer) -> None:
    """Print whether the answer is right, or what is wrong with it and why; `...` in it leaves the exercise open."""
    names = _read_names()
    if _is_open(answer):
        print(translate(f"{number} is still open: replace the dots. The notebook goes on without."))
        if os.environ.get("SFTLAB_SOLUTIONS"):
            prove(number, names)
        return
    right, words = judge(number, answer, names)
    print(f"{number}: {translate('right.') if right else translate('not yet.')} {words}".rstrip())
    before = _read_progress().get(number, {})
    facts = {"attempts": before.get("attempts", 0) + 1}
    if right:
        facts["done"] = before.get("done") or time.strftime("%Y-%m-%d %H:%M")
    _note(number, facts)


def judge(number: str, answer, names: dict) -> tuple[bool, str]:
    """Whether an answer is right, and the words for it. names: what the expressions of the exercise may use."""
    facts, known = find_exercise(number), names | {"answer": answer}

    def holds(expression: str) -> bool:
        try:
            return bool(eval(expression, known))
        except Exception:  # an answer of another kind: a text for a number, a function that raises
            return False

    if holds(facts["right"]):
        return True, facts.get("then", "")
    said = [case["say"] for case in facts["wrong"] if holds(case["when"])]
    return False, said[0] if said else translate(f"Expected: {facts['form']}. Try course.hint({number!r}).")


def hint(number: str) -> None:
    """Print the next hint of an exercise, from a nudge to nearly the answer."""
    hints, before = find_exercise(number).get("hints", []), _read_progress().get(number, {})
    given = before.get("hints", 0)
    if given == len(hints):
        ended = translate(f"{number}: no more hints; the solution is folded away below the exercise.")
        print(ended, *hints, sep="\n  ")
        return
    print(translate(f"{number}, hint {given + 1} of {len(hints)}: {hints[given]}"))
    _note(number, {"hints": given + 1})


def predict(number: str, guess) -> None:
    """Write down what the reader expects, before the output is there; `...` is no guess."""
    if _is_open(guess):
        print(translate(f"{number}: write down your guess in place of the dots, then go on."))
        return
    _note(number, {"guess": guess if isinstance(guess, int | float) else str(guess)})
    print(translate(f"{number}: noted. You expect {guess}."))


def compare(number: str, actual) -> None:
    """Put the reader's guess beside what came out."""
    guess = _read_progress().get(number, {}).get("guess")
    shown = f"{actual:.4g}" if isinstance(actual, float) else actual
    expected = "" if guess is None else translate(f"You expected {guess}.")
    print(f"{find_exercise(number)['title']}: {shown}. {expected}")


def progress():
    """A table of the course: which exercises and predictions of each notebook are done, begun and open."""
    known, noted = list_exercises(), _read_progress()
    rows = []
    for chapter in sorted({number.partition(".")[0] for number in known}):
        states = {"done": [], "begun": [], "open": []}
        for number in known:
            if number.startswith(f"{chapter}."):
                facts = noted.get(number, {})
                finished = facts.get("done") or "guess" in facts
                states["done" if finished else "begun" if facts else "open"].append(number)
        rows.append((chapter, *map(", ".join, states.values())))
    return notebook.show_table(("Notebook", "Done", "Begun", "Open"), rows)


def find_solution(number: str) -> str:
    """The code that is folded away below an exercise. Raises LookupError if the notebook has none."""
    for path in FOLDER.glob(f"{number.partition('.')[0]}_*.ipynb"):
        for cell in files.read_json(path)["cells"]:
            if found := re.search(SOLUTION.format(re.escape(number)), "".join(cell["source"]), re.DOTALL):
                return found[1]
    raise LookupError(f"{number}: no folded solution in the notebook")


def prove(number: str, names: dict) -> None:
    """Raise AssertionError unless the folded solution is right and every wrong answer gets the words meant for it."""
    answers = []
    quiet = SimpleNamespace(**vars(names["course"]) | {"check": lambda *given: answers.append(given)})
    own = names | {"course": quiet}
    exec(find_solution(number), own)
    assert [given[0] for given in answers] == [number], f"{number}: the solution must end in course.check"
    right, words = judge(number, answers[0][1], own)
    assert right, f"{number}: the folded solution isn't right: {words}"
    for case in find_exercise(number)["wrong"]:
        answer = eval(case["like"], own)
        found = judge(number, answer, own)
        assert answer is ... or found == (False, case["say"]), f"{number}: {case['like']} is answered by {found}"


def _is_open(answer) -> bool:
    parts = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, list | tuple) else ()
    return answer is ... or any(part is ... for part in parts)


def _read_names() -> dict:
    from IPython import get_ipython

    shell = get_ipython()
    return dict(shell.user_ns) if shell else {}


def _read_progress() -> dict:
    return files.read_json(notebook.work_folder("") / "progress.json")


def _note(number: str, facts: dict) -> None:
    content = _read_progress()
    content[number] = content.get(number, {}) | facts
    files.write_json(notebook.work_folder("") / "progress.json", content)
