"""Messages as people paste them, and the errors behind them raised for real."""

import contextlib
import functools
import http.server
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings
from pathlib import Path

import house
import pytest
import test_check
import test_doctor
import torch

from helpers import chat
from helpers.course import doctor
from helpers.serving import gguf

HELPERS = Path(doctor.__file__).parents[1]
LOGGERS = ("transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return test_doctor.World(tmp_path_factory.mktemp("field"))


@pytest.fixture
def ids():
    return torch.tensor([[1, 2]])


# ── as people paste them ─────────────────────────────────────────────────────────────────
def each_line(before, text, behind=""):
    return "\n".join(f"{before}{line}{behind}" for line in text.splitlines())


def framed(text):
    """As rich draws it, which breaks long lines."""
    rows = [row for line in text.splitlines() for row in textwrap.wrap(line, 70) or [""]]
    top, bottom = f"╭{'─' * 72}╮", f"╰{'─' * 72}╯"
    return "\n".join([top, *(f"│ {row:70} │" for row in rows), bottom])


def cut(text, width=37):
    """As a terminal cuts lines, in the middle of a word."""
    return "\n".join(text[start : start + width] for start in range(0, len(text), width))


PASTED = {
    "alone": str,
    "in capitals": str.upper,
    "small": str.lower,
    "a process of torchrun": lambda text: each_line("[rank0]: ", text),
    "a quotation": lambda text: each_line("> ", text),
    "a quotation of a quotation": lambda text: each_line("> > [rank1]: ", text),
    "a block of code": lambda text: f"I get this, please help:\n```\n{text}\n```\n",
    "an indented block": lambda text: each_line("    ", text),
    "bold": lambda text: f"**{text}**",
    "Markdown's escapes": lambda text: re.sub(r"([_*])", r"\\\1", text),
    "a log": lambda text: f"2026-11-28 10:04:07,123 - ERROR - train - {text}",
    "a logger": lambda text: f"INFO:root:loading\nERROR:root:{text}\nINFO:root:end",
    "pytest": lambda text: each_line("E       ", text),
    "in color": lambda text: f"\x1b[0;31m{text}\x1b[0m",
    "narrow": lambda text: textwrap.fill(text, 40),
    "cut": cut,
    "framed": framed,
    "Windows": lambda text: text.replace("\n", "\r\n"),
    "no backticks": lambda text: re.sub("[`'\"]", "", text),
    "drawn quotes": lambda text: re.sub("['`](.*?)['`]", r"‘\1’", text),
}
TRACEBACK = """
---------------------------------------------------------------------------
ValueError                                Traceback (most recent call last)
Cell In[7], line 3
      1 # CUDA out of memory. header too large
      2 model = load()
----> 3 trainer.train()

File /venv/lib/python3.11/site-packages/x.py:12, in train(self)
     11 except RuntimeError:  # gated repo
---> 12     raise ValueError("size mismatch for")

ValueError: the first one

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/venv/x.py", line 5, in train
    raise RuntimeError("No space left on device")
    ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
{message}
"""


def check_pasted(name, message, raised=""):
    for how, paste in PASTED.items():
        assert doctor.explain(paste(message)).name == name, f"{how}:\n{paste(message)}"
    if raised:
        text = TRACEBACK.format(message=raised)
        assert doctor.explain(text).name == name
        assert doctor.explain(each_line("│ ", text, "  │")).name == name
        failed = "subprocess.CalledProcessError: Command 'train' returned non-zero exit status 1."
        assert doctor.explain(f"{text}\n{failed}").name == name


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.found = []

    def emit(self, record):
        self.found.append(record.getMessage())


@contextlib.contextmanager
def heard():
    """What is warned of or logged inside."""
    listener = Lines()
    for logger in LOGGERS:
        logging.getLogger(logger).addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            yield listener.found
        for one in found:
            text = warnings.formatwarning(one.message, one.category, "train.py", 3, "f(x)")
            listener.found.append(text)
    finally:
        for logger in LOGGERS:
            logging.getLogger(logger).removeHandler(listener)


@contextlib.contextmanager
def raises(name, bare=None):
    """The real error raised inside is recognized as `name`; its message alone as `bare`."""
    with pytest.raises((Exception, KeyboardInterrupt)) as caught:
        yield
    error = caught.value
    assert doctor.explain(error).name == name, error
    text = "".join(traceback.format_exception(error))
    assert doctor.explain(text).name == name
    assert doctor.explain(framed(text)).name == name
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    course = doctor.SYMPTOMS[name].origin == "course"
    assert raised_in.is_relative_to(HELPERS) == course, raised_in
    if bare is None:
        last = "".join(traceback.format_exception_only(error)).strip()
        check_pasted(name, str(error).strip(), last)


@contextlib.contextmanager
def warns(name):
    """A warning or a line of a log inside is recognized as `name`, beside all others."""
    with heard() as found:
        yield
    mine = [text for text in found if doctor.explain(text).name == name]
    assert mine, found
    check_pasted(name, mine[0].strip())
    assert doctor.explain("\n".join(["step 1 of 9", mine[0], "step 2 of 9"])).name == name
    unknown = f'Traceback (most recent call last):\n  File "x.py", line 1\n{mine[0]}\n'
    assert doctor.explain(f"{unknown}\nZeroDivisionError: division by zero").name == "unknown"


# ── calls ────────────────────────────────────────────────────────────────────────────────
@pytest.mark.field("own", "load_in_4bit given to from_pretrained")
def test_pasted_load_in_4bit(world):
    from transformers import AutoModelForCausalLM

    with raises("load_in_4bit"):
        AutoModelForCausalLM.from_pretrained(world.path("tiny"), load_in_4bit=True)


@pytest.mark.field("own", "another keyword given to from_pretrained")
def test_pasted_other_keyword(world):
    from transformers import AutoModelForCausalLM

    with raises("other_keyword"):
        AutoModelForCausalLM.from_pretrained(world.path("tiny"), use_8bit=True)


@pytest.mark.field("huggingface/course#980", "AdamW imported from transformers")
def test_pasted_adamw():
    with raises("adamw"):
        from transformers import AdamW  # noqa: F401


@pytest.mark.field("own", "a name that a library has no more")
def test_pasted_import_gone():
    with raises("import_gone"):
        from transformers import is_no_such_thing_available  # noqa: F401


@pytest.mark.field("own", "a file of one's own named datasets.py")
def test_pasted_own_file(tmp_path):
    (tmp_path / "datasets.py").write_text("from datasets import load_dataset\n")
    check_pasted("own_file", in_python("import datasets", tmp_path).splitlines()[-1])


def in_python(code, folder):
    """What a fresh interpreter says to a few lines of code."""
    (folder / "train.py").write_text(code)
    command = [sys.executable, "train.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.stderr.strip()


@pytest.mark.field("own", "an adapter's config from a newer PEFT")
def test_pasted_adapter_newer(world):
    from peft import LoraConfig, PeftConfig

    folder = world.path("newer")
    world.adapted().save_pretrained(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"from_the_future": 1}))
    with warns("adapter_newer"):
        PeftConfig.from_pretrained(folder)
    with pytest.raises(TypeError) as caught:
        LoraConfig(qalora_size=1)
    text = str(caught.value).replace("qalora_size", "corda_config")
    check_pasted("adapter_newer", text, f"TypeError: {text}")


