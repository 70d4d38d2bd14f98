"""The page for readers of the printed book: in step with its data, and true."""

import ast
import csv
import importlib
import json
import pkgutil
import re
from importlib import resources

import house
import pytest

import helpers
from helpers.course import doctor, notebooks

BOOK = house.read_book()
CHAPTERS = house.chapters(BOOK)
CALLS = [
    pytest.param(name, row, id=f"{name}-{row['then'][:40]}")
    for name, entry in CHAPTERS
    for row in entry.get("calls", ())
]
SNIPPETS = [param for param in CALLS if "code" in param.values[1]]
PLACES = [
    (name, place)
    for name, entry in CHAPTERS
    for _, _, places, _ in entry["headings"]
    for place in places
]


def page(name):
    return (notebooks.root() / name).read_text("utf-8")


def headings(name):
    """The headings of a notebook or page, word for word."""
    path = notebooks.root() / f"{name}.ipynb"
    if path.is_file():
        cells = json.loads(path.read_text("utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    else:
        text = page(f"{name}.md")
    return set(re.findall(r"(?m)^#+ +(.+?) *$", text))


# ── in step ──────────────────────────────────────────────────────────────────────────────
def test_the_page_is_in_step_with_its_data():
    assert page("BOOK.md") == house.book_page(), "run: python tests/house.py sync"


@pytest.mark.parametrize("name", notebooks.written())
def test_each_notebook_ends_with_its_part_of_the_data(name):
    cells = json.loads(page(f"{name}.ipynb"))["cells"]
    marked = [text for c in cells if house.CALLS in (text := "".join(c["source"]))]
    assert len(marked) == 1 and "## Where the printed book differs" in marked[0]
    wanted = house._filled(marked[0], house.CALLS, house.book_calls(name))
    assert marked[0] == wanted, "run: python tests/house.py sync"
    assert f"(BOOK.md#{house._anchor(BOOK[name]['title'])})" in marked[0]


def test_a_changed_row_changes_the_page_and_the_notebook(monkeypatch):
    changed = house.read_book()
    changed["Chapter0"]["calls"][0]["today"] = "something | else"
    monkeypatch.setattr(house, "read_book", lambda: changed)
    before = page("Chapter0.ipynb")
    assert r"something \| else" in house.book_page()
    assert r"something \\| else" in house._notebook_in_step(before, "a/b", "Chapter0")


# ── complete ─────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("name", "entry"), CHAPTERS, ids=[name for name, _ in CHAPTERS])
def test_every_heading_of_the_book_is_covered(name, entry):
    assert [row[0] for row in entry["headings"]] == entry["contents"]
    assert len(set(entry["contents"])) == len(entry["contents"])
    for heading, how, places, note in entry["headings"]:
        assert how in ("here", "differently", "not here"), heading
        assert places or how == "not here", heading
        assert note or places or how == "not here", heading


@pytest.mark.parametrize(("name", "place"), PLACES, ids=[" ".join(pair) for pair in PLACES])
def test_every_place_is_a_heading_of_ours(name, place):
    file, heading = place.split(": ", 1)
    assert heading in headings(file)


def test_sections_in_quotes_exist():
    """What the remarks, numbers and errata name in quotes behind a link."""
    found = re.findall(r"\]\((\w+)\.(?:ipynb|md)[^)]*\), “([^”]+)”", page("BOOK.md"))
    assert len(found) > 100
    assert not [pair for pair in found if pair[1] not in headings(pair[0])]


@pytest.mark.parametrize(("name", "row"), CALLS)
def test_rows_are_of_a_kind_and_name_a_symptom_that_exists(name, row):
    assert row["kind"] in house.WORDS
    assert row.get("symptom", "import_gone") in doctor.SYMPTOMS
    assert ("code" in row) == ("today_code" in row)
    assert "code" not in row or "symptom" in row


def test_what_is_loud_is_told_as_loud():
    """The same call has the same fate in every chapter."""
    kinds = {}
    for _, entry in CHAPTERS:
        for row in entry.get("calls", ()):
            if "symptom" in row:
                kinds.setdefault(row["symptom"], set()).add(row["kind"])
    assert not {symptom: found for symptom, found in kinds.items() if len(found) > 1}


# ── true ─────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(("name", "row"), SNIPPETS)
def test_check_names_the_old_call_and_not_todays(name, row):
    from helpers.course import check

    for text in (row["code"], row["today_code"]):
        assert text.startswith("!") or ast.parse(text).body
    found = {finding.symptom: finding.kind for finding in check.cell(row["code"], old=True)}
    assert found.get(row["symptom"]) == row["kind"], found
    assert not check.cell(row["today_code"]), check.cell(row["today_code"])


def public_modules():
    """Every public module by the last part of its name: 'gguf' -> 'helpers.serving.gguf'."""
    found = {}
    for module in pkgutil.walk_packages(helpers.__path__, "helpers."):
        parts = module.name.split(".")[1:]
        if "exercises" not in parts and not any(part.startswith("_") for part in parts):
            found[parts[-1]] = module.name
    return found


def test_every_function_of_ours_that_the_page_names_exists():
    modules = public_modules()
    words = modules.keys() - {"layer", "ollama", "trainer"}  # of other people's calls, too
    pattern = rf"(?<![\w.])({'|'.join(words)})\.([a-zA-Z_]\w*)"
    named = set(re.findall(pattern, page("BOOK.md")))
    assert len(named) > 30
    missing = [
        f"{module}.{name}"
        for module, name in sorted(named)
        if not hasattr(importlib.import_module(modules[module]), name)
    ]
    assert not missing


def test_the_pins_are_those_of_the_faq():
    def pins(text):
        return set(re.findall(r"\b([\w-]+==[\d.]+\d)", text))

    part = BOOK["parts"][-1]["text"]
    question = page("FAQ.md").split("### How do I run the code as it is printed")[1]
    assert pins(part) == pins(question.split("\n### ")[0]) and len(pins(part)) > 7


def test_the_errata_of_arithmetic():
    def to_fp(sign, exponent, fraction):
        return (-1) ** sign * 2**exponent * (1 + fraction)

    assert (round(to_fp(0, 0.4609375, 4), 2), to_fp(0, 4, 0.4609375)) == (6.88, 23.375)
    assert round(3435e6 / parameters("facebook/opt-350m"), 1) == 10.4


def parameters(name):
    return catalog(name)["parameters"]


def catalog(name):
    text = resources.files("helpers.memory").joinpath("catalog.json").read_text("utf-8")
    return json.loads(text)[name]


def test_the_errata_of_tensors():
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    smallest = torch.tensor(2.0**-133, dtype=torch.bfloat16)
    assert smallest > 0 and smallest / 2 == 0

    torch.manual_seed(0)
    weights = torch.randn(100)
    edges = torch.linspace(weights.min(), weights.max(), 5)
    places = (weights[:, None] > edges).int().argmin(dim=1) - 1
    assert places[weights.argmin()] == -1 and places.to(torch.uint8).max() == 255
    size = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=64, **size)).double()
    opt = OPTForCausalLM(OPTConfig(ffn_dim=64, word_embed_proj_dim=32, dropout=0.0, **size))
    assert not hasattr(opt, "vocab_size")
    for model in (llama, opt.double()):
        assert torch.allclose(*(padded_gradients(model, side) for side in ("left", "right")))

    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = llama(ids).logits
        config = LoraConfig(init_lora_weights=False, target_modules=["q_proj", "v_proj"])
        adapted = get_peft_model(llama, config).eval()
        assert torch.equal(adapted.base_model(ids).logits, adapted(ids).logits)
        assert not torch.allclose(adapted(ids).logits, before)
        with adapted.disable_adapter():
            assert torch.allclose(adapted(ids).logits, before)


