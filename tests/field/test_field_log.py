"""Every input's test says its kind and its thread."""

import ast

import pytest
from field_log import HERE, KINDS, entries


@pytest.mark.parametrize("path", sorted(HERE.glob("test_field_[!l]*.py")), ids=lambda p: p.stem)
def test_every_test_says_its_kind_and_its_thread(path):
    tests = {
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    logged = [entry for entry in entries() if entry[3] == path.name]
    assert tests and tests == {name for *_, name in logged}
    for kind, threads, given, *_ in logged:
        assert kind in KINDS
        for thread in threads.split(", "):
            repository, _, number = thread.partition("#")
            assert thread == "own" or (repository and number.isdigit()), thread
        assert given and not set(given) & set("`|\n")


def test_readme_counts_them():
    logged = list(entries())
    threads = {thread for _, told, *_ in logged for thread in told.split(", ")} - {"own"}
    page = (HERE.parents[1] / "README.md").read_text("utf-8")
    assert f"{len(logged)} tests hold them to the right value, with {len(threads)} public" in page