# ── loading ──────────────────────────────────────────────────────────────────────────────
def saved(world, name):
    folder = world.path(name)
    shutil.copytree(world.path("tiny"), folder)
    return folder


def load(folder, **settings):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **settings)


@pytest.mark.field(
    "unsloth#1629, bitsandbytes#881, llama-cookbook#56", "a quantized model partly on the CPU"
)
def test_pasted_modules_offloaded(world):
    from transformers import BitsAndBytesConfig

    places = {"model.embed_tokens": 0, "model.layers": "cpu", "model.norm": 0, "lm_head": 0}
    with raises("modules_offloaded"):
        settings = BitsAndBytesConfig(load_in_4bit=True)
        load(world.path("tiny"), quantization_config=settings, device_map=places)


@pytest.mark.field("own", "training a quantized model that lies partly on the disk")
def test_pasted_quantized_elsewhere():
    from accelerate import Accelerator

    model = torch.nn.Linear(2, 2)
    model.is_loaded_in_4bit, model.hf_device_map = True, {"a": "cpu", "b": "disk"}
    with raises("quantized_elsewhere"):
        Accelerator(cpu=True).prepare_model(model)


@pytest.mark.field("own", "moving a model that is partly on the disk")
def test_pasted_cannot_move(world, tmp_path):
    from accelerate import dispatch_model

    model = world.model()
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path)
    with raises("cannot_move"):
        model.to("cpu")


PACKAGES = [("bitsandbytes_missing", "bitsandbytes"), ("accelerate_missing", "accelerate")]


@pytest.mark.field(
    "bitsandbytes#1530, bitsandbytes#1731, HandsOnLLM#10, HandsOnLLM#51",
    "bitsandbytes missing or too old",
)
@pytest.mark.parametrize(("name", "package"), PACKAGES)
def test_pasted_packages_missing(world, name, package, monkeypatch):
    from transformers.quantizers import quantizer_bnb_4bit

    monkeypatch.setattr(quantizer_bnb_4bit, f"is_{package}_available", lambda *_: False)
    with raises(name):
        world.quantized()


@pytest.mark.field("own", "a model newer than transformers")
def test_pasted_architecture_unknown(tmp_path):
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text('{"model_type": "tomorrow"}')
    with raises("architecture_unknown"):
        AutoConfig.from_pretrained(tmp_path)


@pytest.mark.field("transformers#27923, DeepSeek-V3#557", "weights that are a Git LFS pointer")
def test_pasted_lfs_pointer(world):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    folder = saved(world, "pointer")
    (folder / "model.safetensors").write_text(pointer)
    with raises("lfs_pointer"):
        load(folder)
    path = world.path("pointer.bin")
    path.write_text(pointer)
    for only in (True, False):
        with raises("lfs_pointer"):
            torch.load(path, weights_only=only)


@pytest.mark.field("own", "weights cut short; an empty file")
def test_pasted_weights_cut(world):
    folder = saved(world, "cut")
    path = folder / "model.safetensors"
    for kept in (path.read_bytes()[:-1000], b""):
        path.write_bytes(kept)
        with raises("weights_cut"):
            load(folder)


@pytest.mark.field("own", "a checkpoint with Python objects in it")
def test_pasted_weights_only(tmp_path):
    torch.save({"folder": tmp_path, "code": functools.partial(print)}, tmp_path / "state.pth")
    with raises("weights_only"):
        torch.load(tmp_path / "state.pth")


@pytest.mark.field("own", "a .bin file and a torch before 2.6")
def test_pasted_torch_load_refused(monkeypatch):
    from transformers.utils import import_utils

    monkeypatch.setattr(import_utils, "is_torch_greater_or_equal", lambda version: False)
    with raises("torch_load_refused"):
        import_utils.check_torch_load_is_safe()


@pytest.mark.field("own", "a head that the checkpoint does not have")
def test_pasted_newly_initialized(world):
    from transformers import AutoModelForSequenceClassification

    with warns("newly_initialized"):
        AutoModelForSequenceClassification.from_pretrained(world.path("tiny"))


@pytest.mark.field("own", "a config of another vocabulary than the weights")
def test_pasted_shapes_differ(world):
    path = saved(world, "other-vocabulary") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 100}))
    with raises("shapes_differ"):
        load(path.parent)


@pytest.mark.field("own", "a folder without a tokenizer")
def test_pasted_tokenizer_files(tmp_path):
    from transformers import AutoTokenizer

    with raises("tokenizer_files"):
        AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.field("own", "a tokenizer.json that this tokenizers cannot read")
def test_pasted_tokenizers_old(tokenizer):
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = 3
    with raises("tokenizers_old"):
        Tokenizer.from_str(json.dumps(state))


@pytest.mark.field("own", "a folder with a config and no weights")
def test_pasted_no_weights(world, tmp_path):
    shutil.copy(world.path("tiny") / "config.json", tmp_path)
    with raises("no_weights"):
        load(tmp_path)


@pytest.mark.field("own", "a repository with code of its own; a checkpoint from a card")
def test_pasted_code_and_cards(tmp_path, monkeypatch):
    from transformers import AutoConfig

    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(own))
    (tmp_path / "own.py").write_text("")
    with raises("custom_code"):
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises("cuda_checkpoint"):
        torch.serialization._deserialize("cuda", torch.UntypedStorage(1), "cuda:0")


@pytest.mark.field("own", "a torch older than the library that asks it")
def test_pasted_torch_old(monkeypatch):
    monkeypatch.delattr(torch, "int1")
    with raises("torch_old"):
        torch.int1  # noqa: B018


