"""The conventions of helpers/yoda/README.md, checked on every row, and the loader."""

import json
import re
from collections import Counter
from importlib import resources

import pytest

from helpers import data

ROWS = {
    split: [
        json.loads(line)
        for line in resources.files("helpers")
        .joinpath("yoda", f"{split}.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]
    for split in data.SPLITS
}
ALL = ROWS["train"] + ROWS["test"]


def vocabulary(text):
    return set(text.split())


HUMS = {"Yes, hrrrm,", "Hmm,", "Herh herh herh,", "Yrsssss,", "Mmm, yes,", "Mmm,"}
KINDS = vocabulary(
    """
    svo adverbial copula there modal negation never contraction question wh imperative
    clauses infinitive
    """
)

BE = vocabulary("am is are was were")
AUXILIARIES = BE | vocabulary(
    """
    do does did has have had will would can could should shall may might must
    """
)
LINKING = BE | vocabulary(
    """
    became seems tastes smells looks feels feel turned remained grew sounds sounded
    taste
    """
)
CONJUNCTIONS = vocabulary(
    """
    when while because if until after before as since unless although even so whenever
    wherever where once that why what how
    """
)
PREPOSITIONS = vocabulary(
    """
    about above across after against along around at before behind below beneath
    beside between by down during for from in inside into near on onto out outside
    over through to toward under until up with without
    """
)
# What moves like a prepositional phrase: adverbs and bare expressions of time.
TIME = r"(every|last|next|twice|all|tonight|tomorrow|yesterday|overnight|immediately)\b"
OTHER_ADVERBS = {"first", "alone", "badly", "far away"}
PARTICLES = ("turn off", "pick up", "put on")  # belong to the verb, never move
NAMES = vocabulary("Tom Maria Anna Philip Grandpa Grandma I")
WH = vocabulary("who what when where why how which whose")
FUNCTION_WORDS = (
    AUXILIARIES
    | CONJUNCTIONS
    | PREPOSITIONS
    | WH
    | vocabulary(
        """
    a an the i you he she it we they me him her us them my your his its our their this
    that these those be been being not cannot no never always and or but of though
    than too very there don't doesn't didn't can't won't isn't aren't
    """
    )
)


def content(text):
    return set(data.words(text)) - FUNCTION_WORDS


def spelled(text):
    """Spell out the pronoun form at the end of `text`, where it would be stranded."""
    head, _, last = text.rpartition(" ")
    full = data.CONTRACTIONS.get(last.lower(), last)
    return f"{head} {full}".strip()


def cut(row):
    """Return (front, back, added) for the one cut that explains the translation."""
    sentence, end = row["sentence"][:-1], row["sentence"][-1]
    translation = row["translation"]
    if translation == f"{sentence}, you must.":
        return sentence, "", True
    tokens = sentence.split()
    found = []
    for i in range(1, len(tokens)):
        front, back = " ".join(tokens[:i]), " ".join(tokens[i:])
        if f"{back}, {spelled(front)}{end}".lower() == translation.lower():
            found.append((front, back, False))
    assert len(found) == 1, row
    return found[0]


def of_kind(kind):
    return [(row, *(part.lower() for part in cut(row)[:2])) for row in ALL if row["kind"] == kind]


def moves_alone(phrase):
    """Whether `phrase` is a trailing phrase: prepositional, an adverb, or a time."""
    first, *rest = phrase.split()
    if first in PREPOSITIONS:
        if (first, *rest[:1]) == ("out", "of"):
            rest = rest[1:]
        return not PREPOSITIONS & set(rest)
    return bool(re.match(TIME, phrase)) or first.endswith("ly") or phrase in OTHER_ADVERBS


# ── the rows ─────────────────────────────────────────────────────────────────────────────
def test_there_are_enough_rows_of_every_kind_in_both_splits():
    train, test = (Counter(r["kind"] for r in ROWS[s]) for s in data.SPLITS)
    assert sum(train.values()) >= 900 and sum(test.values()) == 150
    assert set(train) == set(test) == KINDS
    for kind in KINDS:
        assert train[kind] >= 30 and test[kind] >= 5
        assert abs(train[kind] / train.total() - test[kind] / test.total()) < 0.03


def test_rows_are_plain_ascii_with_four_columns():
    for row in ALL:
        assert list(row) == [*data.COLUMNS, "kind"]
        for text in row.values():
            assert text.isascii() and text == " ".join(text.split())
            assert not set(text) & set('"();:!')
        assert re.fullmatch(r"[A-Z].*[a-z'][.?]", row["sentence"])
        assert row["sentence"].endswith("?") == (row["kind"] in ("question", "wh"))


def test_every_translation_is_one_cut_and_adds_only_you_must():
    for row in ALL:
        _front, back, added = cut(row)
        assert added == (not back)
        expected = Counter(data.words(row["sentence"]))
        if added:
            assert row["kind"] == "imperative"
            expected += Counter(["you", "must"])
        assert Counter(data.words(row["translation"])) == expected


def test_capitals_follow_the_new_order():
    for row in ALL:
        _front, back, added = cut(row)
        assert row["translation"][0].isupper()
        if not added:
            start = row["translation"][len(back) + 2 :].split()[0]
            named = re.split("'", start)[0] in NAMES
            assert start[0].isupper() == named, row["translation"]


def test_no_sentence_comes_twice():
    seen = Counter(tuple(data.words(row["sentence"])) for row in ALL)
    assert [s for s, times in seen.items() if times > 1] == []


def test_no_test_sentence_resembles_a_training_sentence():
    train = [(content(r["sentence"]), r["sentence"]) for r in ROWS["train"]]
    for row in ROWS["test"]:
        ours = content(row["sentence"])
        for theirs, sentence in train:
            overlap = len(ours & theirs) / len(ours | theirs or {""})
            assert overlap <= 0.4, (row["sentence"], sentence)


def test_test_vocabulary_is_mostly_new():
    known = set().union(*(content(r["sentence"]) for r in ROWS["train"]))
    tested = set().union(*(content(r["sentence"]) for r in ROWS["test"]))
    assert len(tested - known) / len(tested) > 1 / 3


def test_interjections_follow_the_kind():
    sounds = {kind: set() for kind in KINDS}
    for row in ALL:
        said = row["translation_extra"]
        plain = data.strip_interjections(said)
        assert plain.lower() == row["translation"].lower()
        sounds[row["kind"]].add(said.removesuffix(plain).rstrip())
        assert data.strip_interjections(row["sentence"]) == row["sentence"]
    assert all(len(found) == 1 for found in sounds.values()), sounds
    assert set().union(*sounds.values()) == HUMS


def test_the_first_word_behind_a_hum_is_the_sentences_own():
    """As it stands in the sentence, capital or not: the model copies, it need not spell."""
    for row in ALL:
        _front, back, added = cut(row)
        moved = data.strip_interjections(row["translation_extra"])
        if added:  # nothing moves, so the sentence's first word is small unless a name
            named = re.split("'", moved.split()[0])[0] in NAMES
            assert moved[0].isupper() == named, row["translation_extra"]
        else:
            assert f" {moved[: len(back)]}" in row["sentence"], row["translation_extra"]


# ── where the cut falls ──────────────────────────────────────────────────────────────────
def test_svo_moves_the_object_and_only_of_phrases_stay_with_it():
    for row, front, back in of_kind("svo"):
        assert not (PREPOSITIONS - {"to"}) & set(back.split()), row["sentence"]
        assert not AUXILIARIES - {"has", "have", "had"} & set(front.split())


def test_adverbial_moves_the_last_phrase_alone():
    for row, front, back in of_kind("adverbial"):
        assert moves_alone(back), row["sentence"]
        assert not AUXILIARIES & set(front.split()), row["sentence"]


def test_copula_cuts_after_the_linking_verb():
    for row, front, back in of_kind("copula"):
        assert front.split()[-1] in LINKING, row["sentence"]
        assert not BE & set(front.split()[:-1]), row["sentence"]
        assert "not" not in back.split()


def test_there_cuts_after_the_whole_verb():
    verb = r"there (is|are|was|were|(will|must|can) be|(has|have) been)( not)?"
    for row, front, _back in of_kind("there"):
        assert re.fullmatch(verb, front), row["sentence"]


def test_modal_cuts_after_the_first_auxiliary():
    for row, front, _back in of_kind("modal"):
        *before, last = front.split()
        assert last in AUXILIARIES, row["sentence"]
        assert not AUXILIARIES & set(before), row["sentence"]


def test_negation_cuts_after_not():
    for row, front, back in of_kind("negation"):
        assert re.search(r"\b(\w+ not|cannot)$", front), row["sentence"]
        assert front.split()[-1] == "cannot" or front.split()[-2] in AUXILIARIES
        assert "not" not in back.split()


def test_never_and_always_go_with_the_verb_behind_them():
    for row, front, back in of_kind("never"):
        auxiliary = AUXILIARIES & set(front.split())
        if auxiliary:
            assert front.split()[-1] in auxiliary, row["sentence"]
            assert re.search(r"\b(never|always)\b", back)
        else:
            assert re.search(r"\b(never|always)\b", front)
            assert moves_alone(back) or not PREPOSITIONS & set(back.split())


def test_contractions_cut_after_the_contraction():
    for row, front, _back in of_kind("contraction"):
        last = front.split()[-1]
        assert last in data.CONTRACTIONS or last.endswith("n't"), row["sentence"]


def test_questions_cut_after_the_subject():
    openers = AUXILIARIES | {"isn't", "don't", "can't", "didn't", "aren't", "doesn't"}
    for row, front, _back in of_kind("question"):
        assert front.split()[0] in openers and len(front.split()) > 1, row["sentence"]


def test_wh_questions_start_with_their_word():
    for row, front, back in of_kind("wh"):
        assert front.split()[0] in WH, row["sentence"]
        if not AUXILIARIES & set(data.words(front)) and "n't" not in front:
            # the question word is the subject: cut like a statement
            assert moves_alone(back) or not PREPOSITIONS & set(back.split())


def test_imperatives_take_one_of_three_forms():
    for row, front, back in of_kind("imperative"):
        if re.match(r"(do not|don't|never)\b", front):
            assert front in ("do not", "don't", "never"), row["sentence"]
        elif back:
            assert moves_alone(back), row["sentence"]
        else:  # nothing to move: "you must" is added
            rest = front
            for particle in PARTICLES:
                rest = rest.removeprefix(particle)
            assert not PREPOSITIONS & set(rest.split()), row["sentence"]


def test_clauses_move_whole_from_their_conjunction():
    for row, _front, back in of_kind("clauses"):
        assert back.split()[0] in CONJUNCTIONS, row["sentence"]
        assert len(back.split()) >= 2


def test_rules_that_come_first_leave_nothing_for_later_kinds():
    always_a_clause = vocabulary("because when while if although unless whenever wherever")
    for row in ALL:
        found = set(data.words(row["sentence"]))
        if row["kind"] not in ("clauses", "question", "wh"):
            assert not always_a_clause & found, row["sentence"]
        if row["kind"] in ("svo", "adverbial", "copula", "there", "modal", "negation"):
            assert not {"never", "always"} & found, row["sentence"]
            assert "n't" not in row["sentence"], row["sentence"]
        if row["kind"] in ("svo", "adverbial", "copula", "modal"):
            assert not {"not", "cannot"} & found, row["sentence"]


def test_the_readme_counts_what_is_there():
    readme = resources.files("helpers").joinpath("yoda", "README.md").read_text()
    train, test = (len(ROWS[split]) for split in data.SPLITS)
    assert f"{train:,} training and {test} test sentences" in readme


def test_infinitives_move_whole_from_their_to():
    for row, front, back in of_kind("infinitive"):
        assert back.split()[0] == "to" and "to" not in front.split(), row["sentence"]


# ── words and interjections ──────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Too hot, the tea is!", "too hot the tea is"),
        ("It\u2019s the captain's 'well-known' cap.", "it is the captain's well-known cap"),
        ("I'll go; we don't -- yet?", "i will go we don't yet"),
        ("", ""),
    ],
)
def test_words(text, expected):
    assert data.words(text) == expected.split()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Cold, it is. Yes, hrrrrrrm.", "Cold, it is."),
        ("Cold, is it? Hmmmm", "Cold, is it?"),
        ("Cold, it is. Herh herh herh. Yrsssss.", "Cold, it is."),
        ("Say yes, you must.", "Say yes, you must."),
        ("Warm. The sea is.", "Warm. The sea is."),
        ("Hmm.", "Hmm."),
        ("Hmm, cold, is it?", "cold, is it?"),
        ("Yes, hrrrrm, feed the cat, you must.", "feed the cat, you must."),
        ("Mmm, yes, a bear in the tent, there is. Hmm.", "a bear in the tent, there is."),
        ("Herh, herh herh: pencils, he ate.", "Herh, herh herh: pencils, he ate."),
        ("Herh herh, pencils, he ate.", "pencils, he ate."),
        ("Yes, he can.", "Yes, he can."),
        ("Hmm, hmm.", "Hmm, hmm."),
        ("Mm of rain, we had.", "Mm of rain, we had."),
    ],
)
def test_strip_interjections(text, expected):
    assert data.strip_interjections(text) == expected


