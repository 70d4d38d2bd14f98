"""Inputs from the field: templates, masks and messages (helpers.chat)."""

import copy
import random
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from jinja2 import TemplateError
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

from helpers import chat, generation, models
from helpers.chat import batches

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TRAINING = sorted(path.name for path in TEMPLATES.glob("*_training.jinja"))

USER = {"role": "user", "content": "How cold is it in Oslo?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"role": "tool", "name": "weather", "content": "4 degrees, rain, and a long report"}
ANSWER = {"role": "assistant", "content": "Cold: four degrees."}
WORDS = (
    *("the", "birch", "canoe", "slid", "on", "smooth", "planks", "a", "I", "it's", "no", "42"),
    *("assistant", "user", "system", "### User", "Assistant:", "[x]", "{{ y }}", "{% if %}"),
    *("<b>bold</b>", "a < b > c", "<|not_a_token|>", "```\ncode\n```", "\n\n", "\n", "  ", "\t"),
    *(
        "é",
        "ﬁ",
        "汉字",
        "مرحبا",
        "🙂",
        "👩‍🚀",
        "\u2028",
        "e\u0301",
        "-100",
        "...",
        "</p>",
        "\\n",
        '"q"',
    ),
)


def parts(talk):
    return [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in talk]


def shipped(tokenizer, name):
    """The tokenizer with one of TRL's templates, its markers as tokens; True if it wants parts."""
    tokenizer.chat_template = (TEMPLATES / name).read_text(encoding="utf-8")
    talk = [USER, ANSWER, USER, ANSWER]
    for vision in (False, True):
        try:
            said = parts(talk) if vision else talk
            text = tokenizer.apply_chat_template(said, tokenize=False)
        except (TemplateError, TypeError):
            continue
        if ANSWER["content"] in text:
            break
    markers = sorted(set(re.findall(r"<[^<>\s]+>", text)))
    return chat.prepare_tokenizer(tokenizer, special_tokens=markers), vision


@pytest.fixture(scope="session")
def loaded():
    return models.load_tokenizer(models.EMBEDDED)


@pytest.fixture
def tokenizer(loaded):
    """A copy of the embedded tokenizer, as shipped: quicker than to load it once more."""
    return copy.deepcopy(loaded)


@pytest.fixture
def ours(tokenizer):
    """The embedded tokenizer, prepared, with the course's template."""
    tokenizer.chat_template = chat.chatml_template()
    return chat.prepare_tokenizer(tokenizer)


def codes(tokenizer, row, labels=None):
    return [p.code for p in chat.mask_view(tokenizer, row, labels).problems]


def from_first_answer(tokenizer, talk):
    """The row of a talk, and labels on everything behind the first answer's header."""
    row = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    first = row["assistant_masks"].index(1)
    return row["input_ids"], [-100] * first + row["input_ids"][first:]


def blank(tokenizer, **ids):
    config = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id, **ids}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **config))


def trainer(tmp_path, tokenizer, rows, model=None, **choices):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True}
    settings |= {"activation_checkpointing": False, "per_device_train_batch_size": 8}
    return SFTTrainer(
        model or blank(tokenizer),
        args=SFTConfig(str(tmp_path), **settings | choices),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )


# ------------------------------------------------------------- the end of turn and the stop


@pytest.mark.field(
    "open-r1#603, open-r1#604, LlamaFactory#7454, trl#3299, ms-swift#3113",
    "a base tokenizer, whose EOS ends documents, with a chat template of another end",
)
@pytest.mark.parametrize(
    ("name", "eos", "end"),
    [
        (None, "<|endoftext|>", "<|im_end|>"),
        ("qwen2_5_training.jinja", "<|endoftext|>", "<|im_end|>"),
        ("llama3_training.jinja", "<|end_of_text|>", "<|eot_id|>"),
        ("gemma3_training.jinja", "<eos>", "<end_of_turn>"),
        ("cohere_training.jinja", "</s>", "<|END_OF_TURN_TOKEN|>"),
    ],
)
def test_each_end_of_turn_is_held_against_the_stop_tokens(tokenizer, name, eos, end):
    if name:
        shipped(tokenizer, name)
    else:
        tokenizer.chat_template = chat.choose_template(tokenizer)
    tokenizer.add_special_tokens({"eos_token": eos})
    chat.prepare_tokenizer(tokenizer)
    row = chat.encode_chat(tokenizer, [USER, ANSWER, USER, ANSWER])
    (problem,) = chat.mask_view(tokenizer, row).problems
    assert problem.code == "end_of_turn_not_stop"
    assert repr(end) in problem.message and repr(eos) in problem.message
    model = chat.prepare_model(blank(tokenizer), tokenizer)
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)]
    assert model.generation_config.eos_token_id == model.config.eos_token_id == stops
    assert chat.prepare_model(model, tokenizer).generation_config.eos_token_id == stops
    tokenizer.eos_token = end  # the cure that the alarm names
    assert codes(tokenizer, row) == []