# ── the Hub ──────────────────────────────────────────────────────────────────────────────
ANSWERS = {
    "RepoNotFound": "Repository not found",
    "GatedRepo": "Access to model a/b is restricted. You must have access to it.",
    "rights": 'You don\'t have the rights to create a model under the namespace "b"',
    "settings": (
        "Please enable access to public gated repositories in your fine-grained token "
        "settings to view this repository."
    ),
    "invalid": "Invalid credentials in Authorization header",
    "many": "We had to rate limit your IP",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the Hub does: the paths begin with the status and the Hub's own code."""

    def do_GET(self):
        _, status, code, *_ = self.path.removeprefix("/api/models").split("-")
        self.send_response(int(status))
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", ANSWERS[code])
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_POST = do_GET

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture(scope="module")
def hub():
    from huggingface_hub import HfApi

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


HUB = [
    ("no_such_repo", "a-401-RepoNotFound-x/b"),
    ("gated", "a-403-GatedRepo-x/b"),
    ("gated", "a-401-GatedRepo-x/b"),
    ("token_rights", "a-403-rights-x/b"),
    ("gated_token", "a-403-settings-x/b"),
    ("token_invalid", "a-401-invalid-x/b"),
    ("hub_busy", "a-429-many-x/b"),
]


@pytest.mark.field("own", "a typing error in a Hub id; no write rights; gated; no token; 429")
@pytest.mark.parametrize(("name", "repository"), HUB)
def test_pasted_answers_of_the_hub(hub, name, repository):
    with raises(name):
        hub.model_info(repository, token=False)


@pytest.mark.field("own", "a path to a folder that is not there")
def test_pasted_repo_id_form():
    with raises("repo_id_form"):
        load("./outputs/no/such/folder")


@pytest.mark.field("own", "the Hub asked for a token")
def test_pasted_token_is_required(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    with raises("token_invalid"):
        hub.model_info("a/b", token=True)


READ_AT_THE_HUB = [
    (
        "no_such_repo",
        "OSError",
        "my-org/lama is not a local folder and is not a valid model identifier listed on "
        "'https://huggingface.co/models'\nIf this is a private repository, make sure to pass a "
        "token having permission to this repo either by logging in with `hf auth login` or by "
        "passing `token=<your_token>`",
    ),
    (
        "gated",
        "OSError",
        "You are trying to access a gated repo.\nMake sure to have access to it at "
        "https://huggingface.co/a/b.\n401 Client Error. (Request ID: Root=1)\n\nCannot access "
        "gated repo for url https://huggingface.co/a/b/resolve/main/config.json.\nAccess to "
        "model a/b is restricted. You must have access to it and be authenticated to access it.",
    ),
]


@pytest.mark.field("own", "what transformers makes of the Hub's answers")
@pytest.mark.parametrize(("name", "kind", "text"), READ_AT_THE_HUB)
def test_pasted_hub_errors_of_transformers(name, kind, text):
    check_pasted(name, text, f"{kind}: {text}")


# ── adapters ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.field("trl#2486, transformers#26334", "checkpointing over a frozen embedding")
def test_pasted_none_requires_grad():
    from torch.utils.checkpoint import checkpoint

    with warns("none_requires_grad"):
        checkpoint(torch.nn.Linear(1, 1), torch.ones(1), use_reentrant=True)


@pytest.mark.field("peft#2699, peft#2566", "an adapter on another model class")
def test_pasted_missing_keys(world):
    from peft import PeftModel

    world.adapted().save_pretrained(world.path("of-the-lm"))
    with warns("missing_keys"):
        PeftModel.from_pretrained(world.model().model, world.path("of-the-lm"))


@pytest.mark.field("own", "get_peft_model twice on one model; a name that is taken")
def test_pasted_second_adapter(world):
    from peft import LoraConfig, get_peft_model

    adapted = world.adapted()
    with raises("name_taken"):
        adapted.add_adapter("default", LoraConfig(target_modules=["v_proj"]))
    with warns("second_time"):
        get_peft_model(adapted.base_model.model, LoraConfig(target_modules=["q_proj"]))


@pytest.mark.field("peft#2018, peft#2777", "LoRA on a tied head or embedding, and merged")
@pytest.mark.parametrize("tied", ["lm_head", "embed_tokens"])
def test_pasted_tied_layer(world, tied):
    with warns("tied_layer"):
        adapted = world.adapted(target_modules=["q_proj", tied])
    with warns("tied_layer"):
        adapted.merge_and_unload()
    assert "unmerged" in doctor.SYMPTOMS["tied_layer"].cure
    assert "tied" in doctor.SYMPTOMS["adapter_with_embeddings"].cure


@pytest.mark.field("own", "trained token rows of a tied model in SFTTrainer")
def test_pasted_token_rows_tied(world):
    from peft import LoraConfig

    rows = LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2])
    short = world.settings(max_steps=1, save_strategy="no")  # a checkpoint would mislead others
    trainer = world.trainer(peft_config=rows, args=short)
    with raises("token_rows_tied"):
        trainer.train()
    trainer.model.get_output_embeddings().bias = None  # the cure
    assert trainer.train().training_loss > 0


@pytest.mark.field("own", "merging into four bits")
def test_pasted_merge_rounds(world):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(world.quantized(), LoraConfig(target_modules=["q_proj"]))
    with warns("merge_rounds"):
        adapted.merge_and_unload()


@pytest.mark.field("own", "an optimizer's state for other parameters; a scaler without gradients")
def test_pasted_optimizer():
    layer = torch.nn.Linear(2, 2)
    one = torch.optim.SGD(layer.parameters())
    with raises("other_parameters"):
        torch.optim.SGD([layer.weight]).load_state_dict(one.state_dict())
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    with raises("no_gradient_scaled"):
        scaler.step(one)


# ── data ─────────────────────────────────────────────────────────────────────────────────
@pytest.mark.field("own", "an end token that the tokenizer does not have")
def test_pasted_eos_unknown(world):
    with raises("eos_unknown"):
        world.trainer(args=world.settings(eos_token="<EOS_TOKEN>"))


@pytest.mark.field("Qwen3#1522", "assistant_only_loss and a row without an answer")
def test_pasted_no_assistant_tokens(world):
    from datasets import Dataset

    rows = Dataset.from_list([{"messages": [{"role": "user", "content": "Hi"}]}] * 2)
    with raises("no_assistant_tokens"):
        world.trainer(train_dataset=rows, args=world.settings(assistant_only_loss=True))


@pytest.mark.field("trl#6668, trl#1053, trl#3927", "all rows cut before their answers")
def test_pasted_all_dropped(world):
    with raises("all_dropped"):
        world.trainer(args=world.settings(max_length=2)).get_train_dataloader()


MESSAGES = [
    ("message_keys", {"role": "user"}),
    ("message_keys", {"role": "assistant", "content": None}),
    ("message_keys", {"from": "human", "value": "Hi"}),
    ("content_not_text", {"role": "user", "content": [{"type": "text", "text": "Hi"}]}),
]


@pytest.mark.field("transformers#45348", "messages without content, without role, with parts")
@pytest.mark.parametrize(("name", "message"), MESSAGES)
def test_pasted_messages_that_a_template_cannot_read(world, name, message):
    with raises(name):
        world.tokenizer.apply_chat_template([message])


