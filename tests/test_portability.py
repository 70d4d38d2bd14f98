"""What only another machine shows is seen here: the checker, and the course's own code."""

import ast

import nbformat
import portability
import pytest

from helpers.course import notebooks

# Deliberate: (file, kind, words of the line) and why it may stay.
ALLOWED = {
    ("Chapter2", "dtype", "dtype=dtype_name"): "the lesson compares what dtypes cost; a "
    "T4 emulates one small forward",
    ("Chapter2", "dtype", "torch.autocast(here.device, dtype=torch.bfloat16)"): "the lesson is "
    "what autocast does; one small layer",
    ("test_doctor", "script", "Path(sys.executable).parent"): "a PATH for the shell",
    ("Chapter3", "dtype", "model.bfloat16()"): "the lesson: what storing in bfloat16 "
    "costs; one small forward",
    ("test_doctor", "dtype", "bf16=True"): "provokes the error; skipped where a card is",
    ("test_pretend", "device", ""): "provokes the errors that it tests",
    ("test_doctor", "device", "embedding(ids, embedding)"): "provokes the error",
    ("helpers/models", "name", "default_model()"): "what load_model() means by itself",
}


def findings():
    """What is found in the course, and which entries of ALLOWED were needed."""
    folder, found, used = notebooks.root(), [], set()
    for name in notebooks.written():
        found += portability.check_notebook(folder / f"{name}.ipynb")
    for part in ("helpers", "tests"):
        for path in sorted((folder / part).rglob("*.py")):
            found += portability.check_source(path, usual=part == "helpers")
    for finding in list(found):
        for name, kind, words in ALLOWED:
            same = finding.name.endswith((name, f"{name}.py")) and finding.kind == kind
            if same and words in finding.text:
                used.add((name, kind, words))
                found.remove(finding)
    return found, used


@pytest.fixture(scope="module")
def course():
    return findings()


def test_nothing_in_the_course_needs_a_machine_like_this_one(course):
    assert not course[0], "\n" + "\n".join(map(str, course[0]))


def test_no_exception_outlives_its_reason(course):
    assert course[1] == set(ALLOWED)


def kinds(source, usual=True):
    return [finding.kind for finding in portability.check(ast.parse(source), "cell", usual)]


START = """
import copy
here = runtime.start()
model = models.load_model(models.EMBEDDED).eval()
tokenizer = models.load_tokenizer(models.EMBEDDED)
on_cpu = models.load_model(models.EMBEDDED, device="cpu")
ids = tokenizer("Hello")["input_ids"]
"""
# As at e488797, in other words: the cells that stopped readers, and their like.
WRONG = {
    "device": [
        "model(torch.tensor([ids]))",
        "def ask(ids):\n    return model(torch.tensor([ids])).logits[0]\nask(ids)",
        "def never_called(words):\n    return model(torch.tensor([words]))",
        "x = torch.tensor([ids])\npairs = [(x, x)]\n"
        "losses = [model(x, labels=y) for x, y in pairs]",
        "x = torch.tensor([ids]).to(model.device)\nmodel(x, attention_mask=torch.ones(1, 5))",
        "x = torch.full((1, 3), 7)\nwith torch.no_grad():\n    loss = model(input_ids=x).loss",
        "batch = batches.lay_out(rows, tokenizer, 'x').batch\n"
        "inputs = {k: v for k, v in batch.items() if k != 'labels'}\nmodel(**inputs)",
        "model.generate(**tokenizer('Hello', return_tensors='pt'))",
        "trainer = SFTTrainer(on_cpu, args=SFTConfig('x'))\n"
        "trainer.model(**trainer.data_collator(rows))",
        "collate = DataCollatorForLanguageModeling(tokenizer)\nmodel(**collate(rows))",
        "weight = model.get_submodule('head').weight\ntorch.randn(4, 4) @ weight.T",
        "model.lm_head(torch.randn(2, 4))",
        "torch.nn.functional.linear(torch.randn(2, 4), model.lm_head.weight)",
        "x = torch.zeros(3, device=here.device) + torch.tensor([1, 2, 3])",
        "x = torch.arange(9)\nx[torch.tensor([1, 2], device=here.device)]",
        "twin = copy.deepcopy(model)\nif odd:\n    twin = model\ntwin(torch.tensor([ids]))",
        "on_cpu.to('cuda')\non_cpu(torch.tensor([ids]))",
        "model = model.cpu()\nmodel(torch.tensor([ids], device=here.device))",
        "class A:\n    def f(self, model):\n        return model(torch.zeros(1, 2))",
    ],
    "name": [
        "models.load_model()",
        "models.load_model(dtype='float32').eval()",
        "chat.prepare_tokenizer(models.load_tokenizer())",
        "same = name == models.default_model()",
    ],
    "processes": [
        "run = SFTConfig('x', **{'use_cpu': here.device == 'cpu'})\n"
        "for kind, n in (('single', 1), ('fsdp2', 2)):\n"
        "    training.export_recipe('x', args=run, backend=kind, processes=n)",
        "recipes.export_recipe('x', args=SFTConfig('x'), processes=4)",
    ],
    "dtype": [
        "models.load_model(name, dtype='bfloat16')",
        "def load(dtype=None):\n    return models.load_model(name, dtype=dtype)\n"
        "load(torch.bfloat16)",
        "AutoModelForCausalLM.from_pretrained(x, device_map='cuda', dtype=torch.bfloat16)",
        "SFTConfig('x', bf16=True)",
        "model.to(torch.bfloat16)",
        "with torch.autocast(here.device, dtype=torch.bfloat16):\n    pass",
    ],
    "profile": [
        "learning = {'learning_rate': 2e-3 if here.profile == 'cpu' else 2e-4}",
        "SFTConfig('x', learning_rate=1e-3 if more or here.profile == 'gpu' else 3e-3)",
        "small = here.device == 'cpu'\nrate = 3e-3 if small else 3e-4",
        "if here.profile == 'cpu':\n    lr = 3e-3",
        "lr = 1e-3 if torch.cuda.is_available() else 1e-2",
    ],
    "budget": [
        "training.find_max_batch_size(trainer, memory_budget=1.5e9)",
        "budget = 3 * 2**30\nfind_max_batch_size(trainer, memory_budget=budget)",
    ],
    "script": [
        "program = Path(sys.executable).parent / 'trl'",
        "folder = os.path.dirname(sys.executable)",
        "subprocess.run(['accelerate', 'launch', '--config_file', path])",
    ],
    "cores": ["command += ['-j', str(os.cpu_count())]"],
    "extract": ["def f(archive):\n    archive.extractall(folder, filter='data')"],
}