def padded_gradients(model, side):
    """All gradients of two rows, of which the shorter one is padded on a side."""
    import torch

    rows, batch = [[5, 6, 7, 8, 9], [10, 11, 12]], {}
    pieces = {
        "input_ids": (lambda row: row, 1),
        "attention_mask": (lambda row: [1] * len(row), 0),
        "labels": (lambda row: [-100, *row[1:]], -100),  # the first has nothing before it
    }
    for name, (content, filling) in pieces.items():
        padding = [[filling] * (5 - len(row)) for row in rows]
        both = [(p, content(row)) for p, row in zip(padding, rows, strict=True)]
        batch[name] = torch.tensor([p + r if side == "left" else r + p for p, r in both])
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_printed_sizes_of_phi_3_add_up():
    shape = catalog("microsoft/Phi-3-mini-4k-instruct")["config"]
    h, ffn, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    codes = layers * (4 * h * h + 3 * h * ffn) / 2  # of the layers, two in a byte
    rest = 2 * (2 * shape["vocab_size"] * h + (2 * layers + 1) * h)  # 16 bits
    adapter = layers * 8 * ((h + 3 * h) + 2 * h + (h + 2 * ffn) + (ffn + h))  # rank 8
    scales = 2 * codes * 0.127 / 8
    rows = BOOK["Chapter0"]["numbers"]
    told = " ".join(" ".join(row) for row in rows)
    for number in (codes + rest, codes, rest, codes + 2 * rest + 4 * adapter):
        assert f"{number / 1e6:,.0f} MB" in told
    assert f"{4 * adapter / 1e6:.0f} MB for the adapter" in told
    assert f"{scales / 1e6:.0f} MB more" in told
    assert f"{(codes + rest + 2 * adapter) / 1e6:,.0f} MB" in told
    assert f"{adapter / 1e6:.2f} million" in told


