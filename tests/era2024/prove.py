"""Runs these notebooks' cells on whatever is installed, and says which fail.

    python tests/era2024/prove.py run old.json --beside   with those of 2024
    python tests/era2024/prove.py run new.json            with today's
    python tests/era2024/prove.py compare old.json new.json

A cell that fails for one keyword or one name is run again without it, so that
the next fault of the same cell is seen, too. What fails only because an earlier
cell did is told as such. --beside: helper_functions.py lies beside the
notebooks, as it did then.
The versions of 2024 that resolve together stand in requirements-2024.txt.
"""

import argparse
import ast
import contextlib
import io
import json
import logging
import os
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
BESIDE = HERE / "beside"
SHELL = re.compile(r"^\s*(?:[\w., ]+=\s*)?[!%]")
RENAMED = {
    "SFTConfig": {
        "max_seq_length": "max_length",
        "evaluation_strategy": "eval_strategy",
    },
    "SFTTrainer": {"tokenizer": "processing_class"},
}
TRIES = 12
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n"
    "{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n"
    "{% else %}{{ eos_token }}{% endif %}"
)
SENTENCES = (
    "The train to the coast leaves early and arrives late in the evening.",
    "TRAIN TO COAST LEAVES EARLY STOP ARRIVES LATE STOP",
    "Our parcel was opened at the border, and two books are missing.",
    "PARCEL OPENED AT BORDER STOP TWO BOOKS MISSING STOP",
)