@pytest.mark.parametrize(
    ("kind", "source"), [(kind, text) for kind, texts in WRONG.items() for text in texts]
)
def test_a_fault_of_another_machine_is_found(kind, source, monkeypatch):
    monkeypatch.setattr(portability, "all_take_filter", lambda: False)
    assert kinds(START + source) == [kind]


RIGHT = [
    "model(torch.tensor([ids], device=model.device))",
    "model(torch.tensor([ids]).to(model.device), labels=None)",
    "on_cpu(torch.tensor([ids]))\non_cpu.generate(torch.tensor([ids]))",
    "model.to('cpu')\nmodel(torch.tensor([ids]))",
    "if here.device == 'cpu':\n    model(torch.tensor([ids]))",
    "weight = model.lm_head.weight.detach().cpu()\nweight @ torch.randn(4, 4)\n"
    "model(torch.tensor([ids], device=here.device))",
    "model(**tokenizer('Hello', return_tensors='pt').to(model.device))",
    "inputs = {k: v.to(model.device) for k, v in collator(rows).items()}\nmodel(**inputs)",
    "trainer = SFTTrainer(model, args=SFTConfig('x', use_cpu=True))\n"
    "trainer.model(**trainer.data_collator(rows))",
    "logits = model(torch.tensor([ids], device=here.device)).logits\n"
    "logits / torch.tensor(2.0)\nlogits[torch.tensor([0])]\nlogits.argmax().item() + 1",
    "unknown(torch.tensor([ids]))\nmystery = unknown(model)\nmystery(torch.tensor([ids]))",
    "odd = model if maybe else on_cpu\nodd(torch.tensor([ids]))",
    "with torch.device('meta'):\n    empty = LlamaForCausalLM(config)\n"
    "empty(torch.zeros(1, 2, device=here.device))",
    "tiny = LlamaForCausalLM(config)\ntiny(torch.tensor([ids]))",
    "models.load_tokenizer(name)\nmodels.default_model(5)\nmodels.load_model(**choices)",
    "run = SFTConfig('x', use_cpu=True)\nexport_recipe('x', args=run, processes=2)",
    "export_recipe('x', args=SFTConfig('x'), processes=1)",
    "models.load_model(name, dtype=here.compute_dtype)",
    "models.load_model(name, dtype='bfloat16', device='cpu')",
    "SFTConfig('x', bf16=True, use_cpu=True)\nSFTConfig('x', bf16=False)",
    "rate = 3e-3 if name == models.EMBEDDED else 3e-4",
    "rows = 300 if here.profile == 'cpu' else 3000\nmax_steps = rows // 8",
    "training.find_max_batch_size(trainer, memory_budget=1.5 * one_row.peak_bytes)",
    "training.find_max_batch_size(trainer, memory_budget=10**12)",
    "command = [sys.executable, '-m', 'trl.scripts.sft', '--config', path]",
    "names = ['trl', 'peft']\nprint(f'{os.cpu_count()} cores')",
    "if hasattr(tarfile, 'data_filter'):\n    archive.extractall(x, filter='data')",
    "def f(n):\n    return f(n - 1) if n else model(torch.zeros(1, device='cuda'))\nf(3)",
    "on_cpu.load_state_dict(model.state_dict())\non_cpu.lm_head.weight.copy_(model.lm_head.weight)",
]


@pytest.mark.parametrize("source", RIGHT)
def test_what_runs_on_any_machine_is_left_alone(source, monkeypatch):
    monkeypatch.setattr(portability, "all_take_filter", lambda: False)
    assert kinds(START + source) == []


def test_a_notebooks_cells_are_one_program_and_findings_say_where():
    notebook = nbformat.v4.new_notebook()
    cells = [START, "def ask():\n    return model(x)", "x = torch.tensor([ids])", "ask()"]
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("Cells of text count, too."))
    meant = nbformat.v4.new_code_cell("model(x)", metadata={"tags": ["raises-exception"]})
    notebook.cells.append(meant)
    (found,) = portability.check_notebook(notebook, "Chapter9")
    assert (found.cell, found.line, found.kind) == (2, 2, "device")
    assert str(found).startswith("Chapter9 [2], line 2: device: model(x)")
    notebook.cells[3].source += ".to(model.device)"
    assert portability.check_notebook(notebook) == []


def test_parameters_called_model_are_on_the_card_in_the_library_only():
    source = "def probe(model):\n    return model(torch.zeros(1, 4))"
    assert kinds(source) == ["device"]
    assert kinds(source, usual=False) == []


def test_a_python_that_takes_filter_needs_no_question(monkeypatch):
    source = "archive.extractall(folder, filter='data')"
    for newer, expected in ((False, ["extract"]), (True, [])):
        monkeypatch.setattr(portability, "all_take_filter", lambda newer=newer: newer)
        assert kinds(source) == expected