@pytest.mark.field("open-r1#603, trl#3299", "a model that talks on behind the end of its turn")
def test_each_model_stops_where_its_template_ends_a_turn(tokenizer, embedded):
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = chat.choose_template(tokenizer)
    model = copy.deepcopy(embedded)
    model.config.eos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
    chat.prepare_model(model, chat.prepare_tokenizer(tokenizer))
    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = {"max_new_tokens": 16, "skip_special_tokens": False}
    answer = generation.generate(model, tokenizer, question, **asked)
    assert answer == "The capital of France is Paris.<|im_end|>"


@pytest.mark.field("own", "a template whose answers end with nothing, or with no token")
def test_each_template_that_ends_with_nothing_a_model_can_stop_at(ours):
    ours.chat_template = (
        "{% for m in messages %}{{ '### ' + m.role + '\n' }}{% generation %}{{ m.content }}"
        "{% endgeneration %}{{ '\n' }}{% endfor %}"
    )
    ids, _ = from_first_answer(ours, [USER, ANSWER])
    said = ours(ANSWER["content"])["input_ids"]
    row = {"input_ids": ids, "labels": [-100] * (len(ids) - len(said) - 1) + [*said, -100]}
    assert codes(ours, row) == ["end_of_turn_not_stop"]
    ours.add_special_tokens({"eos_token": "</s>"})
    ours.chat_template = chat.chatml_template().replace("im_end", "turn_ends")  # no such token
    (problem,) = chat.mask_view(ours, chat.encode_chat(ours, [USER, ANSWER])).problems
    assert problem.code == "end_of_turn_not_stop" and "choose_template" in problem.message


@pytest.mark.field("trl#3299", "a model's own list of stop tokens, seen through its trainer")
def test_each_trainer_is_asked_where_its_model_stops(tmp_path, ours):
    ours.eos_token = "<|endoftext|>"
    rows = [{"messages": [USER, ANSWER]}]
    model = blank(ours)
    view = chat.trainer_mask_view(trainer(tmp_path, ours, rows, model, assistant_only_loss=True))
    assert [p.code for p in view.problems] == ["end_of_turn_not_stop"]
    chat.prepare_model(model, ours)
    cured = trainer(tmp_path, ours, rows, model, assistant_only_loss=True)
    assert chat.trainer_mask_view(cured).problems == []


@pytest.mark.field("own", "Phi-3 and gpt-oss, whose last turn ends with EOS and others do not")
@pytest.mark.parametrize(
    ("name", "eos"),
    [("phi3_training.jinja", "<|endoftext|>"), ("gptoss_training.jinja", "<|return|>")],
)
def test_kept_templates_whose_last_end_is_eos(tokenizer, name, eos):
    tokenizer.add_special_tokens({"eos_token": eos})
    shipped(tokenizer, name)
    row = chat.encode_chat(tokenizer, [USER, ANSWER, USER, ANSWER])
    assert codes(tokenizer, row) == []
    model = chat.prepare_model(blank(tokenizer), tokenizer)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@pytest.mark.field("LlamaFactory#6749, LlamaFactory#6446, peft#2669", "rows of new tokens")