def make_base(folder):
    """A tiny Llama of random bfloat16 weights, a tokenizer and a template."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
    )

    special = [
        "<unk>",
        "<s>",
        "</s>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|end|>",
    ]
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def cells(path):
    """The code cells of a notebook."""
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            yield "".join(cell["source"])


def python_of(source):
    """A cell without what it hands to the shell."""
    lines, more = [], False
    for line in source.splitlines():
        taken = more or bool(SHELL.match(line))
        more = taken and line.rstrip().endswith("\\")
        if not taken:
            lines.append(line)
    return "\n".join(lines)


class Without(ast.NodeTransformer):
    """Takes a keyword out of all calls, or a name out of all imports."""

    def __init__(self, keyword=None, new=None, name=None, on_cpu=False):
        self.keyword, self.new, self.name, self.on_cpu = (
            keyword,
            new,
            name,
            on_cpu,
        )
        self.done = False

    def visit_Call(self, node):
        self.generic_visit(node)
        if self.on_cpu and getattr(node.func, "id", "") in (
            "SFTConfig",
            "TrainingArguments",
        ):
            node.keywords.append(ast.keyword("use_cpu", ast.Constant(True)))
            self.done = True
        for word in [
            w for w in node.keywords if w.arg == self.keyword and self.keyword
        ]:
            self.done = True
            if self.new:
                word.arg = self.new
            else:
                node.keywords.remove(word)
        return node

    def visit_ImportFrom(self, node):
        if self.name and (
            self.name == node.module or node.module.startswith(f"{self.name}.")
        ):
            self.done = True
            return ast.Pass()
        kept = [alias for alias in node.names if alias.name != self.name]
        self.done |= len(kept) < len(node.names)
        node.names = kept
        return node if kept else ast.Pass()


def mended(source, error):
    """The cell without what the error names, or None."""
    text = str(error)
    if isinstance(error, TypeError) and (
        m := re.search(r"unexpected keyword argument '(\w+)'", text)
    ):
        change = Without(keyword=m[1])
    elif "You need to assign use_cpu" in text:
        change = Without(on_cpu=True)
    elif "is not a valid OptimizerNames" in text:
        change = Without(keyword="optim")
    elif (
        isinstance(error, ModuleNotFoundError)
        and error.name == "helper_functions"
    ):
        sys.path.insert(0, str(BESIDE))
        return source
    elif isinstance(error, ModuleNotFoundError):
        change = Without(name=error.name)
    elif isinstance(error, ImportError) and (
        m := re.search(r"cannot import name '(\w+)'", text)
    ):
        change = Without(name=m[1])
    else:
        return None
    tree = change.visit(ast.parse(source))
    return ast.unparse(ast.fix_missing_locations(tree)) if change.done else None


class Said(logging.Handler):
    """Keeps what the libraries log."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def short(error):
    """Type and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


def run_cell(source, names, lost):
    """Errors, warnings, output of a cell; names it fails to make go to lost."""
    from transformers.utils import logging as theirs

    getattr(
        theirs.warning_once, "cache_clear", list
    )()  # each cell hears it anew
    errors, said, output = [], Said(), io.StringIO()
    watched = [
        logging.getLogger(name)
        for name in ("transformers", "trl", "peft", "accelerate")
    ]
    for logger in watched:
        logger.addHandler(said)
    code = python_of(source)
    with (
        warnings.catch_warnings(record=True) as caught,
        contextlib.redirect_stdout(output),
    ):
        warnings.simplefilter("always")
        for _ in range(TRIES):
            try:
                exec(compile(code, "<cell>", "exec"), names)
            except NameError as error:
                missing = re.search(r"'(\w+)'", str(error))
                follows = "follows: " if missing and missing[1] in lost else ""
                errors.append(follows + short(error))
            except Exception as error:
                errors.append(short(error))
                if (better := mended(code, error)) is not None:
                    code = better
                    continue
            break
    for logger in watched:
        logger.removeHandler(said)
    if errors:
        bound = {
            n.id
            for n in ast.walk(ast.parse(python_of(source)))
            if isinstance(n, ast.Name)
        }
        imported = {
            (a.asname or a.name)
            for n in ast.walk(ast.parse(python_of(source)))
            if isinstance(n, ast.Import | ast.ImportFrom)
            for a in n.names
        }
        lost |= (bound | imported) - set(names)
    heard = [
        f"{w.category.__name__}: {str(w.message).splitlines()[0][:200]}"
        for w in caught
    ]
    heard += [
        f"log: {line.splitlines()[0][:200]}" for line in said.lines if line
    ]
    return {
        "errors": errors,
        "warnings": list(dict.fromkeys(heard)),
        "output": output.getvalue()[-4000:],
    }


def run(names, beside):
    """What happens in each cell of these notebooks."""
    work = Path(tempfile.mkdtemp(prefix="era2024-"))
    base = work / "tiny-llama"
    make_base(base)
    os.environ["BASE_MODEL"] = str(base)
    os.chdir(work)
    results = {}
    for path in sorted(HERE.glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        sys.modules.pop("helper_functions", None)
        sys.path[:] = [place for place in sys.path if place != str(BESIDE)]
        if beside:
            sys.path.insert(0, str(BESIDE))
        space, lost, told = {"__name__": "__main__"}, set(), []
        for number, source in enumerate(cells(path), 1):
            began = time.perf_counter()
            result = run_cell(source, space, lost)
            told.append({"cell": number, **result})
            for error in result["errors"]:
                print(f"{path.stem} [{number}] {error}", file=sys.stderr)
            took = time.perf_counter() - began
            if took > 5:
                print(
                    f"{path.stem} [{number}] took {took:.1f} s", file=sys.stderr
                )
        results[path.stem] = told
    return results


def versions():
    """What is installed."""
    from importlib import metadata

    found = {}
    for name in (
        "torch",
        "transformers",
        "trl",
        "peft",
        "accelerate",
        "datasets",
        "bitsandbytes",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def compare(old, new):
    """A line for each difference between two runs."""
    for name, cells_then in old["notebooks"].items():
        for then, now in zip(cells_then, new["notebooks"][name], strict=True):
            place = f"{name} [{now['cell']}]"
            for error in then["errors"]:
                print(f"{place} then: {error}")
            for error in now["errors"]:
                print(f"{place} now: {error}")
            for line in now["warnings"]:
                if line not in then["warnings"]:
                    print(f"{place} warns now: {line}")
            if then["output"] != now["output"] != "":
                print(f"{place} output then:\n{then['output']}")
                print(f"{place} output now:\n{now['output']}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="do", required=True)
    running = parts.add_parser("run")
    running.add_argument("out", type=Path)
    running.add_argument("names", nargs="*")
    running.add_argument("--beside", action="store_true")
    comparing = parts.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    told = parser.parse_args()
    if told.do == "compare":
        compare(
            *(
                json.loads(path.read_text("utf-8"))
                for path in (told.old, told.new)
            )
        )
        return
    out = told.out.resolve()
    os.environ.update(
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        WANDB_DISABLED="true",
    )
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="era2024-home-")
    found = {"versions": versions(), "notebooks": run(told.names, told.beside)}
    out.write_text(
        json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )


if __name__ == "__main__":
    main()