def test_the_printed_memory_is_what_the_book_prints():
    text = resources.files("helpers.memory").joinpath("book_table.csv").read_text("utf-8")
    printed = {(row["table"], row["peak_mb"]) for row in csv.DictReader(text.splitlines())}
    rows = memory_rows()
    assert len(rows) > 5
    assert not [row for row in rows if (row["table"], str(row["printed"])) not in printed]


def memory_rows():
    return [row for part in BOOK["parts"] for row in part.get("rows", ())]


@pytest.mark.slow
@pytest.mark.parametrize("row", memory_rows(), ids=lambda row: row["run"])
def test_todays_memory_is_what_the_planner_predicts(row):
    from helpers import memory

    usual = {"optimizer": "adamw_torch_fused", "attention": "sdpa", "dtype": "float16"}
    found = memory.estimate_training("facebook/opt-350m", **usual, **row["choices"])
    assert found.peak_bytes / 1e6 == pytest.approx(row["today"], rel=0.03)


@pytest.mark.slow
def test_the_printed_numbers_of_chapters_2_and_3(tmp_path):
    """Random weights of OPT-350M's shape, stored in float16 as its file is."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, OPTConfig

    shape = {k: v for k, v in catalog("facebook/opt-350m")["config"].items() if k != "model_type"}
    ends = {"bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 1}
    make = AutoModelForCausalLM.from_config
    make(OPTConfig(**shape, **ends), dtype=torch.float16).save_pretrained(tmp_path)

    def load(**choices):
        return AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu", **choices)

    full = {"dtype": torch.float32}
    eight = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    nf4 = {"quantization_config": BitsAndBytesConfig(**four)}
    del four["load_in_4bit"]  # as Chapter 5 of the book leaves it out
    unsaid = {"quantization_config": BitsAndBytesConfig(**four)}
    sizes = [
        f"{load(**choices).get_memory_footprint() / 1e6:,.1f} MB"
        for choices in ({}, {"dtype": torch.float16}, eight, eight | full, nf4 | full)
    ]
    assert sizes == [row[1] for row in BOOK["Chapter2"]["numbers"][:5]]
    assert (
        f"{load(**full).get_memory_footprint() / 1e6:,.1f} MB" in BOOK["Chapter2"]["numbers"][0][0]
    )
    assert "Linear4bit" in {type(module).__name__ for module in load(**unsaid).modules()}

    model = load(**nf4, **full)
    usual = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    more = (
        {},
        {"modules_to_save": ["layer_norm"]},
        {"modules_to_save": ["layer_norm", "embed_tokens"]},
        {"target_modules": ["embed_tokens", "q_proj", "v_proj"]},
    )
    trained = []
    for extra in more:
        adapted = get_peft_model(model, LoraConfig(**usual, **extra))
        trained.append(f"{adapted.get_nb_trainable_parameters()[0]:,}")
        adapted.unload()
    assert trained == [row[1] for row in BOOK["Chapter3"]["numbers"][1:]]


def test_what_still_works_can_be_imported():
    wanted = {
        "accelerate": "init_empty_weights",
        "accelerate.utils.modeling": "find_tied_parameters get_mixed_precision_context_manager",
        "accelerate.utils.operations": "convert_outputs_to_fp32",
        "bitsandbytes.nn": "Linear8bitLt LinearFP4 LinearNF4",
        "peft": "PeftConfig get_layer_status get_model_status prepare_model_for_kbit_training",
        "peft.utils.constants": "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "transformers": "DataCollatorWithPadding DataCollatorForLanguageModeling",
        "transformers.utils": "is_flash_attn_2_available",
    }
    told = " ".join(line for _, entry in CHAPTERS for line in entry["same"])
    for module, names in wanted.items():
        for name in names.split():
            assert hasattr(importlib.import_module(module), name)
            assert name in told
    from peft.utils import constants

    assert "phi3" not in constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
