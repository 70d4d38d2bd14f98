import copy
import itertools

import chat_families
import numpy as np
import pytest

from helpers import chat, generation

QUESTIONS = [
    "What is the capital of France?",
    "Name a color.",
    "Please tell me, in one short sentence, what a goose is.",
]


@pytest.fixture
def prompts(tokenizer):
    return [generation.chat_prompt(tokenizer, question) for question in QUESTIONS]


def test_a_text_gives_a_text_and_a_list_gives_a_list(embedded, tokenizer, prompts):
    answer = generation.generate(embedded, tokenizer, prompts[0], max_new_tokens=12)
    assert answer == "The capital of France is Paris."
    answers = generation.generate(embedded, tokenizer, prompts[:1], max_new_tokens=np.int64(12))
    assert answers == [answer]


def test_batches_answer_like_single_prompts_in_the_given_order(embedded, tokenizer, prompts):
    chat.prepare_tokenizer(tokenizer)
    single = [
        generation.generate(embedded, tokenizer, prompt, max_new_tokens=5) for prompt in prompts
    ]
    assert single == generation.generate(
        embedded, tokenizer, prompts, max_new_tokens=5, batch_size=2
    )


def test_a_conversation_gets_the_template(embedded, tokenizer, prompts):
    conversation = [{"role": "user", "content": QUESTIONS[0]}]
    answers = generation.generate(
        embedded, tokenizer, [conversation, prompts[0]], max_new_tokens=12
    )
    assert answers[0] == answers[1]
    assert answers[0] == generation.generate(embedded, tokenizer, conversation, max_new_tokens=12)


def test_prompt_and_special_tokens_on_request(embedded, tokenizer, prompts):
    text = generation.generate(
        embedded,
        tokenizer,
        prompts[0],
        max_new_tokens=12,
        response_only=False,
        skip_special_tokens=False,
    )
    assert text.startswith(prompts[0])
    assert text.endswith("Paris.<|im_end|>")


def test_padding_never_shows(embedded, tokenizer, prompts):
    chat.prepare_tokenizer(tokenizer)
    texts = generation.generate(
        embedded,
        tokenizer,
        prompts,
        max_new_tokens=8,
        response_only=False,
        skip_special_tokens=False,
    )
    assert all(tokenizer.pad_token not in text for text in texts)


def test_model_and_tokenizer_are_left_as_they_were(embedded, tokenizer, prompts):
    tokenizer.padding_side = "right"
    embedded.train()
    generation.generate(embedded, tokenizer, prompts, max_new_tokens=2)
    assert embedded.training and tokenizer.padding_side == "right"
    embedded.eval()
    generation.generate(embedded, tokenizer, prompts[0], max_new_tokens=2)
    assert not embedded.training


def test_the_head_sees_one_whole_row_per_prompt(embedded, tokenizer, prompts):
    # A slice of the hidden states costs a copy of the vocabulary per row in bfloat16.
    chat.prepare_tokenizer(tokenizer)
    seen = []
    head = embedded.get_output_embeddings()
    watch = head.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    try:
        generation.generate(embedded, tokenizer, prompts, max_new_tokens=2)
        assert [tuple(hidden.shape[:2]) for hidden in seen] == [(3, 1)] * 2
        assert all(hidden.is_contiguous() for hidden in seen)
    finally:
        watch.remove()
    assert not head._forward_pre_hooks, "nothing is left on the model"


@pytest.mark.parametrize("family", ["llama-3", "gemma", "mistral"])
def test_every_text_gets_one_bos_alone_and_in_any_company(family):
    made = chat.prepare_tokenizer(chat_families.tokenizer(family))
    talk = [{"role": "user", "content": "Hi"}]
    texts = [generation.chat_prompt(made, talk), "A plain text, longer than the talk is."]
    texts.append("Hi")
    alone = [generation._ids(made, text) for text in texts]
    assert [ids.count(made.bos_token_id) for ids in alone] == [1, 1, 1]
    assert all(ids[0] == made.bos_token_id for ids in alone)
    for order in itertools.permutations(range(3)):
        batch = generation._padded([alone[index] for index in order], made.pad_token_id)
        for row, mask, index in zip(
            batch["input_ids"], batch["attention_mask"].bool(), order, strict=True
        ):
            assert row[mask].tolist() == alone[index]
            assert (row[~mask] == made.pad_token_id).all() and mask[-1], "padded left"


def test_a_mixed_list_is_answered_as_each_alone(embedded):
    made = chat.prepare_tokenizer(chat_families.tokenizer("llama-3"))
    model = chat.prepare_model(copy.deepcopy(embedded), made)
    prompts = ["Once upon a time", [{"role": "user", "content": QUESTIONS[0]}], "Hi"]
    alone = [generation.generate(model, made, p, max_new_tokens=3) for p in prompts]
    assert generation.generate(model, made, prompts, max_new_tokens=3) == alone
    shown = generation.generate(
        model, made, prompts, max_new_tokens=2, response_only=False,
        skip_special_tokens=False,
    )  # fmt: skip
    assert [text.count(made.bos_token) for text in shown] == [1, 1, 1]


def test_an_empty_list_gives_an_empty_list(embedded, tokenizer):
    assert generation.generate(embedded, tokenizer, []) == []


@pytest.mark.parametrize(
    ("prompts", "settings", "error", "words"),
    [
        (3, {}, TypeError, "prompts"),
        ([3], {}, TypeError, "prompts, number 0: .* not 3"),
        ("", {}, ValueError, "empty text"),
        ("Hi", {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ("Hi", {"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ("Hi", {"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_bad_input_is_named(embedded, tokenizer, prompts, settings, error, words):
    with pytest.raises(error, match=words):
        generation.generate(embedded, tokenizer, prompts, **settings)


def test_no_template_is_said_with_the_way_out(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chatml_template"):
        generation.chat_prompt(tokenizer, "Hi")
