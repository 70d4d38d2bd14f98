import math
from collections import Counter

import numpy as np
import pytest
from datasets import Dataset

from helpers import data, evaluation


@pytest.mark.parametrize(
    ("sentence", "answer", "valid"),
    [
        ("The tea is hot.", "Hot, the tea is.", True),
        ("The tea is hot.", "Hot, the tea is. Yes, hrrrm.", True),
        ("The tea is hot.", "Yrsssss, hot, the tea is.", True),
        ("The tea is hot.", "Yrsssss, the tea is hot.", False),  # he only hummed
        ("The tea is hot.", "hot the tea is", True),
        ("The tea is hot.", "The tea is hot.", False),  # nothing moved
        ("The tea is hot.", "Hot, the tea was.", False),  # a word changed
        ("The tea is hot.", "Hot, the green tea is.", False),  # a word added
        ("The tea is hot.", "Hot, tea is.", False),  # a word lost
        ("Water the plants.", "Water the plants, you must.", True),  # the listed addition
        ("Water the plants.", "Water the plants, you should.", False),
        ("Never feed it.", "Hmm, never feed it, you must.", True),
        ("The tea is hot.", "The tea is hot, you must.", False),  # no command
        ("Is the tea hot?", "Is the tea hot, you must?", False),
        ("Do you like tea?", "Do you like tea, you must?", False),
        ("Water the plants.", "Water the plants.", False),
        ("Do what you must.", "Do what you must.", False),
        ("The tea is hot.", "", False),
    ],
)
def test_valid_order(sentence, answer, valid):
    assert evaluation.valid_order(sentence, answer) is valid


def test_exact_ignores_case_end_and_interjections_only():
    report = evaluation.judge(
        ["The tea is hot."] * 4,
        ["Hmm, hot, the tea is."] * 4,
        [
            "hot, the tea is",
            "Hot, the tea is! Yes, hrrrm.",
            "Hot the tea is.",
            "Tea is hot.",
        ],
    )
    assert [example.exact for example in report.examples] == [True, True, False, False]
    assert report.exact_match == 50.0
    assert report.valid_order == 75.0


def test_you_must_is_for_commands():
    """Every command may gain it, and hardly another sentence: it once let all of them through."""
    rows = data.load_yoda("train", form="columns")
    answers = [sentence.rstrip(".?!") + ", you must." for sentence in rows["sentence"]]
    report = evaluation.judge(rows["sentence"], rows["translation"], answers)
    kinds = Counter(
        kind
        for kind, example in zip(rows["kind"], report.examples, strict=True)
        if example.valid_order
    )
    assert kinds.pop("imperative") == rows["kind"].count("imperative")
    assert kinds.total() < 0.03 * len(rows)


def test_an_interval_holds_the_truth_95_times_in_a_hundred():
    made = np.random.default_rng(1)
    found = [evaluation.interval(made.normal(3, 1, 60)) for _ in range(200)]
    held = sum(one.low <= 3 <= one.high for one in found)
    assert 180 <= held <= 199
    assert all(one.low < one.mean < one.high for one in found)


def test_pairs_are_compared_pair_by_pair():
    made = np.random.default_rng(0)
    base = made.normal(3, 1, 100)
    better = base - 0.1 + made.normal(0, 0.05, 100)
    gained = evaluation.interval(better, over=base)
    alone = evaluation.interval(better)
    assert -0.12 < gained.low < gained.mean < gained.high < -0.08
    assert alone.low < 3 < alone.high  # which says nothing
    half = 1.96 * (better - base).std() / 10  # what a textbook says of a hundred
    assert gained[1:] == pytest.approx((gained.mean - half, gained.mean + half), abs=0.002)


def test_sentences_weigh_by_their_tokens():
    assert evaluation.interval([1, 4], weights=[3, 1]).mean == 1.75
    with pytest.raises(ValueError, match="equally long"):
        evaluation.interval([1, 2], weights=[1])
    with pytest.raises(ValueError, match="equally long"):
        evaluation.interval([])
    with pytest.raises(ValueError, match="finite"):
        evaluation.interval([1, math.nan])


