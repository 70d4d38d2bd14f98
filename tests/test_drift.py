"""Every call into the field's libraries is one that the installed versions take."""

import copy
import warnings

import deprecations
import drift
import pytest
import torch

from helpers import chat, data, generation, lora, memory, models, runtime, training
from helpers.course import notebooks


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """Small real objects on which methods are looked up."""
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from trl import SFTConfig, SFTTrainer

    folder = tmp_path_factory.mktemp("drift")
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "vocab_size": len(tokenizer)}
    plain = LlamaForCausalLM(LlamaConfig(**shape))
    plain.save_pretrained(folder)
    four_bits = AutoModelForCausalLM.from_pretrained(
        folder,
        device_map="cpu",
        quantization_config=BitsAndBytesConfig(load_in_4bit=True),
    )
    adapted = get_peft_model(LlamaForCausalLM(LlamaConfig(**shape)), LoraConfig())
    rows = data.load_yoda("train").select(range(2))
    settings = SFTConfig(str(folder / "run"), use_cpu=True, bf16=False, report_to="none")
    trainer = SFTTrainer(adapted, args=settings, train_dataset=rows, processing_class=tokenizer)
    return {
        "model": [plain, adapted, four_bits],
        "tokenizer": [tokenizer],
        "dataset": [rows],
        "settings": [settings],
        "trainer": [trainer],
    }


USUAL = {"model": "model", "tokenizer": "tokenizer", "trainer": "trainer"}


def makers():
    """What makes which kind of object."""
    import datasets
    import peft
    import transformers
    import trl

    found = {
        models.load_model: "model",
        transformers.AutoModelForCausalLM.from_pretrained: "model",
        transformers.AutoModelForCausalLM.from_config: "model",
        transformers.LlamaForCausalLM: "model",
        peft.get_peft_model: "model",
        peft.PeftModel.from_pretrained: "model",
        peft.prepare_model_for_kbit_training: "model",
        models.load_tokenizer: "tokenizer",
        transformers.AutoTokenizer.from_pretrained: "tokenizer",
        data.load_yoda: "dataset",
        datasets.Dataset.from_list: "dataset",
        trl.SFTConfig: "settings",
        trl.SFTTrainer: "trainer",
        training.LeanSFTTrainer: "trainer",
    }
    return {drift.key(function): kind for function, kind in found.items()}


def extra():
    """The keywords that `**kwargs` takes where no signature says so."""
    from peft import PeftModel
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaForCausalLM,
        PreTrainedConfig,
        PreTrainedModel,
        PreTrainedTokenizerBase,
    )

    model = drift.named(PreTrainedModel.from_pretrained)
    tokenizer = drift.named(PreTrainedTokenizerBase.from_pretrained)
    config = drift.popped(PreTrainedConfig._get_config_dict)
    generation = set(vars(GenerationConfig()))
    found = {
        AutoConfig.from_pretrained: config,
        AutoModelForCausalLM.from_pretrained: model,
        AutoModelForCausalLM.from_config: drift.popped(PreTrainedModel._from_config),
        AutoTokenizer.from_pretrained: tokenizer,
        GenerationConfig: generation,
        LlamaForCausalLM.generate: generation | drift.named(LlamaForCausalLM.forward),
        PeftModel.forward: drift.named(LlamaForCausalLM.forward),
    }
    return {drift.key(function): words for function, words in found.items()}