@pytest.mark.field("own", "a template that adds None to a text")
def test_pasted_content_none(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ 'U: ' + m.get('x') }}{% endfor %}"
    with raises("content_not_text"):
        tokenizer.apply_chat_template([{"role": "user"}])


@pytest.mark.field("own", "a training template in a plain Jinja")
def test_pasted_generation_tag():
    import jinja2

    with raises("generation_tag"):
        jinja2.Environment().from_string(chat.chatml_template())


@pytest.mark.field("own", "all splits given to the trainer")
def test_pasted_dataset_dict(world):
    from datasets import DatasetDict

    with raises("dataset_dict"):
        world.trainer(train_dataset=DatasetDict(train=world.rows))


@pytest.mark.field("own", "a data set that is a script; files of different columns")
def test_pasted_datasets_that_do_not_load(tmp_path):
    from datasets import load_dataset

    script = tmp_path / "news.py"
    script.write_text("x = 1\n")
    with raises("dataset_script"):
        load_dataset(str(script))
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    files[0].write_text('{"a": "x"}\n')
    files[1].write_text('{"b": "x"}\n')
    with raises("columns_differ", bare=False):
        load_dataset("json", data_files=list(map(str, files)), cache_dir=str(tmp_path / "cache"))


def plain_trainer(world, rows):
    from transformers import Trainer, TrainingArguments

    fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
    settings = TrainingArguments(str(world.path("plain")), **fixed)
    return Trainer(world.model(), settings, train_dataset=rows)


@pytest.mark.field("own", "the plain Trainer without labels; with texts")
def test_pasted_plain_trainer(world):
    from datasets import Dataset

    with raises("labels_missing"):
        plain_trainer(world, [{"input_ids": [1, 2]}]).train()
    with raises("no_columns"):
        plain_trainer(world, Dataset.from_dict({"text": ["a"]})).train()


@pytest.mark.field("own", "rows of unequal length; a column of texts")
def test_pasted_unequal_rows():
    from transformers import default_data_collator

    with raises("unequal_rows"):
        default_data_collator([{"input_ids": [1, 2]}, {"input_ids": [1]}])
    with raises("unequal_rows"):
        torch.tensor(["text"])


def small(kind):
    """A model of the book's with a table of eight positions."""
    from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

    shape = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    if kind == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**shape, n_embd=16, n_positions=8))
    widths = {"hidden_size": 16, "ffn_dim": 16, "word_embed_proj_dim": 16}
    return OPTForCausalLM(OPTConfig(**shape, **widths, max_position_embeddings=8))


@pytest.mark.field("own", "OPT and GPT-2 beyond their positions, called and generating")
@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_pasted_positions(kind):
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()  # once for each model
    model, row = small(kind), torch.full((1, 4), 5)
    with raises("positions", bare=False):
        model(row.repeat(1, 8))
    with heard() as said, raises("positions", bare=False):
        model.generate(row, max_new_tokens=20, do_sample=False)
    assert {doctor.explain(line).name for line in said} >= {"too_long"}
    found = doctor.explain("IndexError: index out of range in self")  # it may be either
    assert "positions" in found.cause and "tokenizer" in found.cause


@pytest.mark.field("own", "a row longer than the tokenizer's limit")
def test_pasted_too_long(tokenizer):
    tokenizer.model_max_length = 4
    with warns("too_long"):
        tokenizer("a sentence which is longer than four tokens")


@pytest.mark.field("own", "a label beyond the vocabulary; sampling from nan")
def test_pasted_numbers_out_of_range():
    with raises("label_out_of_range"):
        torch.nn.functional.cross_entropy(torch.ones(1, 4), torch.tensor([7]))
    with raises("sampling_nan"):
        torch.multinomial(torch.tensor([float("nan"), 1.0]), 1)


SETTINGS = [
    ("prompt_fills_length", {"max_length": 2}),
    ("temperature_zero", {"do_sample": True, "temperature": 0.0, "max_new_tokens": 2}),
    ("unused_kwargs", {"token_type_ids": torch.ones(1, 2), "max_new_tokens": 2}),
]


@pytest.mark.field("own", "settings of generate that it refuses")
@pytest.mark.parametrize(("name", "settings"), SETTINGS)
def test_pasted_settings_of_generate(world, ids, name, settings):
    with raises(name):
        world.model().generate(ids, **settings)


@pytest.mark.field("own", "a temperature without sampling: saved, and generating")
def test_pasted_generation_config(world, ids):
    model = world.model()
    model.generation_config.temperature = 0.3
    with raises("generation_config"):
        model.save_pretrained(world.path("with-temperature"))
    with warns("generation_flags"):
        world.model().generate(ids, do_sample=False, temperature=0.3, max_new_tokens=2)


@pytest.mark.field("own", "right padding and no mask when generating")
def test_pasted_padding(world):
    model, rows = world.model(), torch.tensor([[1, 2, 0], [1, 3, 4]])
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 0
    asked = {"max_new_tokens": 2, "do_sample": False}
    with warns("attention_mask"):
        model.generate(rows, **asked)
    with warns("right_padding"):
        model.generate(rows, attention_mask=(rows > 0).long(), **asked)


# ── the run ──────────────────────────────────────────────────────────────────────────────
@pytest.mark.field("qlora#27", "resuming where nothing was saved")
def test_pasted_checkpoint_missing(world, tmp_path):
    for where in (True, str(tmp_path)):
        with raises("checkpoint_missing"):
            world.trainer().train(resume_from_checkpoint=where)


@pytest.mark.field("own", "reports to a program that is not installed")
@pytest.mark.parametrize("program", ["wandb", "tensorboard"])
def test_pasted_reporter_missing(world, program, monkeypatch):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, f"is_{program}_available", lambda: False)
    with raises("reporter_missing"):
        world.trainer(args=world.settings(report_to=program))


@pytest.mark.field("own", "a metric that the evaluation does not return")
def test_pasted_best_metric(world):
    trainer = world.trainer(args=world.settings(metric_for_best_model="accuracy"))
    with raises("best_metric"):
        trainer._determine_best_metric({"eval_loss": 1.0}, None)


@pytest.mark.field("own", "a script that starts processes without a main guard")
def test_pasted_main_guard(tmp_path):
    code = "import multiprocessing as m\nm.get_context('spawn').Process(target=print).start()\n"
    said = in_python(code, tmp_path)
    assert doctor.explain(said).name == "main_guard", said
    words = " ".join(said.split("RuntimeError:")[1].split("This probably")[0].split())
    check_pasted("main_guard", words, f"RuntimeError: {words}")