def test_each_new_row_is_noted_for_the_check_of_the_adapter(ours):
    model = chat.prepare_model(blank(ours), ours)
    assert not hasattr(model.get_input_embeddings(), "new_tokens")
    count = len(ours)
    for more in (["<|a|>"], ["<|b|>", "<|c|>"]):
        chat.prepare_tokenizer(ours, special_tokens=more)
        chat.prepare_model(chat.prepare_model(model, ours), ours)
        assert model.get_input_embeddings().new_tokens == range(count, len(ours))
    assert len(ours) == count + 3


# ------------------------------------------------------------- what a message holds

CALLED = [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, TOOL, ANSWER]
STRING = {"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
QUOTED = {"role": "assistant", "content": "", "tool_calls": [STRING]}
THOUGHT = [USER, {**ANSWER, "reasoning_content": "Oslo lies far north."}]
LOST_CALL = r"messages\[1\]\['tool_calls'\]\[0\]\['function'\]\['name'\] says 'weather'"
LOST_THOUGHT = r"messages\[1\]\['reasoning_content'\] says 'Oslo lies far north\.'"


@pytest.mark.field(
    "transformers#45348, slime#330, ms-swift#4939, gem#44, trl#6363",
    "a tool call or a thought that the template does not write",
)
@pytest.mark.parametrize(
    ("talk", "name", "words"),
    [
        *[(CALLED, name, LOST_CALL) for name in (None, "lfm2", "phi3", "llama3", "smolvlm")],
        (CALLED, "deepseek_r1_distill", LOST_CALL),
        *[(THOUGHT, name, LOST_THOUGHT) for name in (None, "qwen2_5", "lfm2", "phi3", "llama3")],
        *[(THOUGHT, name, LOST_THOUGHT) for name in ("gemma", "deepseek_r1_distill")],
        ([USER, {**ANSWER, "function_call": {"name": "weather"}}], None, "'function_call'"),
        ([USER, QUOTED, TOOL, ANSWER], "qwen2_5", r"messages\[1\].* quotes once more"),
        ([USER, {**ANSWER, "refusal": "Never."}], "qwen2_5", r"messages\[1\]\['refusal'\]"),
        ([USER, {**ANSWER, "content": "<think>I see</think>Cold."}], "deepseekv3", "'I see'"),
    ],
)
def test_refused_what_a_message_says_and_its_row_does_not(tokenizer, talk, name, words):
    if name:
        _, vision = shipped(tokenizer, f"{name}_training.jinja")
        talk = [{**m, **parts([m])[0]} for m in talk] if vision else talk
    else:
        tokenizer.chat_template = chat.chatml_template()
    with pytest.raises(ValueError, match=words):
        chat.encode_chat(tokenizer, talk)


@pytest.mark.field("transformers#45348", "thoughts of an earlier turn, thoughts inside a content")
def test_refused_a_thought_that_is_cut_out_or_doubled(tokenizer):
    thinking = {"role": "assistant", "content": "<think>Far north.</think>Cold."}
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template += "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(ValueError, match=r"messages\[1\]\['content'\] says 'Far north\.'"):
        chat.encode_chat(tokenizer, [USER, thinking, USER, ANSWER])
    shipped(tokenizer, "qwen3_8_training.jinja")
    with pytest.raises(ValueError, match=r"messages\[1\]\['content'\] brings its own <think>"):
        chat.encode_chat(tokenizer, [USER, thinking])


@pytest.mark.field("own", "calls and thoughts that the template does write, in odd letters")
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "glm4moe", "lfm2_v2", "nemotron_3_nano"])
def test_kept_calls_and_thoughts_that_are_written(tokenizer, name):
    shipped(tokenizer, f"{name}_training.jinja")
    call = {"name": "weather", "arguments": {"city": 'Sãn "José"\n', "day": None}}
    asked = {"role": "assistant", "content": "", "tool_calls": [{"id": "7", "function": call}]}
    answer = ANSWER if name in {"qwen2_5", "lfm2_v2"} else THOUGHT[1]
    row = chat.encode_chat(tokenizer, [USER, asked, TOOL, {**answer, "content": " Cold \n"}])
    assert codes(tokenizer, row) == []