def real():
    """The functions whose own signature was lost to a decorator."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    auto = AutoModelForCausalLM.from_config
    return {drift.key(auto): _BaseAutoModelClass.from_config}


def files():
    for path in sorted((notebooks.root() / "helpers").rglob("*.py")):
        yield path.relative_to(notebooks.root()).as_posix(), path.read_text("utf-8")
    for name in notebooks.written():
        yield name, drift.cells(notebooks.root() / f"{name}.ipynb")


@pytest.fixture(scope="module")
def read(examples):
    """A function that reads a source: its Reader, and what is wrong with it."""
    makes, takes, meant = makers(), extra(), real()

    def read(name, source):
        reader = drift.Reader(name, source, examples, makes, USUAL)
        found = [drift.complaint(call, takes, meant) for call in reader.calls]
        return reader, reader.problems + [text for text in found if text]

    return read


@pytest.mark.parametrize(("name", "source"), list(files()), ids=[f[0] for f in files()])
def test_our_calls_are_those_of_the_installed_versions(name, source, read):
    _, problems = read(name, source)
    assert not problems, "\n".join(problems)


def test_the_reader_sees_the_calls_it_is_there_for(read):
    seen = {library: 0 for library in drift.LIBRARIES}
    keywords, keys = set(), set()
    for file in files():
        for call in read(*file)[0].calls:
            seen[call.owner] += 1
            keys |= {drift.key(target).split(":")[1] for target in call.targets}
            keywords |= set(call.keywords)
    for library in ("transformers", "trl", "peft", "bitsandbytes", "datasets"):
        assert seen[library] >= 5, seen
    assert {"SFTConfig", "SFTTrainer", "LoraConfig", "BitsAndBytesConfig"} <= keys
    assert "PreTrainedTokenizerBase.apply_chat_template" in keys
    assert {"processing_class", "quantization_config", "max_length", "dtype"} <= keywords


IMPORTS = """
import bitsandbytes as bnb
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer
from helpers import data, models
"""
DRIFTED = [
    ("SFTTrainer(model, tokenizer=tokenizer)", "does not take tokenizer"),
    ("SFTTrainer(model, data, data, data, data, data, *more, **most)", ""),
    ("SFTConfig('out', max_seq_length=9)", "does not take max_seq_length"),
    ("SFTConfig('out', evaluation_strategy='no')", "does not take evaluation_strategy"),
    ("given = {'logging_dir': 'x'}\nSFTConfig('out', **given)", "not take logging_dir"),
    ("SFTConfig('out', **{'a': 1} | dict(bf16=True))", "does not take a"),
    ("SFTConfig('out', gradient_checkpointing=True)", "is deprecated"),
    ("BitsAndBytesConfig(bnb_4bit_type='nf4')", "does not take bnb_4bit_type"),
    ("LoraConfig(rank=8)", "does not take rank"),
    ("AutoModelForCausalLM.from_pretrained('x', torch_dtype=1)", "is deprecated"),
    ("AutoModelForCausalLM.from_pretrained('x', load_in_4bit=True)", "load_in_4bit"),
    ("get_peft_model(model)", "missing a required argument"),
    ("get_peft_model(model, 1, 2, 3, 4, 5, 6, 7)", "too many positional arguments"),
    ("load_dataset('x', split='train', use_auth_token=1)", "use_auth_token"),
    ("bnb.functional.quantize_4bit(x, kind='nf4')", "does not take kind"),
    ("bnb.functional.quantize_five_bit(x)", "has no quantize_five_bit"),
    ("from trl import DataCollatorForCompletionOnlyLM", "trl has no DataCollator"),
    ("from transformers.nowhere import Trainer", "transformers.nowhere has no Trainer"),
    ("import peft.nowhere", "import peft.nowhere"),
    ("tokenizer.apply_chat_template([], add_generation=True)", "add_generation"),
    ("tokenizer.batch_encode(1)", "has no batch_encode"),
    ("model.generate(input_ids=1, max_tokens=9)", "does not take max_tokens"),
    ("model.gradient_checkpointing_enable()", "deprecated"),
    ("model(input_ids=1, label=2)", "does not take label"),
    ("m = models.load_model()\nm.eval().get_usable_length()", "has no get_usable_length"),
    ("def f(trainer):\n    trainer.tokenizer.decode(1)", "has no tokenizer"),
]


@pytest.mark.parametrize(("source", "complaint"), DRIFTED)
def test_a_drifted_call_is_found(source, complaint, read):
    _, problems = read("cell", IMPORTS + source)
    assert len(problems) == bool(complaint), problems
    assert complaint in "".join(problems)


SOUND = [
    "SFTTrainer(model, args=a, processing_class=tokenizer, train_dataset=rows)",
    "SFTConfig('out', **{'bf16': False} | unknown)",
    "AutoModelForCausalLM.from_pretrained('x', dtype='auto', device_map='cpu')",
    "model.generate(input_ids=1, attention_mask=2, max_new_tokens=9, do_sample=False)",
    "model(input_ids=1, labels=2)\nmodel.own_layer\nmodel.eval().save_pretrained('x')",
    "from pathlib import Path\nmodel, x = Path('a'), SFTConfig('x')\nmodel.write_bytes(b'')",
    "rows = data.load_yoda()\nrows.map(len, batched=True)\nrows = [1]\nrows.append(2)",
]


@pytest.mark.parametrize("source", SOUND)
def test_a_sound_call_is_left_alone(source, read):
    reader, problems = read("cell", IMPORTS + source)
    assert reader.calls
    assert problems == []


# ── deprecations while running ───────────────────────────────────────────────────────────
def typical(examples, folder):
    """From loading to a merged model, on tiny sizes: the calls that all chapters make."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from transformers import LlamaConfig
    from trl import SFTConfig

    tokenizer = models.load_tokenizer(models.EMBEDDED)
    tokenizer.chat_template = chat.chatml_template()
    tokenizer = chat.prepare_tokenizer(tokenizer)
    examples["model"][0].save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    model = models.load_model(str(folder / "base"), quantization="nf4", device="cpu")
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    settings = SFTConfig(
        str(folder / "run"),
        max_steps=1,
        max_length=32,
        save_strategy="no",
        **training.machine_settings(runtime.detect()),
    )
    trainer = training.LeanSFTTrainer(
        model=chat.prepare_model(model, tokenizer),
        args=settings,
        train_dataset=data.load_yoda("train").select(range(8)),
        processing_class=tokenizer,
    )
    trainer.train()
    generation.generate(model, tokenizer, ["Hello"], max_new_tokens=2)
    model.save_pretrained(folder / "adapter")
    base = models.load_model(str(folder / "base"), dtype="float32", device="cpu")
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    lora.parameter_report(adapted)
    merged = adapted.merge_and_unload()
    merged.save_pretrained(folder / "merged")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = LlamaConfig(**shape, num_attention_heads=2, vocab_size=64)
    memory.estimate_training(config, lora=LoraConfig(r=2), sequence_length=16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="written for the CPU's settings")
def test_our_calls_cause_no_deprecation(examples, tmp_path, monkeypatch):
    found = deprecations.watch(monkeypatch)
    typical(examples, tmp_path)
    assert found == []


def test_deprecations_of_our_calls_are_noticed_and_those_of_others_are_not(
    examples, tmp_path, monkeypatch
):
    from peft import prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig

    found = deprecations.watch(monkeypatch)
    plain = examples["model"][0]
    plain.save_pretrained(tmp_path)
    assert found == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a filter does not hide them
        plain.gradient_checkpointing_enable()
    assert "activation_checkpointing_enable" in found.pop()
    SFTConfig(
        str(tmp_path), gradient_checkpointing=False, use_cpu=True, bf16=False
    )  # handed on by trl
    assert "gradient_checkpointing" in found.pop()
    AutoModelForCausalLM.from_pretrained(tmp_path, torch_dtype="float32")  # in the log
    assert "dtype" in found.pop()
    assert found == []
    prepare_model_for_kbit_training(copy.deepcopy(examples["model"][2]))  # peft's own call
    assert found == []