@pytest.mark.field("own", "CUDA in a forked process")
def test_pasted_fork(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    with raises("fork"):
        torch.cuda._lazy_init()


@pytest.mark.field("own", "a worker that dies")
@pytest.mark.skipif(os.name == "nt", reason="the function is sent to the worker by fork")
def test_pasted_worker_died(world):
    with raises("worker_died"):
        world.rows.map(lambda row: os._exit(9), num_proc=2)


@pytest.mark.field("own", "an embedding cut up by ZeRO-3; shared tensors; a changed second pass")
def test_pasted_tensors(ids, tmp_path):
    from safetensors.torch import save_file
    from torch.utils.checkpoint import checkpoint

    with raises("partitioned_weight"):
        torch.nn.functional.embedding(ids, torch.ones(0))
    tied = torch.ones(2)
    with raises("shared_tensors"):
        save_file({"head": tied, "embedding": tied}, tmp_path / "model.safetensors")
    cache, row = [], torch.ones(2, 2, requires_grad=True)

    def layer(x):
        cache.append(x)
        return (x @ torch.ones(2, len(cache))).sin().sum()

    with raises("recomputed"):
        checkpoint(layer, row, use_reentrant=False).backward()


@pytest.mark.field("own", "other words for mixed types, half precision on a CPU, no memory")
def test_pasted_other_words():
    import numpy as np

    q = torch.ones(1, 1, 2, 2)
    with raises("mixed_dtypes"):
        torch.nn.functional.scaled_dot_product_attention(q, q.bfloat16(), q)
    with raises("mixed_dtypes"):
        torch.nn.Conv1d(1, 1, 1).half()(torch.ones(1, 1, 4))
    with raises("half_missing"):
        torch.linalg.svd(torch.ones(2, 2).half())
    with raises("cpu_memory"):
        np.ones((10**7, 10**7))


# ── serving and the machine ──────────────────────────────────────────────────────────────
@pytest.mark.field("own", "torch without CUDA; no toolkit to compile with; progress bars")
def test_pasted_machine(monkeypatch):
    import tqdm.notebook
    from torch.utils import cpp_extension

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.delattr(torch._C, "_cuda_getDeviceCount", raising=False)
    with raises("torch_without_cuda"):
        torch.cuda._lazy_init()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    with raises("cuda_home"):
        cpp_extension._join_cuda_home("bin", "nvcc")
    monkeypatch.setattr(tqdm.notebook, "IProgress", None)
    with raises("progress_bars"):
        tqdm.notebook.tqdm(range(1))


@pytest.mark.field("own", "a card asked for where none is")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_pasted_no_gpu(world):
    with raises("no_gpu"):
        load(world.path("tiny"), device_map={"": 0})


@pytest.mark.field("own", "a package that has no build for this machine")
def test_pasted_no_version(tmp_path):
    command = "from pip._internal.cli.main import main; main(['install', '--no-index', 'nosuch'])"
    said = in_python(command, tmp_path)
    for line in said.splitlines()[:2]:
        check_pasted("no_version", line)


# ── warnings that may stay ───────────────────────────────────────────────────────────────
@pytest.mark.field("own", "warnings of transformers that may stay")
def test_pasted_notes_of_transformers(world, ids, monkeypatch):
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    with warns("torch_dtype"):
        load(world.path("tiny"), torch_dtype=torch.float32)
    model = world.model().train()
    model.gradient_checkpointing_enable()
    with warns("use_cache"):
        model(input_ids=ids, use_cache=True)
    model = world.model()
    model.config.eos_token_id = model.generation_config.eos_token_id = 7
    with warns("special_tokens"):
        plain = plain_trainer(world, [])
        plain.model, plain.processing_class = model, world.tokenizer
        from transformers.trainer_utils import align_special_tokens

        align_special_tokens(model, world.tokenizer)


@pytest.mark.field("own", "warnings of torch and bitsandbytes that may stay")
def test_pasted_notes_of_torch():
    import bitsandbytes
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(1, 1)
    with warns("reentrant"):
        checkpoint(layer, torch.ones(1, requires_grad=True))
    with warns("scheduler_order"):
        optimizer = torch.optim.SGD(layer.parameters())
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0).step()
    row = torch.ones(1, 64)
    with warns("compute_dtype"):
        bitsandbytes.nn.Linear4bit(64, 64).to("cpu")(row.half())