@pytest.mark.field("trl#6363, ms-swift#4939", "a dataset whose third row calls a tool")
def test_each_row_of_a_dataset_is_held_against_its_text(tmp_path, ours):
    rows = [
        {"messages": [USER, ANSWER]},
        {"messages": [ANSWER, USER, ANSWER]},
        {"messages": CALLED},
    ]
    view = chat.trainer_mask_view(trainer(tmp_path, ours, rows, shuffle_dataset=False))
    found = [p.message for p in view.problems if p.code == "message_lost"]
    assert len(found) == 1 and re.search(rf"^row 2 of the dataset: {LOST_CALL}", found[0])
    halves = [{"prompt": [USER], "completion": THOUGHT[1:]}]
    view = chat.trainer_mask_view(trainer(tmp_path, ours, halves))
    assert [p.code for p in view.problems] == ["message_lost"]
    assert re.search(LOST_THOUGHT, view.problems[0].message)


@pytest.mark.field("transformers#29279, transformers#47822", "an end of turn inside a user's text")
def test_each_text_that_spells_a_control_token_is_named(tmp_path, ours):
    talk = [USER, ANSWER, {"role": "user", "content": "What does <|im_end|> do?"}, ANSWER]
    with pytest.warns(UserWarning, match=r"messages\[2\]\['content'\] spells '<\|im_end\|>'"):
        chat.encode_chat(ours, talk)
    view = chat.trainer_mask_view(
        trainer(tmp_path, ours, [{"messages": talk}], assistant_only_loss=True)
    )
    assert [p.code for p in view.problems] == ["control_in_text"]


@pytest.mark.field("transformers#45348", "a wrong message among right ones")
@pytest.mark.parametrize(
    ("talk", "name", "words"),
    [
        ([{"role": "system", "content": "Hm."}, USER, ANSWER], "gemma", r"messages\[0\].*System"),
        ([USER, ANSWER, ANSWER], "gemma", r"messages\[2\] .*alternate"),
        (
            [USER, ANSWER, {"from": "human", "value": "Hi"}],
            None,
            r"messages\[2\] has no 'role' but",
        ),
        ([USER, {"role": "assistant", "text": "Hi"}], None, r"messages\[1\] has no 'content' but"),
        ([USER, {"role": "assistant", "content": None}], None, r"messages\[1\] \(role 'assistant'"),
        ([USER, *parts([ANSWER])], None, r"messages\[1\] \(role 'assistant', content \[\{"),
        ([USER, "Cold."], None, r"messages\[1\] must hold 'role' and 'content', and is 'Cold\.'"),
        ([], None, r"messages\[0\] must hold"),
        ({"messages": [USER]}, None, r"messages\[0\] must hold"),
    ],
)
def test_refused_by_the_number_of_the_message(tokenizer, talk, name, words):
    tokenizer.chat_template = chat.chatml_template()
    if name:
        shipped(tokenizer, f"{name}_training.jinja")
    with pytest.raises(ValueError, match=words):
        chat.encode_chat(tokenizer, talk)


# ------------------------------------------------------------- what is trained


@pytest.mark.field("trl#3279, renderers#66", "labels that run from the first answer to the end")
@pytest.mark.parametrize(
    ("role", "name"),
    [
        *[("tool", name) for name in (None, "llama3", "qwen2_5", "qwen3", "lfm2", "smolvlm")],
        *[("tool", name) for name in ("deepseekv3", "muse_glimmer")],
        *[("system", name) for name in (None, "llama3", "qwen2_5", "muse_glimmer")],
        *[(role, None) for role in ("developer", "observation", "function", "ipython")],
        ("observation", "llama3"),
    ],
)
def test_each_turn_between_two_answers_is_looked_at(tokenizer, role, name):
    tokenizer.chat_template = chat.chatml_template()
    _, vision = shipped(tokenizer, f"{name}_training.jinja") if name else (None, False)
    asked = {"role": "assistant", "content": "I look it up."}
    talk = [USER, asked, {**TOOL, "role": role}, ANSWER]
    ids, labels = from_first_answer(tokenizer, parts(talk) if vision else talk)
    (problem,) = chat.mask_view(tokenizer, ids, labels).problems
    assert problem.code == "prompt_trained"
    assert "a tool's result" in problem.message if role == "tool" else "turn" in problem.message


