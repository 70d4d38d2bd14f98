"""Special tokens, templates and the mask view (helpers.chat)."""

import copy
import functools
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import trl
from hypothesis import HealthCheck, given, settings

from helpers import chat, models

TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))
CONVERSATION = [
    {"role": "user", "content": "The birch canoe slid on the smooth planks."},
    {"role": "assistant", "content": "On the smooth planks, the birch canoe slid."},
    {"role": "user", "content": "Glue the sheet to the dark blue background."},
    {"role": "assistant", "content": "To the dark blue background, the sheet glue."},
]


@functools.cache
def _embedded():
    return chat.prepare_tokenizer(models.load_tokenizer(models.EMBEDDED))


def fresh(template=None):
    """A private copy of the prepared embedded tokenizer."""
    tokenizer = copy.deepcopy(_embedded())
    tokenizer.chat_template = template or chat.chatml_template()
    return tokenizer


def parts(messages):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]


def encode(tokenizer, messages):
    """(ids, mask) of a conversation, with the mask from the tokenizer itself."""
    out = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    return out["input_ids"], out["assistant_masks"]


def masked(ids, mask):
    return [token if kept else -100 for token, kept in zip(ids, mask, strict=True)]


def codes(tokenizer, ids, labels, *rest, **named):
    return [p.code for p in chat.mask_view(tokenizer, ids, labels, *rest, **named).problems]


# ---------------------------------------------------------------- tokenizers and models