@pytest.mark.field("own", "a cache where links cannot be made")
def test_pasted_symlinks(tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    def refuse(*_, **__):
        raise OSError("as Windows does")

    monkeypatch.setattr(os, "symlink", refuse)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS_WARNING", False)
    with warns("symlinks"):
        file_download.are_symlinks_supported(tmp_path)


# ── llama.cpp ────────────────────────────────────────────────────────────────────────────
@pytest.mark.slow
@pytest.mark.field("llama.cpp#8649, llama.cpp#22700", "a tokenizer the converter does not know")
def test_pasted_pretokenizer(world, tokenizer):
    folder = saved(world, "other-words")
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    whole = json.loads(path.read_text("utf-8"))
    whole["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(whole), "utf-8")
    with raises("pretokenizer"):
        gguf.convert_model(folder, world.path("other-words.gguf"))


@pytest.mark.field("own", "a model saved in four bits, to be converted")
def test_pasted_cannot_map(world):
    folder = world.path("four-bits")
    world.quantized().save_pretrained(folder)
    world.tokenizer.save_pretrained(folder)
    with raises("cannot_map"):
        gguf.convert_model(folder, world.path("four-bits.gguf"))


# ── what this machine cannot raise: the messages as their sources and reports have them ──
PIP = (
    "Collecting flash-attn\n  Getting requirements to build wheel: finished with status 'error'\n"
    "  error: subprocess-exited-with-error\n  x Getting requirements to build wheel did not run "
    'successfully.\n      File "<string>", line 22, in <module>\n'
    "  ModuleNotFoundError: No module named 'torch'\n      [end of output]"
)
READ = {
    "flash_pip": PIP,
    "xformers": (
        "WARNING[XFORMERS]: xFormers can't load C++/CUDA extensions. xFormers was built for:\n"
        "    PyTorch 2.1.0+cu121 with CUDA 1201 (you have 2.4.0+cu121)"
    ),
    "torchvision": "RuntimeError: operator torchvision::nms does not exist",
    "cuda_library": (
        "ImportError: /venv/torch/lib/../../nvidia/cusparse/lib/libcusparse.so.12: undefined "
        "symbol: __nvJitLinkComplete_12_4, version libnvJitLink.so.12"
    ),
    "glibcxx": (
        "ImportError: /usr/lib/x86_64-linux-gnu/libstdc++.so.6: version `GLIBCXX_3.4.32' not "
        "found (required by libbitsandbytes_cuda124.so)"
    ),
    "certificate": (
        "ssl.SSLCertVerificationError: [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify "
        "failed: self-signed certificate in certificate chain (_ssl.c:1006)"
    ),
    "fp16_no_card": "ValueError: fp16 mixed precision requires a GPU (not 'cpu').",
    "wandb": (
        "wandb.errors.errors.UsageError: api_key not configured (no-tty). call "
        "wandb.login(key=[your_api_key])"
    ),
    "shared_memory": (
        "RuntimeError: DataLoader worker (pid 4242) is killed by signal: Bus error. It is "
        "possible that dataloader's workers are out of shared memory."
    ),
    "worker_died": "RuntimeError: DataLoader worker (pid(s) 4242) exited unexpectedly",
    "nccl_timeout": (
        "[E ProcessGroupNCCL.cpp:616] [Rank 1] Watchdog caught collective operation timeout: "
        "WorkNCCL(SeqNum=7, OpType=ALLREDUCE, Timeout(ms)=1800000) ran for 1800423 milliseconds "
        "before timing out."
    ),
    "ready_twice": (
        "RuntimeError: Expected to mark a variable ready only once. This error is caused by one "
        "of the following reasons: 1) Use of a module parameter outside the forward function."
    ),
    "unused_parameters": (
        "RuntimeError: Expected to have finished reduction in the prior iteration before "
        "starting a new one. This error indicates that your module has parameters that were not "
        "used in producing loss."
    ),
    "device_ordinal": "torch.AcceleratorError: CUDA error: invalid device ordinal",
    "mps_memory": (
        "RuntimeError: MPS backend out of memory (MPS allocated: 17.90 GB, other allocations: "
        "171 MB, max allowed: 18.13 GB). Tried to allocate 128.00 MB on private pool."
    ),
    "cublas": (
        "RuntimeError: CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling "
        "`cublasCreate(handle)`"
    ),
    "cuda_memory": (
        "torch.AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be "
        "asynchronously reported at some other API call"
    ),
    "two_devices": (
        "RuntimeError: Expected all tensors to be on the same device, but found at least two "
        "devices, cuda:0 and cpu!"
    ),
    "no_kernel_image": (
        "Error no kernel image is available for execution on the device at line 167 in file "
        "/src/csrc/ops.cu"
    ),
    "gguf_architecture": (
        "llama_model_load: error loading model: error loading model architecture: unknown model "
        "architecture: 'qwen9'"
    ),
    "wrong_tensors": (
        "llama_model_load: error loading model: done_getting_tensors: wrong number of tensors; "
        "expected 292, got 291"
    ),
    "context": (
        "ConnectionError: the server answered 400: request (5001 tokens) exceeds the available "
        "context size (1024 tokens), try increasing it"
    ),
    "memory": (
        "ggml_backend_cuda_buffer_type_alloc_buffer: allocating 8192.00 MiB on device 0: "
        "cudaMalloc failed: out of memory"
    ),
    "pretokenizer": (
        "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()"
    ),
    "cannot_map": ("ValueError: Can not map tensor 'model.layers.0.mlp.down_proj.weight.absmax'"),
    "vllm_rank": "ValueError: LoRA rank 64 is greater than max_lora_rank 16.",
    "vllm_memory": (
        "ValueError: No available memory for the cache blocks. Try increasing "
        "`gpu_memory_utilization` when initializing the engine."
    ),
    "vllm_bf16": (
        "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least "
        "8.0. Your Tesla T4 GPU has compute capability 7.5."
    ),
    "driver_old": (
        "RuntimeError: The NVIDIA driver on your system is too old (found version 11040). "
        "Please update your GPU driver"
    ),
    "no_gpu": "RuntimeError: No CUDA GPUs are available",
    "mps_operator": (
        "NotImplementedError: The operator 'aten::linalg_svd' is not currently implemented for "
        "the MPS device."
    ),
    "triton": (
        "torch._inductor.exc.TritonMissing: Cannot find a working triton installation. Either "
        "the package is not installed or it is too old."
    ),
    "compiler": (
        "RuntimeError: Failed to find C compiler. Please specify via CC environment variable."
    ),
    "externally_managed": "error: externally-managed-environment",
    "colab_limit": (
        "Cannot connect to GPU backend. You cannot currently connect to a GPU due to usage "
        "limits in Colab."
    ),
    "no_chat_template": (
        "As of transformers v4.44, default chat template is no longer allowed, so you must "
        "provide a chat template if the tokenizer does not define one."
    ),
    "architecture_unknown": (
        "ValueError: `rope_scaling` must be a dictionary with two fields, `type` and `factor`, "
        "got {'factor': 8.0, 'rope_type': 'llama3'}"
    ),
    "bitsandbytes_missing": (
        "importlib.metadata.PackageNotFoundError: No package metadata was found for bitsandbytes"
    ),
    "tokenizers_old": (
        "Exception: data did not match any variant of untagged enum ModelWrapper at line 250373 "
        "column 3"
    ),
    "newly_initialized": (
        "Some weights of LlamaForSequenceClassification were not initialized from the model "
        "checkpoint at tiny and are newly initialized: ['score.weight']"
    ),
    "disk_full": "OSError: [Errno 122] Disk quota exceeded",
    "cpu_memory": "OSError: [WinError 1455] The paging file is too small",
    "damaged_gguf": "gguf_init_from_file: invalid magic characters: 'vers', expected 'GGUF'",
    "master_port": (
        "torch.distributed.DistNetworkError: The server socket has failed to listen on any local "
        "network address. port: 29500, useIpv6: false, code: -98, name: EADDRINUSE"
    ),
    "triton_ops": "ModuleNotFoundError: No module named 'triton.ops'",
    "libuv": (
        "torch.distributed.DistStoreError: use_libuv was requested but PyTorch was built without "
        "libuv support, run with USE_LIBUV=0 to disable it."
    ),
    "response_key": (
        "UserWarning: Could not find response key `### Response:` in the following instance: "
        "Below is an instruction. This instance will be ignored in loss calculation."
    ),
    "pipeline": (
        "The model 'PeftModelForCausalLM' is not supported for text-generation. Supported models "
        "are ['ArceeForCausalLM']."
    ),
    "trainer_tokenizer": (
        "FutureWarning: `tokenizer` is deprecated and will be removed in version 5.0.0 for "
        "`SFTTrainer.__init__`. Use `processing_class` instead."
    ),
    "evaluation_strategy": (
        "FutureWarning: `evaluation_strategy` is deprecated and will be removed in version 4.46 "
        "of 🤗 Transformers. Use `eval_strategy` instead"
    ),
    "max_seq_length": (
        "FutureWarning: Deprecated argument(s) used in '__init__': max_seq_length. Will not be "
        "supported from version '0.13.0'."
    ),
    "bitsandbytes_build": (
        "UserWarning: The installed version of bitsandbytes was compiled without GPU support. "
        "8-bit optimizers and GPU quantization are unavailable."
    ),
    "flash_build": "ModuleNotFoundError: No module named 'flash_attn_2_cuda'",
    "pad_to_eos": "Setting `pad_token_id` to `eos_token_id`:2 for open-end generation.",
    "int8_cast": (
        "UserWarning: MatMul8bitLt: inputs will be cast from torch.bfloat16 to float16 during "
        "quantization"
    ),
    "tokenizers_forked": (
        "huggingface/tokenizers: The current process just got forked, after parallelism has "
        "already been used. Disabling parallelism to avoid deadlocks..."
    ),
    "resolver": (
        "ERROR: pip's dependency resolver does not currently take into account all the packages "
        "that are installed. This behaviour is the source of the following dependency conflicts."
    ),
    "illegal_instruction": "Command '['llama-cli']' died with <Signals.SIGILL: 4>.",
    "killed": "subprocess.CalledProcessError: Command 'x' died with <Signals.SIGKILL: 9>.",
}


@pytest.mark.field(
    "peft#441, axolotl#568, peft#2407, accelerate#3612, axolotl#1302, bitsandbytes#310, "
    "unsloth#1914, smol-course#220, llama.cpp#8649, llama.cpp#22700, llama.cpp#19774, "
    "llama.cpp#28756, llama.cpp#8734, llama.cpp#13678",
    "messages that this machine cannot raise",
)
@pytest.mark.parametrize(("name", "text"), READ.items(), ids=READ)
def test_pasted_messages_that_were_only_read(name, text):
    assert doctor.explain(text).name == name
    if name != "flash_pip":  # which is known by the lines before it
        check_pasted(name, text)


@pytest.mark.field("llama.cpp#28756", "a return code without the signal's name")
def test_child_signals_by_their_numbers():
    for status, name in ((-4, "illegal_instruction"), (-9, "killed"), (-11, "llamacpp_crash")):
        text = f"RuntimeError: llama-server ended with status {status} instead of serving x.gguf"
        assert doctor.explain(text).name == name
    assert doctor.explain("exit code: 137").name == "killed", "as Docker says it"
    assert doctor.explain("RuntimeError: llama-server ended with status 4").name == "unknown"


# The same entries, as older and other versions of the libraries have them.
OTHERS = [
    (
        "bitsandbytes_missing",
        "ImportError: Using `bitsandbytes` 8-bit quantization requires Accelerate: `pip install "
        "accelerate` and the latest version of bitsandbytes: `pip install -i "
        "https://pypi.org/simple/ bitsandbytes`",
    ),
    (
        "accelerate_missing",
        "ImportError: Using the `Trainer` with `PyTorch` requires `accelerate>=0.26.0`: Please "
        "run `pip install transformers[torch]`",
    ),
    ("architecture_unknown", "KeyError: 'qwen2'"),
    ("lfs_pointer", "SafetensorError: Error while deserializing header: HeaderTooLarge"),
    (
        "lfs_pointer",
        "OSError: You seem to have cloned a repository without having git-lfs installed.",
    ),
    ("weights_cut", "SafetensorError: Error while deserializing header: MetadataIncompleteBuffer"),
    ("load_in_4bit", "TypeError: __init__() got an unexpected keyword argument 'load_in_8bit'"),
    ("message_keys", "jinja2.exceptions.UndefinedError: 'None' has no attribute 'content'"),
    ("content_not_text", 'TypeError: can only concatenate str (not "list") to str'),
    (
        "token_rights",
        "HfHubHTTPError: 403 Client Error: Forbidden for url: https://huggingface.co/x",
    ),
    (
        "token_invalid",
        "HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/x",
    ),
    ("gated", "Your request to access model a/b is awaiting a review from the repo authors."),
    ("repo_id_form", "OSError: Incorrect path_or_model_id: './outputs/merged'."),
    ("device_assert", "Indexing.cu:1289: indexSelectLargeIndex: block: [0,0,0] Assertion failed."),
    (
        "no_padding_token",
        "ValueError: Cannot handle batch sizes > 1 if no padding token is defined.",
    ),
    ("bitsandbytes_build", "RuntimeError: CUDA Setup failed despite GPU being available."),
    ("bitsandbytes_build", "'NoneType' object has no attribute 'cget_managed_ptr'"),
    ("cuda_memory", "RuntimeError: Triton Error [CUDA]: out of memory"),
    ("context", "the request exceeds the available context size. try increasing the context size"),
    ("pretokenizer", "WARNING:hf-to-gguf:** WARNING: The BPE pre-tokenizer was not recognized!"),
    ("ollama_silent", "Error: could not connect to ollama app, is it running?"),
    ("memory", "Error: model requires more system memory (8.4 GiB) than is available (3.2 GiB)"),
    ("killed", "zsh: killed     python train.py"),
    ("adamw", "ImportError: cannot import name 'AdamW' from 'transformers.optimization' (/x.py)"),
    ("import_gone", "ImportError: cannot import name 'HybridCache' from 'transformers' (/x.py)"),
]


@pytest.mark.field(
    "bitsandbytes#1530, HandsOnLLM#10, transformers#45348, DeepSeek-V3#557, llama.cpp#22700, own",
    "other wordings of the same causes",
)
@pytest.mark.parametrize(("name", "text"), OTHERS)
def test_pasted_other_wordings(name, text):
    check_pasted(name, text, text if "Error:" in text else "")


@pytest.mark.field("own", "Jupyter shows the lines around the call: they are not the call")
def test_pasted_positions_in_jupyter():
    frame = (
        "IndexError                                Traceback (most recent call last)\n"
        "File modeling_gpt2.py:590, in GPT2Model.forward(self, input_ids)\n"
        "{}    588     inputs_embeds = self.wte(input_ids)\n"
        "{}    590 position_embeds = self.wpe(position_ids)\n\n"
        "IndexError: index out of range in self"
    )
    assert doctor.explain(frame.format("", "--> ")).name == "positions"
    assert doctor.explain(frame.format("--> ", "")).name == "token_out_of_range"


# ── a reader's own words ─────────────────────────────────────────────────────────────────
@pytest.mark.field(
    "PhiCookBook#344, llama.cpp#11554", "messages without a type, with a rank, as a log's line"
)
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("cuda_memory", "CUDA out of memory"),
        ("token_out_of_range", "index out of range in self"),
        ("cuda_memory", "[rank0]: torch.OutOfMemoryError: CUDA out of memory"),
        ("adapter_with_embeddings", "ERROR:lora-to-gguf:Embeddings is present in the adapter."),
        ("cuda_memory", "OOM"),
        ("cuda_memory", "oom!"),
        ("cuda_memory", "I run out of memory"),
        ("cuda_memory", "my 3090 ran out of VRAM after ten steps"),
        ("cuda_memory", "out of memory"),
        ("cuda_memory", "the model does not fit on my GPU"),
        ("cuda_memory", "there is not enough memory"),
        ("cuda_memory", "the GPU memory is full"),
        ("cpu_memory", "Colab says it is out of RAM"),
        ("killed", "session crashed after using all available RAM"),
        ("killed", "Your session crashed for an unknown reason."),
        ("killed", "the kernel died"),
        ("killed", "The kernel for Chapter5.ipynb appears to have died. It will restart."),
        ("killed", "my notebook always crashes? no, the kernel is dead"),
        ("killed", "The Kernel crashed while executing code in the current cell"),
        ("disk_full", "my disk is full"),
        ("gated", "it says gated repo, what now"),
        ("endless", "the answer never ends"),
        ("endless", "my model keeps generating until the limit"),
        ("endless", "it just repeats itself"),
        ("loss_nan", "the loss becomes nan"),
        ("loss_nan", "why is my loss 0?"),
        ("loss_nan", "grad_norm: nan"),
        ("frozen_adapter", "the model learns nothing"),
        ("frozen_adapter", "my loss is not going down"),
        ("frozen_adapter", "the fine-tuned model gives the same answers as before"),
        ("frozen_adapter", "the adapter doesn't change anything"),
        ("garbage_when_served", "Ollama answers gibberish"),
        ("asks_questions", "the model writes my question too"),
    ],
)
def test_pasted_own_words(name, text):
    assert doctor.explain(text).name == name
    assert doctor.explain(text.upper()).name == name


