"""Chat formats of well-known families, for the tests of Ollama's and llama.cpp's side.

The formats are public facts; the Jinja here is our own, as short as the format allows, and
the tokenizers are the embedded one with each family's special tokens added.
"""

import random

from helpers import chat, models

LOOP = "{% for m in messages %}"
END = "{% endfor %}"
FAMILIES = {
    "chatml": {"eos": "<|im_end|>", "template": chat.chatml_template()},
    "qwen": {
        "eos": "<|im_end|>",
        "template": (
            "{% if messages[0].role != 'system' %}<|im_start|>system\n"
            "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            "<|im_end|>\n{% endif %}"
            f"{LOOP}<|im_start|>{{{{ m.role }}}}\n{{{{ m.content }}}}<|im_end|>\n{END}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
    },
    "phi-3": {
        "eos": "<|endoftext|>",
        "special": ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "template": (
            f"{LOOP}<|{{{{ m.role }}}}|>\n{{{{ m.content }}}}<|end|>\n{END}"
            "{% if add_generation_prompt %}<|assistant|>\n"
            "{% else %}{{ eos_token }}{% endif %}"
        ),
    },
    "llama-3": {
        "bos": "<|begin_of_text|>",
        "eos": "<|eot_id|>",
        "special": ("<|start_header_id|>", "<|end_header_id|>"),
        "template": (
            "{{ bos_token }}"
            f"{LOOP}<|start_header_id|>{{{{ m.role }}}}<|end_header_id|>\n\n"
            f"{{{{ m.content | trim }}}}<|eot_id|>{END}"
            "{% if add_generation_prompt %}"
            "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
        ),
    },
    "gemma": {
        "bos": "<bos>",
        "eos": "<eos>",
        "special": ("<start_of_turn>", "<end_of_turn>"),
        "template": (
            "{{ bos_token }}{% set extra = '' %}"
            "{% if messages[0].role == 'system' %}"
            "{% set extra = messages[0].content + '\n\n' %}"
            "{% set messages = messages[1:] %}"
            "{% endif %}"
            f"{LOOP}<start_of_turn>{{{{ 'model' if m.role == 'assistant' else m.role }}}}\n"
            "{% if loop.first %}{{ extra }}{% endif %}"
            f"{{{{ m.content | trim }}}}<end_of_turn>\n{END}"
            "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
        ),
    },
    "mistral": {
        "bos": "<s>",
        "eos": "</s>",
        "special": ("[INST]", "[/INST]"),
        "template": (
            "{{ bos_token }}{% set extra = '' %}"
            "{% if messages[0].role == 'system' %}"
            "{% set extra = messages[0].content + '\n\n' %}"
            "{% set messages = messages[1:] %}"
            "{% endif %}"
            f"{LOOP}{{% if m.role == 'user' %}}[INST] "
            "{% if loop.first %}{{ extra }}{% endif %}{{ m.content }}[/INST]"
            f"{{% else %}} {{{{ m.content }}}}{{{{ eos_token }}}}{{% endif %}}{END}"
        ),
    },
}
PIECES = (
    *("Hello", "the birch canoe", "slid", 'say "no"', "it's", "{{ .Content }}", "{% x %}"),
    *(
        "{braces}",
        "line\nbreak",
        "two\n\nlines",
        "tab\there",
        "back\\slash",
        "é ü ß",
        "汉字",
    ),
    *(
        "🙂👍🏽",
        "a  b",
        "`code`",
        "<b>",
        "&amp;",
        "100 %",
        "$.System",
        "<|not_a_token|>",
        "...",
    ),
)


def tokenizer(family):
    """A fresh tokenizer that speaks like `family`."""
    about = FAMILIES[family]
    made = models.load_tokenizer(models.EMBEDDED)
    made.chat_template = about["template"]
    if bos := about.get("bos"):
        made.add_special_tokens({"bos_token": bos})
    made.add_special_tokens({"eos_token": about["eos"]})
    made.add_tokens(list(about.get("special", ())), special_tokens=True)
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, made.bos_token_id)]
        )
    return made


def conversations(count, seed=0):
    """Talks of one to seven turns, half of them with a system message, odd contents.

    Outer white space is left out: two families trim it, which Go's templates cannot.
    """
    draw = random.Random(seed)
    talks = []
    for number in range(count):
        turns = draw.choice((1, 1, 3, 5, 7))
        talk = [{"role": "system", "content": _text(draw, 1)}] if number % 2 else []
        for turn in range(turns):
            role = "assistant" if turn % 2 else "user"
            talk.append({"role": role, "content": _text(draw, 0)})
        talks.append(talk)
    return talks


def _text(draw, least):
    return " ".join(draw.choice(PIECES) for _ in range(draw.randint(least, 6))).strip()