@pytest.mark.field("renderers#66", "right masks of talks in which a tool is called")
@pytest.mark.parametrize("name", ["gptoss", "glm4moe", "deepseekv3", "diffusion_gemma", "lfm2_v2"])
def test_each_right_mask_around_a_tool_is_quiet(tokenizer, name):
    shipped(tokenizer, f"{name}_training.jinja")
    row = chat.encode_chat(tokenizer, CALLED)
    assert codes(tokenizer, row) == []
    assert "prompt_trained" in codes(tokenizer, *from_first_answer(tokenizer, CALLED))


@pytest.mark.field("FineTuningLLMs#5, trl#3140", "prompt and completion as strings, chat tokenizer")
def test_each_half_trained_text_without_roles_is_named(tmp_path, ours):
    strings = [{"prompt": "The lamp is behind the door.", "completion": " Behind the door, it is."}]
    view = chat.trainer_mask_view(trainer(tmp_path, ours, strings))
    assert [p.code for p in view.problems] == ["no_template"]
    whole = chat.trainer_mask_view(trainer(tmp_path, ours, [{"text": "Just a text."}]))
    assert whole.problems == []


@pytest.mark.field("own", "a sample that packing cut inside the answer's header")
def test_kept_a_sample_cut_inside_a_header(ours):
    row = chat.encode_chat(ours, [USER, ANSWER])
    begin = next(i for i, label in enumerate(row["labels"]) if label != -100)
    for left in (1, 2, 3):
        cut = {key: row[key][begin - left :] for key in ("input_ids", "labels")}
        assert "no_template" not in codes(ours, cut["input_ids"], cut["labels"])


@pytest.mark.field("trl#6668, trl#1053, trl#3927", "rows whose answers begin behind max_length")
def test_each_row_that_trl_drops_is_counted(tmp_path, ours):
    long = {**USER, "content": USER["content"] * 5}
    rows = [{"messages": [USER, ANSWER]}, {"messages": [long, ANSWER]}] * 4
    cut = {"assistant_only_loss": True, "max_length": 30}
    kept = trainer(tmp_path, ours, rows, **cut)
    assert len(kept.train_dataset) == 4
    (problem,) = chat.trainer_mask_view(kept).problems
    assert problem.code == "rows_dropped"
    assert problem.message.startswith("4 of 8 rows are gone") and "=30" in problem.message
    for none in (rows[1::2], [{"prompt": [long], "completion": [ANSWER]}]):
        gone = trainer(tmp_path, ours, none, max_length=30, assistant_only_loss=True)
        with pytest.raises(ValueError, match=rf"{len(none)} of {len(none)} rows? are gone: TRL"):
            chat.trainer_mask_view(gone)
    roomy = trainer(tmp_path, ours, rows, assistant_only_loss=True, max_length=300)
    assert chat.trainer_mask_view(roomy).problems == []


# ------------------------------------------------------------- smaller


PHI_4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


