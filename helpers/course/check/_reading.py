"""The calls of a whole program, as the patterns look at them."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from helpers.course.check import _calls
from helpers.course.check._examples import Instance
from helpers.course.check._program import Program
from helpers.course.check._values import Derived, Method


@dataclass(frozen=True)
class Hit:
    """A place, what happens there and the symptom that tells it.

    needs: a package that is not installed; where the notebook brings it, nothing happens.
    """

    node: ast.AST
    kind: str
    symptom: str
    word: str
    needs: str = ""


class Reading:
    """The calls of a program, found once for all patterns."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes = list(ast.walk(program.tree))
        self.calls = [node for node in self.nodes if isinstance(node, ast.Call)]

    def named(self, *names: str) -> Iterator[tuple[ast.Call, dict[str, ast.AST]]]:
        """Calls of functions, methods or classes (or what is derived from them) by name."""
        for node in self.calls:
            target = self.program.value(node.func)
            target = target.base if isinstance(target, Derived) else target
            name = target.name if isinstance(target, Method) else getattr(target, "__name__", "")
            if name in names and target is not None:
                yield node, _calls.words_of(self.program, node)[0]

    def methods(self, *names: str) -> Iterator[ast.Call]:
        """Calls of anything's method, known or not, by name."""
        for node in self.calls:
            if isinstance(node.func, ast.Attribute) and node.func.attr in names:
                yield node

    def constant(self, node: ast.AST | None) -> Any:
        """The value of a keyword or an expression that is a plain constant; else None."""
        if isinstance(node, ast.keyword):
            node = node.value
        if isinstance(node, ast.Name):
            bound, _ = self.program.binding(node.id, node)
            node = bound if isinstance(bound, ast.AST) else node
        return node.value if isinstance(node, ast.Constant) else None

    @cached_property
    def trains(self) -> bool:
        """Whether an SFTTrainer is made."""
        return any(True for _ in self.named("SFTTrainer"))

    @cached_property
    def trains_all_tokens(self) -> bool:
        """Whether some config says that prompts are trained as well."""
        return any(
            self.constant(words.get("completion_only_loss")) is False
            for _, words in self.named("SFTConfig")
        )

    def columns_of(self, node: ast.AST | None, depth: int = 9) -> set[str] | None:
        """The columns of a data set that the code makes itself; None where not to be seen."""
        node = node.value if isinstance(node, ast.keyword) else node
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute) or not depth:
            return None
        given = [a.left if isinstance(a, ast.BinOp) else a for a in node.args]  # [row] * 4
        match node.func.attr, given:
            case "from_list", [ast.ListComp(elt=ast.Dict(keys=keys))]:
                return {str(self.constant(key)) for key in keys}
            case "from_list", [ast.List(elts=[ast.Dict(keys=keys), *_])]:
                return {str(self.constant(key)) for key in keys}
            case "from_dict", [ast.Dict(keys=keys)]:
                return {str(self.constant(key)) for key in keys}
            case "rename_column", [old, new]:
                before = self.columns_of(node.func.value, depth - 1)
                if before is not None:
                    return before - {self.constant(old)} | {str(self.constant(new))}
            case "select" | "shuffle", _:
                return self.columns_of(node.func.value, depth - 1)
            case "map", [function, *_]:
                made = self._returned_keys(function)
                removed = next((k.value for k in node.keywords if k.arg == "remove_columns"), None)
                if made is not None and isinstance(removed, ast.Attribute):
                    return made  # remove_columns=rows.column_names
                before = self.columns_of(node.func.value, depth - 1)
                if made is not None and before is not None:
                    gone = removed.elts if isinstance(removed, ast.List) else [removed]
                    return before - {self.constant(one) for one in gone} | made
        return None

    def _returned_keys(self, node: ast.AST) -> set[str] | None:
        """The keys of the dictionary that a function gives, where it shows."""
        function = self.function(node)
        body = function.body if function is not None else None
        if isinstance(body, list):
            returned = [
                n.value for part in body for n in ast.walk(part) if isinstance(n, ast.Return)
            ]
            body = returned[0] if len(returned) == 1 else None
        if not isinstance(body, ast.Dict):
            return None
        return {str(self.constant(key)) for key in body.keys}

    @cached_property
    def columns(self) -> dict[str, tuple[ast.AST, ast.AST | None]]:
        """Columns that the code makes: name -> (place, value where it is to be seen)."""
        found: dict[str, tuple[ast.AST, ast.AST | None]] = {}
        for node in self.nodes:
            match node:
                case ast.Dict(keys=keys, values=values):
                    for key, value in zip(keys, values, strict=True):
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            found.setdefault(key.value, (node, value))
                case ast.Assign(targets=[ast.Subscript(slice=ast.Constant(value=str(name)))]):
                    found.setdefault(name, (node, node.value))
                case ast.Call(func=ast.Attribute(attr="rename_column"), args=[_, new]):
                    if isinstance(name := self.constant(new), str):
                        found[name] = (node, None)
                case ast.Call(func=ast.Attribute(attr="add_column"), args=[new, *_]):
                    if isinstance(name := self.constant(new), str):
                        found[name] = (node, None)
                case ast.Call(func=ast.Attribute(attr="rename_columns"), args=[ast.Dict() as to]):
                    for value in to.values:
                        if isinstance(name := self.constant(value), str):
                            found[name] = (node, None)
        return found

    def is_bare_text(self, node: ast.AST | None) -> bool:
        """Whether a column's value is text without words of a template of its own."""
        if isinstance(node, ast.Name):
            bound, _ = self.program.binding(node.id, node)
            node = bound if isinstance(bound, ast.AST) else node
        match node:
            case ast.List() | ast.ListComp() | ast.Tuple() | ast.Subscript(slice=ast.Slice()):
                return False
            case ast.JoinedStr(values=parts):
                words = [part.value for part in parts if isinstance(part, ast.Constant)]
                return not any(char.isalpha() for char in "".join(map(str, words)))
        return True

    def function(self, node: ast.AST | None) -> ast.FunctionDef | ast.Lambda | None:
        """The function that a keyword's value is, where the code defines it."""
        node = node.value if isinstance(node, ast.keyword) else node
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        return node if isinstance(node, ast.FunctionDef | ast.Lambda) else None

    def is_cache(self, node: ast.AST) -> bool:
        """Whether an expression is a model's cache of keys and values."""
        if isinstance(node, ast.Name):
            node = self.program.binding(node.id, node)[0]
        return isinstance(node, ast.Attribute) and node.attr == "past_key_values"

    def is_within(self, node: ast.AST, method: str) -> bool:
        """Whether a node stands in a `with thing.method():`."""
        while node in self.program.above:
            node = self.program.above[node][0]
            for item in node.items if isinstance(node, ast.With) else ():
                call = item.context_expr
                if getattr(getattr(call, "func", None), "attr", "") == method:
                    return True
        return False

    def uses(self, node: ast.Call) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Where the result of a call goes: (what stands around it, the expression)."""
        above = self.program.above[node][0]
        if isinstance(above, ast.Attribute) and above.attr in ("to", "cuda"):  # …(…).to(device)
            call = self.program.above[above][0]
            if isinstance(call, ast.Call):
                yield from self.uses(call)
                return
        if isinstance(above, ast.Assign) and isinstance(above.targets[0], ast.Name):
            name = above.targets[0].id
            for other in self.nodes:
                if (
                    isinstance(other, ast.Name)
                    and other.id == name
                    and isinstance(other.ctx, ast.Load)
                    and self._bound_to(other, node)
                ):
                    yield self.program.above[other][0], other
        else:
            yield above, node

    def _bound_to(self, name: ast.Name, call: ast.Call) -> bool:
        bound, _ = self.program.binding(name.id, name)
        return isinstance(bound, ast.AST) and call in ast.walk(bound)


def config_of(code: Reading, words: dict[str, ast.AST]) -> dict[str, ast.AST] | None:
    """The keywords of a trainer's config; None where they cannot be seen."""
    given = words.get("args")
    node = given.value if isinstance(given, ast.keyword) else None
    if isinstance(node, ast.Name):
        node = code.program.binding(node.id, node)[0]
    return _calls.words_of(code.program, node)[0] if isinstance(node, ast.Call) else None


def is_adapted(code: Reading, node: ast.Call, words: dict[str, ast.AST]) -> bool:
    from peft import PeftModel

    model = words.get("model", node.args[0] if node.args else None)
    found = code.program.value(model.value if isinstance(model, ast.keyword) else model)  # type: ignore[arg-type]
    return isinstance(found, Instance) and issubclass(found.kind, PeftModel)


PATTERNS: list[Callable[[Reading], Iterator[Hit]]] = []


def pattern(function: Callable[[Reading], Iterator[Hit]]) -> Callable[[Reading], Iterator[Hit]]:
    """Register a pattern."""
    PATTERNS.append(function)
    return function