@pytest.mark.field("own", "words that only sound alike")
@pytest.mark.parametrize(
    "text",
    [
        "how do I repeat the experiment",
        "my notebook keeps going offline",
        "I never changed the learning rate",
        "does not load as before",
        "loss of zero-shot",
        "the banana is not a number",
        "she never stops smiling",
        "the music goes on and on",
        "an endless summer in the garden",
        "he recited the poem out of pure memory",
        "the session crashed the party",
        "my grandmother nan bakes bread",
        "a loss of 0.5 is good",
        "the loss is 0.02 now",
        "I did not change the batch size",
        "does the license change anything?",
        "Python's garbage collection",
        "does this work in my notebook?",
        "which model is good in the notebook?",
        "the same answer as in the book",
        "what is the kernel of a matrix?",
        "how large is the disk?",
        "who writes the prompt?",
        "I stop the training and continue tomorrow",
        "is there a token for the end?",
        "oom-pah bands play in the park",
        "403 students and 401 teachers",
        "the repository was not found by chance",
        "I have a header, too large for this page",
        "ModuleNotFoundError: No module named 'torchvision'",
        "ModuleNotFoundError: No module named 'torch.no_such_part'",
        "AttributeError: module 'torch' has no attribute 'integer'",
        'Traceback (most recent call last):\n  File "x.py", line 3, in <module>\n'
        "    load_or_die(\"CUDA out of memory\")\nKeyError: 'foo'",
    ],
)
def test_kept_unknown(text):
    assert doctor.explain(text).name == "unknown"