def tiny_tokenizer(*specials, unused=(), template=None, **roles):
    """A byte-level BPE tokenizer with the given special tokens, made here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[*specials, *unused],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["a small corpus of small words"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **roles)
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(rows, *, tied=True, **ids):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        **ids,
    )
    return LlamaForCausalLM(config)


END = "<|endoftext|>"
SITUATIONS = {
    "bos, eos and unk are one, pad missing (GPT-2)": (
        lambda: tiny_tokenizer(END, bos_token=END, eos_token=END, unk_token=END),
        "<|pad|>",
    ),
    "pad is eos, unk free (Llama 2)": (
        lambda: tiny_tokenizer(
            "<unk>", "<s>", "</s>",
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>",
        ),
        "<unk>",
    ),
    "pad is eos, reserved tokens (Llama 3)": (
        lambda: tiny_tokenizer(
            "<s>", "</s>", unused=["<|reserved_special_token_0|>"],
            bos_token="<s>", eos_token="</s>", pad_token="</s>",
        ),
        "<|reserved_special_token_0|>",
    ),
    "pad missing, one made for padding": (
        lambda: tiny_tokenizer(
            "<s>", "</s>", unused=["<|image_pad|>", "<|right_pad|>"],
            bos_token="<s>", eos_token="</s>",
        ),
        "<|right_pad|>",
    ),
    "pad fine already": (
        lambda: tiny_tokenizer(
            "<s>", "</s>", "<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
        ),
        "<pad>",
    ),
    "pad ends every turn, eos is another": (
        lambda: tiny_tokenizer(
            END, "<|im_start|>", "<|im_end|>", eos_token=END, pad_token="<|im_end|>",
            template=chat.chatml_template(),
        ),
        "<|pad|>",
    ),
    "unk is eos, pad missing, roles make the markers (Phi-3)": (
        lambda: tiny_tokenizer(
            END, "<|user|>", "<|assistant|>", "<|end|>", "<|placeholder1|>",
            eos_token=END, unk_token=END,
            template="{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
            "{{ '<|end|>' }}{% endfor %}",
        ),
        "<|placeholder1|>",
    ),
}  # fmt: skip


def state(tokenizer):
    return (
        tokenizer.special_tokens_map,
        sorted(tokenizer.get_vocab().items()),
        list(tokenizer.extra_special_tokens),
    )


def ids_of(model):
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return [[getattr(c, n) for n in names] for c in (model.config, model.generation_config)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation_ends_well_and_twice_equals_once(situation, tied):
    make, expected_pad = SITUATIONS[situation]
    tokenizer = make()
    rows = len(tokenizer)
    model = tiny_model(rows, tied=tied)
    old = model.get_input_embeddings().weight.detach().clone()

    assert chat.prepare_tokenizer(tokenizer) is tokenizer
    assert tokenizer.pad_token == expected_pad
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert chat.prepare_model(model, tokenizer) is model
    once = state(tokenizer), ids_of(model), model.get_input_embeddings().weight.shape
    chat.prepare_model(model, chat.prepare_tokenizer(tokenizer))
    assert once == (
        state(tokenizer), ids_of(model), model.get_input_embeddings().weight.shape,
    )  # fmt: skip

    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    assert embedding.shape[0] >= rows and embedding.shape[0] > tokenizer.pad_token_id
    assert torch.equal(embedding[:rows], old)
    assert (embedding.data_ptr() == head.data_ptr()) == tied
    assert head.shape == embedding.shape
    stops = tokenizer.eos_token_id
    if tokenizer.chat_template:  # both of these end a turn otherwise than by EOS
        end = "<|im_end|>" if "im_end" in tokenizer.chat_template else "<|end|>"
        stops = [stops, tokenizer.convert_tokens_to_ids(end)]
    for pad, bos, eos in ids_of(model):
        assert (pad, eos) == (tokenizer.pad_token_id, stops)
        assert tokenizer.bos_token_id in {None, bos}
    # Nothing the template says may ever be padding.
    assert tokenizer.pad_token not in {"<|im_end|>", "<|end|>", "<|user|>", "<|image_pad|>"}


def test_the_embedded_tokenizer_gets_a_spare_token_and_keeps_its_vocabulary():
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    rows = len(tokenizer)
    chat.prepare_tokenizer(tokenizer)
    assert len(tokenizer) == rows
    assert tokenizer.pad_token_id in range(3, 17)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)


def test_growing_rounds_up_and_spare_rows_are_used_first():
    tokenizer = chat.prepare_tokenizer(tiny_tokenizer("<s>", "</s>", eos_token="</s>"))
    rows = len(tokenizer)
    roomy = chat.prepare_model(tiny_model(rows + 7), tokenizer)
    assert roomy.get_input_embeddings().weight.shape[0] == rows + 7
    chat.prepare_tokenizer(tokenizer, special_tokens=["<|think|>"], tokens=["canoe", "a"])
    assert len(tokenizer) == rows + 2  # "a" was there
    assert tokenizer("a canoe")["input_ids"].count(tokenizer.vocab["canoe"]) == 1
    assert tokenizer.decode(tokenizer("x<|think|>")["input_ids"], skip_special_tokens=True) == "x"
    chat.prepare_model(roomy, tokenizer)
    assert roomy.get_input_embeddings().weight.shape[0] == rows + 7
    tight = chat.prepare_model(tiny_model(rows - 1), tokenizer, multiple_of=8)
    grown = tight.get_input_embeddings().weight.shape[0]
    assert grown % 8 == 0 and rows + 2 <= grown < rows + 10
    assert tight.config.vocab_size == grown


def test_several_stop_tokens_stay_and_one_is_replaced():
    tokenizer = chat.prepare_tokenizer(tiny_tokenizer("<s>", "</s>", eos_token="</s>"))
    model = tiny_model(len(tokenizer), eos_token_id=[7, 8])
    chat.prepare_model(chat.prepare_model(model, tokenizer), tokenizer)
    assert model.config.eos_token_id == [1, 7, 8] == model.generation_config.eos_token_id
    single = chat.prepare_model(tiny_model(len(tokenizer), eos_token_id=7), tokenizer)
    assert single.config.eos_token_id == 1 == single.generation_config.eos_token_id


def test_the_end_token_gets_an_input_gradient_again():
    tokenizer = chat.prepare_tokenizer(tiny_tokenizer("<s>", "</s>", eos_token="</s>"))
    model = tiny_model(len(tokenizer), tied=False, pad_token_id=1)  # built with pad == eos
    ids = torch.tensor([[5, 1, 6]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient[1].abs().sum() == 0  # the trap
    chat.prepare_model(model, tokenizer)
    model(input_ids=ids, labels=ids).loss.backward()
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"pad": "</s>"}, ValueError, "never learns to stop"),
        ({"pad": "<|im_end|>"}, ValueError, "written by the chat template"),
        ({"special_tokens": "<x>"}, TypeError, "list of tokens"),
        ({"tokens": "word"}, TypeError, "list of tokens"),
        ({"bos": 3}, TypeError, "non-empty string"),
        ({"pad": ""}, TypeError, "non-empty string"),
    ],
)
def test_wrong_tokens_are_refused_with_a_way_out(arguments, error, words):
    tokenizer = tiny_tokenizer(
        "<s>", "</s>", "<|im_start|>", "<|im_end|>",
        eos_token="</s>", template=chat.chatml_template(),
    )  # fmt: skip
    with pytest.raises(error, match=words):
        chat.prepare_tokenizer(tokenizer, **arguments)


def test_the_template_follows_the_tokens_that_there_are():
    chatml = tiny_tokenizer("<|im_start|>", "<|im_end|>", template="{{ 1 }}")
    assert chat.choose_template(chatml) == chat.chatml_template()
    own = tiny_tokenizer("<|end|>", template="{{ 1 }}")
    assert chat.choose_template(own) == "{{ 1 }}"
    with pytest.raises(ValueError, match="neither a chat template nor an EOS token"):
        chat.choose_template(tiny_tokenizer("<|end|>"))


@pytest.mark.parametrize("bos", [None, "</s>", "<s>"])  # "</s>" is both in OPT
def test_a_base_model_without_a_template_learns_to_stop(tmp_path, bos):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    asked, answered = CONVERSATION[:1], CONVERSATION[1:2]
    tokenizer = tiny_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", bos_token=bos)
    tokenizer.chat_template = chat.choose_template(tokenizer)
    chat.prepare_tokenizer(tokenizer)
    trainer = SFTTrainer(
        chat.prepare_model(tiny_model(len(tokenizer)), tokenizer),
        args=SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": asked, "completion": answered}]),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    batch = trainer.data_collator([row])
    view = chat.mask_view(tokenizer, **batch)
    answer = answered[0]["content"] + "</s>"
    assert view.problems == [] and view.learned == [[answer + "\n"]]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)
    assert row["input_ids"][: len(prompt["input_ids"])] == prompt["input_ids"]
    ids, mask = encode(tokenizer, asked + answered)
    marked = [i for i, kept in zip(ids, mask, strict=True) if kept]
    assert tokenizer.decode(marked) == answer


def test_named_tokens_win():
    tokenizer = tiny_tokenizer("<s>", "</s>", "<mask>", eos_token="</s>", bos_token="</s>")
    chat.prepare_tokenizer(tokenizer, bos="<s>", pad="<mask>", unk="<unk>")
    assert (tokenizer.bos_token, tokenizer.pad_token) == ("<s>", "<mask>")
    assert tokenizer.unk_token == "<unk>" and tokenizer.unk_token_id == len(tokenizer) - 1


def test_a_model_refuses_an_unprepared_tokenizer():
    tokenizer = tiny_tokenizer("</s>", eos_token="</s>", pad_token="</s>")
    with pytest.raises(ValueError, match=r"prepare_tokenizer\(tokenizer\) first"):
        chat.prepare_model(tiny_model(len(tokenizer)), tokenizer)


# ---------------------------------------------------------------- our template


def test_our_template_marks_the_answer_and_its_end():
    tokenizer = fresh()
    ids, mask = encode(tokenizer, CONVERSATION)
    said = [t for t, kept in zip(ids, mask, strict=True) if kept]
    answers = [m["content"] + "<|im_end|>" for m in CONVERSATION if m["role"] == "assistant"]
    assert tokenizer.decode(said) == "".join(answers)


@pytest.mark.parametrize("system", [None, "You are Yoda.", 'It\'s "é"\n{{ x }} {% y %} \\n'])
def test_a_prompt_is_a_prefix_of_its_conversation(system):
    from trl.chat_template_utils import (
        get_training_chat_template,
        has_generation_markers,
        is_chat_template_prefix_preserving,
        is_chat_template_stop_token_trained,
    )

    tokenizer = fresh(chat.chatml_template(system=system))
    whole = tokenizer.apply_chat_template(CONVERSATION[:2], tokenize=False)
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:1], tokenize=False, add_generation_prompt=True
    )
    assert whole == prompt + CONVERSATION[1]["content"] + "<|im_end|>\n"
    start = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    assert whole.startswith(start + "<|im_start|>user\n")
    own = [{"role": "system", "content": "Mine."}, *CONVERSATION]
    text = tokenizer.apply_chat_template(own, tokenize=False)
    assert text.count("<|im_start|>system") == 1 and "Mine." in text
    assert has_generation_markers(tokenizer.chat_template)
    assert is_chat_template_stop_token_trained(tokenizer)
    assert is_chat_template_prefix_preserving(tokenizer)
    assert get_training_chat_template(tokenizer) is None


def test_our_template_renders_what_the_model_was_made_with():
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    own = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    assert tokenizer.apply_chat_template(own, tokenize=False) == fresh().apply_chat_template(
        own, tokenize=False
    )
    with pytest.raises(TypeError, match="system must be a string"):
        chat.chatml_template(system=["no"])


# ---------------------------------------------------------------- the mask view


def situations(template, with_specials):
    """(tokenizer, ids, mask) for one shipped template, or None if it renders no chat."""
    import re

    from jinja2 import TemplateError

    tokenizer = fresh(template)
    for messages in (CONVERSATION, parts(CONVERSATION)):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, TypeError):
            continue
        if not all(m["content"] in text for m in CONVERSATION):
            continue
        if with_specials:
            markers = sorted(set(re.findall(r"<[^<>\s]+>|\[gMASK\]", text)))
            chat.prepare_tokenizer(tokenizer, special_tokens=markers)
        return tokenizer, *encode(tokenizer, messages)
    return None


def end_token(tokenizer, ids, mask):
    """Index of the token that ends the first answer, white space aside."""
    first_end = mask.index(0, mask.index(1)) - 1
    while not tokenizer.decode([ids[first_end]]).strip():
        first_end -= 1
    return first_end


@pytest.mark.parametrize("with_specials", [True, False], ids=["tokens", "spelled"])
@pytest.mark.parametrize("path", TEMPLATES, ids=lambda p: p.stem.removesuffix("_training"))
def test_shipped_templates_right_and_broken(path, with_specials):
    case = situations(path.read_text(encoding="utf-8"), with_specials)
    assert case is not None, "not a chat template for user and assistant?"
    tokenizer, ids, mask = case
    right = masked(ids, mask)
    view = chat.mask_view(tokenizer, ids, right)
    assert [token.trained for token in view.tokens] == [bool(kept) for kept in mask]
    assert [token.id for token in view.tokens] == ids
    assert view.problems == []

    first = mask.index(1)
    end = end_token(tokenizer, ids, mask)
    assert "end_of_turn_not_trained" in codes(
        tokenizer, ids, masked(ids, [kept and i != end for i, kept in enumerate(mask)])
    )
    early, late = [*mask[1:], 0], [0, *mask[:-1]]
    assert "prompt_trained" in codes(tokenizer, ids, masked(ids, early))
    assert {"start_not_trained", "prompt_trained"} & set(codes(tokenizer, ids, masked(ids, late)))
    assert "labels_differ" in codes(tokenizer, ids, [*right[1:], -100])
    assert codes(tokenizer, ids, [-100] * len(ids)) == ["nothing_trained"]
    assert "prompt_trained" in codes(tokenizer, ids, ids)
    assert codes(tokenizer, ids, ids[:first] + right[first:]) == ["prompt_trained"]
    # One token inside the first question.
    asked = masked(ids, [kept or i == first - 8 for i, kept in enumerate(mask)])
    assert codes(tokenizer, ids, asked) == ["prompt_trained"]
    opened = max(i for i in range(len(mask)) if mask[i] and not mask[i - 1])
    cut = next(i for i in range(opened, len(ids)) if "sheet" in tokenizer.decode(ids[opened:i]))
    assert codes(tokenizer, ids[:cut], right[:cut]) == ["truncated"]

    pad = tokenizer.pad_token_id
    for padded, attention in (
        ([*ids, pad, pad], [1] * len(ids) + [0, 0]),
        ([pad, pad, *ids], [0, 0] + [1] * len(ids)),
    ):
        quiet = [-100, -100]
        fine = right + quiet if attention[0] else quiet + right
        assert codes(tokenizer, padded, fine, attention) == []
        assert codes(tokenizer, padded, fine) == []
        bad = [*right, pad, pad] if attention[0] else [pad, pad, *right]
        assert codes(tokenizer, padded, bad, attention) == ["padding_trained"]
        assert codes(tokenizer, padded, bad) == ["padding_trained"]

    # The token that ends a turn doubles as EOS and padding, and padding is masked.
    if with_specials:
        trap = copy.deepcopy(tokenizer)
        trap.eos_token = trap.pad_token = tokenizer.convert_ids_to_tokens(ids[end])
        eos = trap.eos_token_id
        padded = [*ids, eos, eos, eos]
        quiet = [*right, -100, -100, -100]
        labels = masked(quiet, [t != eos for t in padded])
        attention = [1] * len(ids) + [0] * 3
        found = chat.mask_view(trap, padded, labels, attention).problems
        assert {"eos_not_trained", "end_of_turn_not_trained"} <= {p.code for p in found}
        assert any("pad_token is eos_token" in p.message for p in found)

    bos = copy.deepcopy(tokenizer)
    bos.bos_token = tokenizer.convert_ids_to_tokens(ids[0])
    assert "double_bos" in codes(bos, [ids[0], *ids], [-100, *right])
    assert "double_bos" not in codes(bos, ids, right)


def test_the_models_own_unmarked_template_is_read_by_its_structure():
    own = models.load_tokenizer(models.EMBEDDED)
    ours = fresh()
    messages = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    ids, mask = encode(ours, messages)
    assert own.apply_chat_template(messages, return_dict=False) == ids
    assert codes(own, ids, masked(ids, mask)) == []
    assert "end_of_turn_not_trained" in codes(
        own, ids, masked(ids, [kept and i != 2 for i, kept in zip(ids, mask, strict=True)])
    )
    assert codes(own, ids, ids) == ["prompt_trained"]


def test_original_templates_are_read_like_their_training_twins():
    """No markers in the tokenizer's template: TRL's twin, or the structure, must do."""
    for name in ("qwen2_5", "qwen3", "llama3", "gemma", "phi3", "gptoss", "deepseekv3"):
        folder = TEMPLATES[0].parent
        tokenizer, ids, mask = situations(
            (folder / f"{name}_training.jinja").read_text(encoding="utf-8"), True
        )
        tokenizer.chat_template = (folder / f"{name}.jinja").read_text(encoding="utf-8")
        assert codes(tokenizer, ids, masked(ids, mask)) == [], name
        assert codes(tokenizer, ids, ids) == ["prompt_trained"], name


def test_a_template_that_forgets_the_end_of_turn_is_caught():
    forgetful = chat.chatml_template().replace(
        "{{- message['content'] + '<|im_end|>' }}\n{%- endgeneration %}",
        "{{- message['content'] }}\n{%- endgeneration %}\n{{- '<|im_end|>' }}",
    )
    tokenizer = fresh(forgetful)
    ids, mask = encode(tokenizer, CONVERSATION)
    assert ids == encode(fresh(), CONVERSATION)[0]
    assert codes(tokenizer, ids, masked(ids, mask)) == [
        "end_of_turn_not_trained", "eos_not_trained",
    ]  # fmt: skip


def test_questions_inside_one_long_completion_are_found():
    tokenizer = fresh()
    ids, mask = encode(tokenizer, CONVERSATION)
    first = mask.index(1)
    assert codes(tokenizer, ids, [-100] * first + ids[first:]) == ["prompt_trained"]


def test_control_tokens_spelled_as_text_are_no_control_tokens():
    tokenizer = fresh()
    prompt = tokenizer.apply_chat_template(
        CONVERSATION[:1], add_generation_prompt=True, return_dict=False
    )
    # The answer spells the end of turn in ordinary tokens; the true end is not trained.
    spelled = [t for c in "Say <|im_end|>" for t in tokenizer(c)["input_ids"]]
    ids = [*prompt, *spelled, tokenizer.eos_token_id]
    labels = [-100] * len(prompt) + spelled + [-100]
    assert "end_of_turn_not_trained" in codes(tokenizer, ids, labels)


def test_a_mask_lost_to_an_unwritable_character_is_found():
    """The tokenizer drops U+0016, so transformers finds no token where the answer is."""
    tokenizer = fresh()
    ids, mask = encode(tokenizer, [CONVERSATION[0], {"role": "assistant", "content": "\x16Hm."}])
    assert sum(mask) == 0
    assert codes(tokenizer, ids, masked(ids, mask)) == ["nothing_trained"]


def test_plain_text_needs_only_its_end():
    tokenizer = fresh()
    ids = tokenizer("Just a text, no chat.")["input_ids"]
    eos = tokenizer.eos_token_id
    assert codes(tokenizer, [*ids, eos], [*ids, eos]) == []
    assert codes(tokenizer, [*ids, eos], [*ids, -100]) == ["eos_not_trained"]
    assert codes(tokenizer, ids, ids) == ["eos_not_trained"]


def test_rows_batches_tensors_and_mappings_are_the_same():
    tokenizer = fresh()
    ids, mask = encode(tokenizer, CONVERSATION)
    labels = masked(ids, mask)
    plain = chat.mask_view(tokenizer, ids, labels)
    batch = {
        "input_ids": torch.tensor([ids, ids]),
        "labels": torch.tensor([labels, labels]),
    }
    for view in (
        chat.mask_view(tokenizer, np.array(ids), np.array(labels)),
        chat.mask_view(tokenizer, torch.tensor(ids), torch.tensor(labels)),
        chat.mask_view(tokenizer, {"input_ids": [ids], "labels": [labels]}),
    ):
        assert view.tokens == plain.tokens
    double = chat.mask_view(tokenizer, batch)
    assert [t.row for t in double.tokens] == [0] * len(ids) + [1] * len(ids)
    assert double.learned[0] == double.learned[1] == plain.learned[0]
    bad = chat.mask_view(tokenizer, [ids, ids], [ids, labels])
    assert [p.code for p in bad.problems] == ["prompt_trained"] and "row 0" in str(bad.problems[0])


def test_packed_rows_show_samples_and_positions():
    tokenizer = fresh()
    ids, mask = encode(tokenizer, CONVERSATION[:2])
    places = [*range(len(ids)), *range(len(ids))]
    labels = masked(ids, mask)
    view = chat.mask_view(tokenizer, ids * 2, labels * 2, position_ids=places)
    assert view.problems == []
    assert [t.sample for t in view.tokens] == [0] * len(ids) + [1] * len(ids)
    assert "2 samples packed" in str(view) and "sample 1" in view._repr_html_()
    cut = labels[:-4] + [-100] * 4
    assert "nothing_trained" in codes(
        tokenizer, ids * 2, labels + [-100] * len(ids), position_ids=places
    )
    short = places[:-6]
    assert codes(tokenizer, (ids * 2)[:-6], (cut * 2)[:-6], position_ids=short) != []


def test_the_view_reads_without_color():
    tokenizer = fresh()
    ids, mask = encode(tokenizer, [{"role": "user", "content": "<b>é🙂"}, CONVERSATION[1]])
    pad = tokenizer.pad_token_id
    view = chat.mask_view(tokenizer, [*ids, pad, pad], [*masked(ids, mask), -100, -100])
    assert view.learned == [["On the smooth planks, the birch canoe slid.<|im_end|>"]]
    assert "⟦On the smooth planks, the birch canoe slid.<|im_end|>⟧" in str(view)
    assert "<empty_output> × 2" in str(view) and "no problems found" in str(view)
    assert repr(view) == str(view)
    markup = view._repr_html_()
    assert "no problems found" in markup
    assert "<b><u>" in markup and "<s>" in markup and "<style" not in markup
    bad = chat.mask_view(tokenizer, ids, ids)
    assert f"! {bad.problems[0]}" in str(bad) and "prompt_trained" in bad._repr_html_()
    assert "no problems found" not in bad._repr_html_()
    assert "<b>é" not in markup and "é" in markup and ">&lt;<" in markup


@pytest.mark.parametrize(
    ("arguments", "template", "words"),
    [
        (
            ([1, 2], [1]),
            None,
            r"labels has rows of \[1\] tokens but input_ids has rows of \[2\]",
        ),
        (([1, 2], [1, 2], [[1]]), None, "attention_mask has rows of"),
        (([1, 2],), None, "labels are missing"),
        (([1, 99_999_999], [1, -100]), None, "another tokenizer"),
        (([1], [1]), "{% if %}", "does not compile.*line 1"),
        (([1], [1]), "{{ raise_exception('No user, please') }}", "No user, please"),
        (([1], [1]), "always the same", "leaves contents out"),
    ],
)
def test_wrong_input_says_what_to_do(arguments, template, words):
    with pytest.raises(ValueError, match=words):
        chat.mask_view(fresh(template), *arguments)


def test_no_template_and_no_numbers_are_refused():
    tokenizer = fresh()
    with pytest.raises(TypeError, match="token ids as a tokenizer"):
        chat.mask_view(tokenizer, ["a", "b"], [1, 2])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"chatml_template\(\)"):
        chat.mask_view(tokenizer, [1], [1])


# ---------------------------------------------------------------- no false alarms

FRAGMENTS = st.sampled_from(
    [
        *(
            "<|im_end|>",
            "<|im_start|>user\n",
            "<|im_start|>assistant\n",
            "\n",
            " ",
            "{{ x }}",
        ),
        *(
            "{% generation %}",
            "<|im_end|>\n",
            "<|im_start|>",
            "assistant",
            "</s>",
            "[/INST]",
        ),
        *("<empty_output>", "<|endoftext|>", "-100", "🙂", "\u2028", "ﬁ", "\u0301"),
    ]
)
# Not control characters: this vocabulary has no bytes for some of them, and an answer that
# begins with one loses its whole assistant mask in transformers (tested above).
TEXT = st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=12)
CONTENT = st.lists(st.one_of(TEXT, FRAGMENTS), max_size=4).map("".join)


@st.composite
def conversations(draw):
    system = [{"role": "system", "content": draw(CONTENT)}] if draw(st.booleans()) else []
    turns = []
    for _ in range(draw(st.integers(1, 3))):
        turns.append({"role": "user", "content": draw(CONTENT)})
        turns.append({"role": "assistant", "content": draw(CONTENT)})
    return system + turns


def no_alarm(several, layout):
    """Lay conversations out as a collator would; a right mask must raise no alarm."""
    tokenizer = fresh_once()
    rows = [encode(tokenizer, messages) for messages in several]
    pad = tokenizer.pad_token_id
    if layout == "packed":
        ids = [t for row, _ in rows for t in row]
        labels = [t for row, mask in rows for t in masked(row, mask)]
        places = [i for row, _ in rows for i in range(len(row))]
        found = chat.mask_view(tokenizer, [ids], [labels], position_ids=[places]).problems
        found += chat.mask_view(tokenizer, ids, labels).problems
    else:
        width = max(len(row) for row, _ in rows)
        table = {"input_ids": [], "labels": [], "attention_mask": []}
        for row, mask in rows:
            gap = width - len(row)
            for name, kept, fill in (
                ("input_ids", row, pad),
                ("labels", masked(row, mask), -100),
                ("attention_mask", [1] * len(row), 0),
            ):
                side = [fill] * gap
                table[name].append(side + kept if layout == "left" else kept + side)
        found = chat.mask_view(tokenizer, table).problems
    assert found == [], (several, [str(p) for p in found])


@functools.cache
def fresh_once():
    return fresh()


CASES = given(
    several=st.lists(conversations(), min_size=1, max_size=3),
    layout=st.sampled_from(["left", "right", "packed"]),
)
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=QUIET)
@CASES
def test_no_false_alarm(several, layout):
    no_alarm(several, layout)


@pytest.mark.slow
@settings(max_examples=500, deadline=None, derandomize=True, suppress_health_check=QUIET)
@CASES
def test_no_false_alarm_over_500_conversations(several, layout):
    no_alarm(several, layout)
