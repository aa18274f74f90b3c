"""Exercises: what is said to an open, a right and a wrong answer, hints in steps, and what is kept of it."""

import pytest

from sftlab import files
from sftlab.course import exercises
from sftlab.errors import UserError

SUM = {"title": "A sum", "level": 1, "minutes": 2, "form": "a number", "right": "answer == a + 2", "then": "Well done.",
       "wrong": [{"when": "answer == 22", "like": "22", "say": "Add, don't join."}], "hints": ["Count.", "Four."]}  # fmt: skip
ANSWERS = [(4, "right. Well done."), (22, "Add, don't join.")]
ANSWERS += [(answer, "Expected: a number.") for answer in (5, None, lambda: 1 / 0)]
ANSWERS += [(answer, "still open") for answer in (..., [1, ...], {"x": ...})]


@pytest.fixture(autouse=True)
def course(monkeypatch, tmp_path):
    monkeypatch.setenv("SFTLAB_RUN_DIR", str(tmp_path))
    monkeypatch.delenv("SFTLAB_SOLUTIONS", raising=False)
    monkeypatch.setattr(exercises, "list_exercises", lambda: {"00.0": {"title": "Guess"}, "00.1": SUM})
    monkeypatch.setattr(exercises, "_read_names", lambda: {"a": 2})
    return tmp_path / "work" / "progress.json"


@pytest.mark.parametrize(("answer", "said"), ANSWERS)
def test_an_answer_is_right_or_told_why_not_or_no_attempt(answer, said, course, capsys):
    exercises.check("00.1", answer)
    assert said in capsys.readouterr().out and course.exists() == (said != "still open")
    assert not course.exists() or ("done" in files.read_json(course)["00.1"]) == (answer == 4)


def test_hints_come_in_steps_a_guess_is_compared_and_a_solved_exercise_stays_solved(course, capsys):
    for said in ("hint 1 of 2: Count.", "hint 2 of 2: Four.", "no more hints"):
        exercises.hint("00.1")
        assert said in capsys.readouterr().out
    exercises.predict("00.0", 40)
    exercises.compare("00.0", 12.34567)
    assert "12.35. You expected 40." in capsys.readouterr().out
    for answer in (4, 5):
        exercises.check("00.1", answer)
    assert files.read_json(course)["00.1"]["attempts"] == 2
    assert "00.0, 00.1" in exercises.progress().data
    with pytest.raises(UserError, match="Did you mean '00.1'"):
        exercises.check("00.11", 1)