def test_a_report_s_intervals():
    sentences = [f"The tea {number} is hot." for number in range(40)]
    wanted = [f"Hot, the tea {number} is." for number in range(40)]
    right = evaluation.judge(sentences, wanted, wanted)
    half = evaluation.judge(sentences, wanted, wanted[:20] + sentences[20:])
    none = evaluation.judge(sentences, wanted, sentences)
    assert right.interval() == pytest.approx((100, 91.2, 100), abs=0.1)  # Wilson's
    assert half.interval("valid_order") == pytest.approx((50, 35.2, 64.8), abs=0.1)
    gained = half.interval(over=none)
    assert gained == pytest.approx((50, 35, 65), abs=2.6)
    assert right.interval("chrf").low == pytest.approx(100)
    chrf = half.interval("chrf")
    assert none.chrf < chrf.low < chrf.mean == half.chrf < chrf.high < 100
    better = right.interval("chrf", over=half)
    assert better.mean == pytest.approx(100 - half.chrf)
    assert 0 < better.low < better.mean < better.high
    assert str(half).startswith("40 sentences: exact match 50.0 % (35.2 to 64.8), valid")
    other = evaluation.judge(["a b"], ["b, a"], ["b, a"])
    with pytest.raises(ValueError, match="other sentences"):
        other.interval(over=half)
    with pytest.raises(ValueError, match="metric"):
        half.interval("bleu")
    table = evaluation.compare({"base": none, "half": half, "other": other})
    assert list(table["exact match, gain over base"])[::2] == ["", ""]
    assert table.loc["half", "exact match, gain over base"].startswith("+50.0 (35")


def test_perfect_answers_score_a_hundred():
    rows = data.load_yoda("test", form="columns")
    report = evaluation.judge(rows["sentence"], rows["translation"], rows["translation_extra"])
    assert report.exact_match == report.valid_order == 100.0
    assert report.chrf == pytest.approx(100.0)


def test_copying_the_sentence_scores_nothing_but_chrf():
    rows = data.load_yoda("test", form="columns")
    report = evaluation.judge(rows["sentence"], rows["translation"], rows["sentence"])
    assert report.exact_match == 0.0
    assert report.valid_order == 0.0
    assert 30 < report.chrf < 90


@pytest.mark.parametrize("form", ["prompt_completion", "messages", "columns"])
def test_every_form_of_the_data_can_be_judged(embedded, tokenizer, form):
    rows = data.load_yoda("test", form=form)
    report = evaluation.evaluate(embedded, tokenizer, rows, limit=2, max_new_tokens=3)
    assert len(report.examples) == 2
    assert report.examples[0].sentence == data.load_yoda("test", form="columns")[0]["sentence"]


def test_answers_are_cut_a_little_behind_the_longest_reference(embedded, tokenizer, monkeypatch):
    """The base model rambles on; a caller who wants more says so."""
    asked = []

    def watched(*arguments, **options):
        asked.append(options["max_new_tokens"])
        return [""] * len(arguments[2])

    monkeypatch.setattr(evaluation, "generate", watched)
    rows = data.load_yoda("test").select(range(2))
    longest = max(len(tokenizer(row["completion"][0]["content"])["input_ids"]) for row in rows)
    evaluation.evaluate(embedded, tokenizer, rows)
    evaluation.evaluate(embedded, tokenizer, rows, max_new_tokens=5)
    assert asked == [longest + 8, 5]


def test_reports_show_failures_first_and_escape_html():
    report = evaluation.judge(
        ["a b", "c <i>"], ["b, a", "<i>, c"], ["b, a", "<script>alert(1)</script>"]
    )
    markup = report._repr_html_()
    assert "<script>" not in markup
    assert markup.index("&lt;script&gt;") < markup.index("b, a")
    assert "exact match 50.0 %" in str(report)


def test_compare_has_one_row_per_report():
    good = evaluation.judge(["a b"], ["b, a"], ["b, a"])
    bad = evaluation.judge(["a b"], ["b, a"], ["a b"])
    table = evaluation.compare({"base": bad, "tuned": good})
    assert list(table.index) == ["base", "tuned"]
    assert table.loc["tuned", "exact match (%)"] == 100.0
    assert table.loc["base", "valid order (%)"] == 0.0
    with pytest.raises(ValueError, match="reports is empty"):
        evaluation.compare({})


def test_bad_input_is_named(embedded, tokenizer):
    with pytest.raises(ValueError, match="dataset is empty"):
        evaluation.evaluate(embedded, tokenizer, [])
    with pytest.raises(ValueError, match="limit"):
        evaluation.evaluate(embedded, tokenizer, [{}], limit=0)
    with pytest.raises(ValueError, match="needs columns"):
        evaluation.evaluate(embedded, tokenizer, Dataset.from_dict({"text": ["x"]}))
    with pytest.raises(ValueError, match="plain text"):
        evaluation.evaluate(embedded, tokenizer, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(ValueError, match="equally long"):
        evaluation.judge(["a"], [], [])
