import json
import os

import pytest

from helpers.course import exercises
from helpers.course.exercises import _progress

CATALOGUE = exercises.catalog()


@pytest.mark.parametrize("number", CATALOGUE)
def test_every_solution_passes_its_own_check(number):
    exercise = CATALOGUE[number]
    names = {"given": exercise.given()} if exercise.given else {}
    exec(exercise.solution, names)
    result = exercises.check(number, names["answer"])
    assert result.passed, result.message


@pytest.mark.parametrize("number", CATALOGUE)
def test_every_exercise_waits_and_hints_and_shows(number):
    assert exercises.check(number, ...).state == "open"
    hints = [exercises.hint(number).message for _ in range(len(CATALOGUE[number].hints) + 1)]
    assert len(CATALOGUE[number].hints) >= 2, "a nudge and a stronger one"
    assert hints[-1] == hints[-2], "the last hint repeats"
    shown = exercises.show(number)
    assert "answer" in shown.code and "answer" in shown._repr_html_()


def test_numbers_follow_their_chapter():
    for number, exercise in CATALOGUE.items():
        module = exercise.check.__module__.rsplit(".", 1)[-1]
        chapter = module.removeprefix("chapter").removeprefix("appendix").upper()
        assert number.split(".")[0] == chapter


def test_an_unknown_number_lists_what_there_is():
    with pytest.raises(ValueError, match="exercise"):
        exercises.check("99.9", 1)


def test_a_raising_answer_is_told_kindly(monkeypatch):
    def broken(answer):
        return answer()

    exercise = exercises.Exercise("T.1", "Test", broken)
    monkeypatch.setattr(exercises, "catalog", lambda: {"T.1": exercise})

    def mine():
        raise ZeroDivisionError("oops")

    result = exercises.check("T.1", mine)
    assert not result.passed
    assert "ZeroDivisionError: oops" in result.message
    with pytest.raises(ValueError, match="needs no material"):
        exercises.given("T.1")
    assert "show" in exercises.hint("T.1").message


def test_html_is_escaped_and_code_is_marked():
    result = exercises.Result("1.1", "wrong", "use `a<b` & not <b>")
    assert "<code>a&lt;b</code> &amp; not &lt;b&gt;" in result._repr_html_()


@pytest.mark.parametrize(
    ("title", "start"), [("How many?", "How many? Rep"), ("Count them", "Count them. Rep")]
)
def test_an_open_exercise_has_one_punctuation_mark(monkeypatch, title, start):
    exercise = exercises.Exercise("T.1", title, lambda answer: None)
    monkeypatch.setattr(exercises, "catalog", lambda: {"T.1": exercise})
    assert exercises.check("T.1", ...).message.startswith(start)


# ── progress ─────────────────────────────────────────────────────────────────────────────
def toy(monkeypatch):
    """Three exercises in two chapters; the right answer is 1."""

    def one(answer):
        if answer != 1:
            raise exercises.Wrong("No.")

    numbers = ("0.1", "0.2", "B.1")
    found = {number: exercises.Exercise(number, "One", one) for number in numbers}
    monkeypatch.setattr(exercises, "catalog", lambda: found)


def test_what_is_solved_is_kept_and_shown_as_bars(monkeypatch):
    toy(monkeypatch)
    assert exercises.progress().chapters == {"0": (0, 2), "B": (0, 1)}
    exercises.check("0.1", ...)
    exercises.check("0.1", 2)
    exercises.hint("0.1")
    exercises.show("0.1")
    assert exercises.progress().chapters["0"] == (0, 2), "only a right answer counts"
    assert "■□" in exercises.check("0.1", 1).message
    exercises.check("0.1", 1)
    progress = exercises.progress()
    assert progress.chapters == {"0": (1, 2), "B": (0, 1)}
    assert str(progress).splitlines() == [
        "Chapter 0  ■□ 1 of 2",
        "Appendix B □ 0 of 1",
    ]
    assert "width:50%" in progress._repr_html_() and "1 of 2" in progress._repr_html_()
    assert json.loads(_progress.path().read_text()) == {"solved": ["0.1"]}, "no answers"


@pytest.mark.parametrize("content", ["{", "[]", '{"solved": 3}', '{"solved": [1]}', ""])
def test_a_damaged_progress_file_is_set_aside_with_a_note(monkeypatch, content):
    toy(monkeypatch)
    _progress.path().write_text(content)
    result = exercises.check("0.2", 1)
    assert result.passed and "exercises.json.broken" in result.message
    assert _progress.path().with_suffix(".json.broken").read_text() == content
    assert exercises.progress().chapters["0"] == (1, 2)
    _progress.path().write_text(content)
    assert "could not be read" in str(exercises.progress())
    assert "could not be read" not in str(exercises.progress()), "said once"


def test_progress_that_cannot_be_saved_does_not_spoil_a_right_answer(monkeypatch):
    toy(monkeypatch)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    result = exercises.check("0.1", 1)
    assert result.passed and "could not be saved: No space left" in result.message
    left = [p.name for p in _progress.path().parent.iterdir() if p.suffix != ".lock"]
    assert left == [], "nothing half-written"


def test_two_notebooks_at_once_lose_nothing(monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    numbers = [f"0.{n}" for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_progress.add, numbers))
    assert _progress.load()[0] == set(numbers)


def test_the_file_lies_in_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("HELPERS_CACHE", str(tmp_path))
    assert _progress.path() == tmp_path / "exercises.json"
