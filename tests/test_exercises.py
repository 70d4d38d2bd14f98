import pytest

from helpers import exercises

CATALOGUE = exercises.catalogue()


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
    hints = [
        exercises.hint(number).message for _ in range(len(CATALOGUE[number].hints) + 1)
    ]
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
    monkeypatch.setattr(exercises, "catalogue", lambda: {"T.1": exercise})

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