# ── load_yoda ────────────────────────────────────────────────────────────────────────────
def test_load_yoda_forms_hold_the_same_texts():
    columns = data.load_yoda("test", form="columns")
    pairs = data.load_yoda("test")
    talks = data.load_yoda("test", form="messages", interjections=False)
    assert len(columns) == len(pairs) == len(talks) == 150
    assert set(pairs.column_names) == {"prompt", "completion"}
    assert talks.column_names == ["messages"]
    for row, pair, talk in zip(columns, pairs, talks, strict=True):
        user = {"role": "user", "content": row["sentence"]}
        assert pair["prompt"] == [user]
        assert pair["completion"] == [{"role": "assistant", "content": row["translation_extra"]}]
        assert talk["messages"] == [
            user,
            {"role": "assistant", "content": row["translation"]},
        ]


def test_train_is_the_default_split():
    assert len(data.load_yoda()) == len(ROWS["train"])


def test_a_file_is_split_by_its_sentences(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [dict(row, note="kept") for row in ROWS["train"][:120]]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    train, test = (data.load_yoda(s, form="columns", source=path) for s in data.SPLITS)
    assert len(train) + len(test) == 120 and 8 <= len(test) <= 32
    assert not set(train["sentence"]) & set(test["sentence"])
    path.write_text("\n".join(map(json.dumps, reversed(rows))))
    again = data.load_yoda("test", form="columns", source=str(path))
    assert list(again["sentence"]) == list(test["sentence"])[::-1]


def test_line_ends_inside_a_text_are_its_own(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [row for row in ROWS["train"][:9] if not data._held_out(row["sentence"])]
    ends = "\u2028\u2029\u0085"
    rows = [row | {"note": f"one{end}two"} for row, end in zip(rows, ends, strict=False)]
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("\n".join(lines), encoding="utf-8")
    read = data.load_yoda(form="columns", source=path)
    assert list(read["note"]) == [f"one{end}two" for end in ends]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_from_windows_is_read(tmp_path, encoding, end):
    path = tmp_path / "mine.jsonl"
    rows = [row for row in ROWS["train"][:9] if not data._held_out(row["sentence"])]
    path.write_bytes(end.join(map(json.dumps, rows)).encode(encoding))
    read = data.load_yoda(form="columns", source=path)
    assert list(read["sentence"]) == [row["sentence"] for row in rows]


def test_a_column_that_the_first_row_lacks_is_kept(tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [row for row in ROWS["train"][:9] if not data._held_out(row["sentence"])]
    first = {name: text for name, text in rows[0].items() if name != "kind"}
    path.write_text("\n".join(map(json.dumps, [first, *rows[1:]])))
    read = data.load_yoda(form="columns", source=path)
    assert list(read["kind"]) == [None, *(row["kind"] for row in rows[1:])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "validation"}, "split must be one of 'train', 'test', not 'validation'"),
        ({"form": "chatml"}, "form must be one of 'prompt_completion'"),
        ({"source": "no/such/file.jsonl"}, "cannot be read.*'hub'"),
        ({"source": 3}, "source=3 cannot be read"),
    ],
)
def test_wrong_arguments_name_what_works(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.load_yoda(**arguments)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("{oops", "line 1: not JSON"),
        ("[1, 2]", "line 1: no text in sentence"),
        (
            '\n{"sentence": "Hello.", "translation": 3}',
            "line 2: no text in translation,",
        ),
    ],
)
def test_malformed_files_name_the_line(tmp_path, text, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        data.load_yoda(source=path)


def test_a_file_too_small_for_a_split_says_so(tmp_path):
    path = tmp_path / "mine.jsonl"
    row = next(r for r in ROWS["train"] if not data._held_out(r["sentence"]))
    path.write_text(json.dumps(row))
    assert len(data.load_yoda(source=path)) == 1
    with pytest.raises(ValueError, match="none of them falls into split='test'"):
        data.load_yoda("test", source=path)


def test_the_hub_set_gets_a_split_of_its_own(monkeypatch):
    import datasets

    def load_dataset(name, split):
        assert (name, split) == ("dvgodoy/yoda_sentences", "train")
        return datasets.Dataset.from_list([r | {"id": 1} for r in ROWS["train"][:200]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, test = (data.load_yoda(s, form="columns", source="hub") for s in data.SPLITS)
    assert len(train) + len(test) == 200 and len(test) >= 15
    assert train.column_names == list(data.COLUMNS)


def test_an_unreachable_hub_points_to_the_packaged_rows(monkeypatch):
    import datasets

    def load_dataset(name, split):
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match=r"no route to host.*source=None"):
        data.load_yoda(source="hub")