@pytest.mark.field("own", "models whose ChatML is not plain: Phi-4, Qwen3.5, one with a BOS")
@pytest.mark.parametrize(
    "own",
    [PHI_4, "qwen3_5_think", "qwen3_5_nothink", "nemotron_3_nano", "lfm2"],
)
def test_refused_to_replace_a_prompt_of_the_models_own(tokenizer, own):
    if own != PHI_4:
        own = (TEMPLATES / f"{own}.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = own
    assert chat.choose_template(tokenizer) == own
    tokenizer.chat_template = {"default": own, "rag": "{{ 1 }}"}
    assert chat.choose_template(tokenizer) == own


@pytest.mark.field("own", "ChatML with a system message by default, as Qwen 2.5 and SmolLM2 have")
def test_kept_our_template_where_the_prompt_is_the_same(tokenizer):
    assert chat.choose_template(tokenizer) == chat.chatml_template()
    tokenizer.chat_template = (TEMPLATES / "qwen2_5.jinja").read_text(encoding="utf-8")
    assert chat.choose_template(tokenizer) == chat.chatml_template()


@pytest.mark.field("own", "eight rows of 3,520 tokens; a row of 118,000; a hundred rows")
def test_refused_to_write_megabytes_into_a_notebook(ours):
    row = chat.encode_chat(ours, [USER, {**ANSWER, "content": "A long answer. " * 300}])
    count = len(row["input_ids"])
    view = chat.mask_view(ours, [row["input_ids"]] * 12, [row["labels"]] * 12)
    for shown in (str(view), view._repr_html_()):
        assert len(shown) < 500_000 and f"{count - 300:,} tokens not shown" in shown
        assert "4 more rows" in shown and "characters not shown" in shown
        assert shown.count("How") == 8 and "no problems found" in shown
    assert len(view.tokens) == 12 * count and len(view.learned[0][0]) > 4_000
    many = chat.encode_chat(ours, [USER, ANSWER] * 90)
    text = str(chat.mask_view(ours, many))
    assert "and 78 more texts" in text and text.startswith("row 0")


@pytest.mark.field("own", "labels of another length, a length of nothing, no batches")
def test_refused_rows_that_do_not_fit(tmp_path, ours):
    rows = [{"input_ids": [1, 5, 2], "labels": [1, 5, 2]}, {"input_ids": [1, 2], "labels": [1]}]
    with pytest.raises(ValueError, match=r"rows\[1\] has 2 ids but 1 labels"):
        batches.lay_out(rows, ours, "padding (TRL)")
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        batches.lay_out(rows[:1], ours, "packing: bfd", max_length=0)
    with pytest.raises(ValueError, match="batches must be at least 1"):
        chat.trainer_mask_view(trainer(tmp_path, ours, [{"messages": [USER, ANSWER]}]), batches=0)


# ------------------------------------------------------------- no false alarm


def text_of(draw):
    said = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9)))
    return f"{draw.choice('ABCxyz')}{said}".strip()


def conversations(count, seed=16):
    """Right conversations: system messages and tools in some, odd texts in all."""
    draw = random.Random(seed)
    for number in range(count):
        talk = [{"role": "system", "content": text_of(draw)}] if number % 5 == 0 else []
        for turn in range(draw.randint(1, 4)):
            talk.append({"role": "user", "content": text_of(draw)})
            if number % 7 == 0 and turn == 0:
                call = {"name": "weather", "arguments": {"city": text_of(draw)}}
                calls = [{"type": "function", "function": call}]
                talk.append({"role": "assistant", "content": "", "tool_calls": calls})
                talk.append({"role": "tool", "name": "weather", "content": text_of(draw)})
            talk.append({"role": "assistant", "content": text_of(draw)})
        yield talk


def no_alarm(tokenizer, name, count):
    """Encode them all and look at them all; only talks with other roles may be refused."""
    _, vision = shipped(tokenizer, name)
    rows = []
    for talk in conversations(count):
        try:
            rows.append(chat.encode_chat(tokenizer, parts(talk) if vision else talk))
        except ValueError as error:
            assert {m["role"] for m in talk} > {"user", "assistant"}, error
    assert len(rows) > 0.6 * count
    found = chat.mask_view(tokenizer, *([r[k] for r in rows] for k in ("input_ids", "labels")))
    assert found.problems == []


@pytest.mark.field("own", "25 random right conversations, four templates")
@pytest.mark.parametrize("name", ["chatml", "llama3", "gptoss", "qwen3_5_think"])
def test_kept_quiet_on_right_conversations(tokenizer, tmp_path, monkeypatch, name):
    if name == "chatml":
        (tmp_path / "chatml_training.jinja").write_text(chat.chatml_template())
        monkeypatch.setitem(globals(), "TEMPLATES", tmp_path)
    no_alarm(tokenizer, f"{name}_training.jinja", 25)


@pytest.mark.slow
@pytest.mark.field("own", "500 random right conversations, every training template of TRL")
@pytest.mark.parametrize("name", TRAINING, ids=lambda name: name.removesuffix("_training.jinja"))
def test_kept_quiet_on_500_right_conversations(tokenizer, name):
    no_alarm(tokenizer, name, 500)
