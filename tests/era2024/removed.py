"""Writes helpers/course/check/removed.txt: methods of 2023 and 2024 now gone.

    python tests/era2024/removed.py names then.json    with versions of then
    python tests/era2024/removed.py names now.json     with today's
    python tests/era2024/removed.py write now.json then.json older.json

Run by hand, when a pin moves. A name is written when a class had such a method
then and neither that class nor any other in the list has it now. Properties are
not methods.
"""

import argparse
import inspect
import json
import sys
from importlib import import_module, metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
OUT = ROOT / "helpers" / "course" / "check" / "removed.txt"
LIBRARIES = ("transformers", "trl", "peft")
CLASSES = {
    "transformers": (
        "PreTrainedModel",
        "GenerationMixin",
        "PreTrainedTokenizerBase",
        "PreTrainedTokenizer",
        "PreTrainedTokenizerFast",
        "Trainer",
        # Some of that time's models: what they had beyond the first two.
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "PhiForCausalLM",
        "FalconForCausalLM",
        "OPTForCausalLM",
        "GPT2LMHeadModel",
        "T5ForConditionalGeneration",
        "BertModel",
    ),
    "peft": ("PeftModel", "PeftModelForCausalLM", "LoraModel"),
    "trl": ("SFTTrainer",),
}


def methods(thing):
    """The public methods of a class, its parents' among them."""
    found = set()
    for name in dir(thing):
        if name.startswith("_"):
            continue
        try:
            kept = inspect.getattr_static(thing, name)
        except AttributeError:
            continue
        if isinstance(kept, (staticmethod, classmethod)) or inspect.isroutine(
            kept
        ):
            found.add(name)
    return sorted(found)


def names():
    """{class: its methods} of what is installed, and the versions."""
    found = {}
    for library, classes in CLASSES.items():
        for name in classes:
            try:
                found[name] = methods(getattr(import_module(library), name))
            except (ImportError, AttributeError) as error:
                print(f"{library}.{name}: {error}", file=sys.stderr)
    versions = {library: metadata.version(library) for library in LIBRARIES}
    return {"versions": versions, "classes": found}


def gone(now, *then):
    """Names that a class had in an older version and no class has now."""
    had, still = set(), set().union(*now["classes"].values())
    for old in then:
        for name, listed in old["classes"].items():
            if name in now["classes"]:
                had |= set(listed) - set(now["classes"][name])
    return sorted(had - still)


def write(now, *then):
    """The file, with the versions that were compared in its first line."""
    told = " and ".join(_versions(old) for old in then)
    made = "# made by tests/era2024/removed.py from"
    head = f"{made} {told}; gone in {_versions(now)}"
    OUT.write_text("\n".join([head, *gone(now, *then)]) + "\n", "utf-8")


def _versions(listed):
    return ", ".join(
        f"{name} {version}" for name, version in listed["versions"].items()
    )


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("do", choices=("names", "write"))
    parser.add_argument("files", nargs="+", type=Path)
    told = parser.parse_args()
    if told.do == "names":
        text = json.dumps(names(), indent=1) + "\n"
        told.files[0].write_text(text, "utf-8")
    else:
        write(*(json.loads(path.read_text("utf-8")) for path in told.files))


if __name__ == "__main__":
    main()
