"""The log of inputs from the field, read off the tests themselves: thread, input, test."""

import ast
from pathlib import Path

HERE = Path(__file__).parent
KINDS = {
    "each": "A check made for one shape of input, trusted for all",
    "refused": "What a file, a formula or a recipe cannot say was dropped in silence",
    "child": "A child process judged by its return code",
    "pasted": "A message that is only found as Python prints it",
    "kept": "Inputs that have always been right, and stay so",
}


def entries():
    """(kind, threads, input, file, test) of every test marked `field`, in the file's order."""
    for path in sorted(HERE.glob("test_*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            for mark in getattr(node, "decorator_list", []):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.field":
                    threads, given = map(ast.literal_eval, mark.args)
                    yield node.name.split("_")[1], threads, given, path.name, node.name


def table():
    """The Markdown of README's log, a table for each kind."""
    parts = []
    rows = list(entries())
    for kind, meaning in KINDS.items():
        lines = [
            f"| {threads} | {given} | [`{test}`]({file}) |"
            for which, threads, given, file, test in rows
            if which == kind
        ]
        if lines:
            head = f"### `test_{kind}_…`: {meaning[0].lower()}{meaning[1:]}"
            parts.append(
                "\n".join([head, "", "| Thread | Input | Test |", "|---|---|---|", *lines])
            )
    return "\n\n".join(parts)