@pytest.mark.field("own", "300 ordinary sentences")
def test_kept_ordinary_sentences_are_unknown():
    lines = (HELPERS / "yoda" / "test.jsonl").read_text("utf-8").splitlines()
    found = [text for row in map(json.loads, lines) for text in list(row.values())[:2]]
    assert len(found) == 300
    for text in found:
        assert doctor.explain(text) is doctor.UNKNOWN, text


# ── which of several ─────────────────────────────────────────────────────────────────────
@pytest.mark.field("own", "texts in which several entries find a message of theirs")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("none_requires_grad", "UserWarning: None of the inputs have requires_grad=True.\nend"),
        (
            "nothing_requires_grad",
            "UserWarning: None of the inputs have requires_grad=True.\nRuntimeError: element 0 "
            "of tensors does not require grad and does not have a grad_fn",
        ),
        (
            "cuda_memory",
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory.\n"
            "E1128 api.py:869] failed (exitcode: 1) local_rank: 0 (pid: 17)\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\nx FAILED",
        ),
        (
            "device_assert",
            "torch.OutOfMemoryError: CUDA out of memory.\n\nDuring handling of the above "
            "exception, another exception occurred:\n\nTraceback (most recent call last):\n"
            "torch.AcceleratorError: CUDA error: device-side assert triggered",
        ),
        (
            "adapter_with_embeddings",
            "INFO:x:loading\nERROR:lora-to-gguf:Embeddings is present in the adapter\n"
            "subprocess.CalledProcessError: Command 'x' returned non-zero exit status 1.",
        ),
        (
            "no_such_repo",
            "huggingface_hub.errors.RepositoryNotFoundError: 401 Client Error.\n\nRepository Not "
            "Found for url: https://huggingface.co/api/models/a/b.\nIf you are trying to access "
            "a private or gated repo, make sure you are authenticated.\nInvalid username or "
            "password.",
        ),
        ("shapes_differ", "RuntimeError: You set `ignore_mismatched_sizes` to `False`. size"),
    ],
)
def test_pasted_the_latest_and_most_special_wins(name, text):
    assert doctor.explain(text).name == name


# ── the catalog ──────────────────────────────────────────────────────────────────────────
TITLES = re.findall(r"^\*\*(.+)\*\*(?: °)?  $", house.troubleshooting(), re.M)


@pytest.mark.field("own", "each title of Troubleshooting.md, copied in several ways")
@pytest.mark.parametrize("title", TITLES)
def test_pasted_titles_find_their_own_entry(title):
    mine = next(s for s in doctor.SYMPTOMS.values() if s.title.lower() == title.lower())
    for text in (title, f"**{title}** °", re.sub("[`“”*]", "", title), title.upper()):
        assert doctor.explain(text).name == mine.name
    for other in doctor.SYMPTOMS.values():  # nor would another have it, were this one gone
        if other is not mine:
            claims = [re.search(p, title, re.I) for p in (other.error, other.words) if p]
            assert not any(claims) or other.where, other.name


@pytest.mark.field("own", "each entry, raised in a test or read")
def test_kept_every_entry_is_raised_or_read():
    assert len(TITLES) == len(doctor.SYMPTOMS) == sum(map(len, doctor.SECTIONS.values()))
    source = Path(__file__).read_text("utf-8")
    raised = set(re.findall(r'(?:raises|warns|check_pasted)\("(\w+)"', source))
    raised |= {case[0] for case in (*PACKAGES, *HUB, *MESSAGES, *SETTINGS)}
    raised |= test_doctor.PROVOKED.keys() | test_check.raised()
    for symptom in doctor.SYMPTOMS.values():
        read = [name for name, _ in (*READ.items(), *test_doctor.READ)]
        if symptom.origin == "read":
            assert symptom.name not in raised and (symptom.name in read or symptom.words)
        elif symptom.error:
            assert symptom.name in raised, symptom.name
