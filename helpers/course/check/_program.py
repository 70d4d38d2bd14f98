"""What the names in a piece of code stand for: the libraries' own objects, nothing run.

Names are followed through imports and assignments to modules, classes and functions; what a
call gives is `_values`' to say.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from helpers.course.check import _values as values
from helpers.course.check._examples import USUAL, usual
from helpers.course.check._lines import names
from helpers.course.check._values import FOREIGN, LIBRARIES, UNKNOWN, Derived, Method, Parameter

SAME = ("eval", "train", "to", "cpu", "cuda", "float", "half", "bfloat16", "requires_grad_")
# What a notebook, a module or a class body has without binding it.
_ALWAYS = set(
    names(
        "display get_ipython In Out _ __ __file__ __path__ __class__ __builtins__ __qualname__ "
        "exit quit reveal_type"
    )
)
Scope = ast.AST


@dataclass(frozen=True)
class Missing:
    """An import or an attribute that is not there; `error` is what Python will say."""

    node: ast.AST
    name: str
    error: str


class Program:
    """The names of one source: `value(node)` says what an expression stands for."""

    def __init__(self, tree: ast.Module) -> None:
        self.tree = tree
        self.missing: list[Missing] = []
        self._names: dict[Scope, dict[str, list[tuple[tuple[int, int], Any]]]] = {}
        self.above: dict[ast.AST, tuple[ast.AST, Scope]] = {}
        self._values: dict[ast.AST, Any] = {}
        self._open: set[ast.AST] = set()
        self._absent: set[str] = set()
        self._bind(tree, tree)

    # ── who is bound to what, and where ──────────────────────────────────────────────────
    def _bind(self, node: ast.AST, scope: Scope) -> None:
        names = self._names.setdefault(scope, {})

        def bind(name: str, value: Any, at: ast.AST) -> None:
            names.setdefault(name, []).append((_end(at), value))

        for child in ast.iter_child_nodes(node):
            self.above[child] = (node, scope)
            inner = scope
            match child:
                case ast.Import(names=aliases):
                    for alias in aliases:
                        first = alias.name if alias.asname else alias.name.split(".")[0]
                        self.above[alias] = (child, scope)
                        bind(alias.asname or first, self._module(alias, alias.name, first), child)
                case ast.ImportFrom(module=str(module), names=aliases, level=0):
                    for alias in aliases:
                        self.above[alias] = (child, scope)
                        found = self._imported(alias, module, alias.name)
                        bind(alias.asname or alias.name, found, child)
                case ast.ImportFrom(names=aliases):
                    for alias in aliases:
                        bind(alias.asname or alias.name, FOREIGN, child)
                case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                    bind(name, child, child)
                    inner = child
                case ast.Lambda():
                    inner = child
                case ast.ClassDef(name=name):
                    bind(name, child, child)
                    inner = child
                case ast.arg(arg=name):
                    bind(name, Parameter(name), child)
                case ast.Assign(targets=targets, value=value):
                    for target in targets:
                        self._assign(bind, target, value, child)
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                    bind(name, value, child)
                case ast.NamedExpr(target=ast.Name(id=name), value=value):
                    bind(name, value, child)
                case ast.With(items=items) | ast.AsyncWith(items=items):
                    for item in items:
                        if isinstance(item.optional_vars, ast.Name):
                            bind(item.optional_vars.id, item.context_expr, item.optional_vars)
                case ast.For(target=target) | ast.comprehension(target=target):
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            bind(part.id, UNKNOWN, part)
                case ast.AugAssign(target=ast.Name(id=name)):
                    bind(name, UNKNOWN, child)
                case ast.ExceptHandler(name=str(name)):
                    bind(name, UNKNOWN, child)
            self._names.setdefault(inner, {})
            self._bind(child, inner)

    def _assign(self, bind: Any, target: ast.expr, value: ast.expr, at: ast.AST) -> None:
        match target, value:
            case ast.Name(id=name), _:
                bind(name, value, at)
            case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                for one, part in zip(names, values, strict=True):
                    self._assign(bind, one, part, at)
            case ((ast.Tuple(elts=names) | ast.List(elts=names)), _):
                for one in names:
                    if isinstance(one, ast.Name):
                        bind(one.id, UNKNOWN, at)

    def _module(self, node: ast.AST, name: str, wanted: str) -> Any:
        top = name.split(".")[0]
        if top not in LIBRARIES:
            return self._elsewhere(node, name)
        try:
            importlib.import_module(name)
            return importlib.import_module(wanted)
        except Exception as error:  # whatever a library does when its parts are missing
            self._miss(node, name, f"{type(error).__name__}: {error}")
            return FOREIGN

    def _imported(self, node: ast.AST, module: str, name: str) -> Any:
        if module.split(".")[0] not in LIBRARIES:
            return self._elsewhere(node, module)
        try:
            home = importlib.import_module(module)
        except Exception as error:  # as above; said once for all names
            self._miss(self.above[node][0], module, f"{type(error).__name__}: {error}")
            return FOREIGN
        if name == "*":
            return UNKNOWN
        try:
            return getattr(home, name)
        except AttributeError:
            pass
        except Exception as error:  # a lazy module that fails at its part
            self._miss(node, name, f"{type(error).__name__}: {error}")
            return FOREIGN
        try:
            return importlib.import_module(f"{module}.{name}")
        except ImportError:
            self._miss(node, name, f"ImportError: cannot import name '{name}' from '{module}'")
            return values.successor(name)  # what else is wrong with its calls?

    def _elsewhere(self, node: ast.AST, name: str) -> Any:
        # Only the namespace `google` is entered: looking deeper would run what lies there.
        top = "google.colab" if name.startswith("google.colab") else name.split(".")[0]
        try:
            there = top == "__main__" or find_spec(top) is not None
        except (ImportError, ValueError):
            there = False
        if not there and top not in self._absent:  # brought once, it is there for all
            self._absent.add(top)
            self._miss(node, top, f"ModuleNotFoundError: No module named '{top}'")
        return FOREIGN

    def _miss(self, node: ast.AST, name: str, error: str) -> None:
        if not self.guarded(node):
            self.missing.append(Missing(node, name, error))

    def guarded(self, node: ast.AST) -> bool:
        """Whether the code itself expects this import or name to fail."""
        while node in self.above:
            node, child = self.above[node][0], node
            if isinstance(node, ast.Try) and child in node.body:
                caught = {n.id for h in node.handlers for n in _names(h.type)}
                bare = any(handler.type is None for handler in node.handlers)
                if bare or caught & {"ImportError", "ModuleNotFoundError", "Exception"}:
                    return True
        return False

    # ── what an expression is ────────────────────────────────────────────────────────────
    def unbound(self) -> Iterator[ast.Name]:
        """The first use of each name that nothing binds."""
        nodes = list(ast.walk(self.tree))
        if any(isinstance(n, ast.alias) and n.name == "*" for n in nodes):
            return
        bound = {name for names in self._names.values() for name in names}
        bound |= {n.id for n in nodes if isinstance(n, ast.Name) and not _loads(n)}
        bound |= {part for n in nodes for part in getattr(n, "names", ()) if isinstance(part, str)}
        bound |= {n.name for n in nodes if isinstance(n, ast.MatchAs | ast.MatchStar) and n.name}
        bound |= set(dir(builtins)) | _ALWAYS
        for node in sorted((n for n in nodes if isinstance(n, ast.Name)), key=_start):
            if node.id not in bound:
                bound.add(node.id)
                yield node

    def scope(self, node: ast.AST) -> Scope:
        """The module, function or class that a node stands in."""
        return self.above[node][1] if node in self.above else self.tree

    def binding(self, name: str, node: ast.AST) -> tuple[Any, bool]:
        """What a name was last bound to before a place; False where it is not bound."""
        use, inner = _start(node), self.scope(node)
        scope = inner
        while True:
            if found := self._names[scope].get(name):
                before = [bound for bound in found if bound[0] <= use]
                if before or scope is not inner:
                    return (before or found)[-1][1], True
            if scope is self.tree:
                return UNKNOWN, False
            scope = self.scope(scope)

    def value(self, node: ast.AST) -> Any:
        """A module, class or function, an `Instance`, a `Method`, or UNKNOWN."""
        if node in self._values:
            return self._values[node]
        if node in self._open:  # x = x.to(...) in a loop
            return UNKNOWN
        self._open.add(node)
        try:
            found = self._value(node)
        finally:
            self._open.discard(node)
        self._values[node] = found
        return found

    def _value(self, node: ast.AST) -> Any:
        match node:
            case ast.Name(id=name):
                bound, there = self.binding(name, node)
                if isinstance(bound, Parameter) or not there:
                    return usual(name) if name in USUAL else values.public(name)
                if isinstance(bound, ast.ClassDef):
                    return self.derived(bound)
                if isinstance(bound, ast.FunctionDef | ast.AsyncFunctionDef):
                    return UNKNOWN
                return self.value(bound) if isinstance(bound, ast.AST) else bound
            case ast.Attribute(value=value, attr=attr):
                return values.attribute(self.value(value), attr)
            case ast.Call():
                return self._made(node)
            case ast.Subscript(value=value):
                return values.item(self.value(value))
            case ast.IfExp(body=body, orelse=other):
                return self.value(body) or self.value(other)
            case ast.Await(value=value):
                return UNKNOWN
        return UNKNOWN

    def derived(self, node: ast.ClassDef) -> Any:
        """A class of the code's own: the library's class that it is derived from."""
        bases = [self.value(base) for base in node.bases]
        kinds = [base for base in bases if inspect.isclass(base)]
        kinds += [base.base for base in bases if isinstance(base, Derived)]
        return Derived(node, kinds[0]) if kinds and values.known(kinds[0]) else UNKNOWN

    def _made(self, node: ast.Call) -> Any:
        target = self.value(node.func)
        if isinstance(target, Derived):
            return UNKNOWN  # what its own methods add is not followed
        if isinstance(target, Method):
            if target.name in SAME and values.is_module(target.owner):
                return target.owner
            if target.name == "train_test_split":
                return values.usual_datasets()
            if target.name in ("merge_and_unload", "unload"):
                return usual("model")
        if target is None or target is FOREIGN:
            return UNKNOWN
        return values.result(target, {word.arg for word in node.keywords})


# ── small things ─────────────────────────────────────────────────────────────────────────
def _loads(node: ast.Name) -> bool:
    return isinstance(node.ctx, ast.Load)


def _start(node: ast.AST) -> tuple[int, int]:
    return node.lineno, node.col_offset  # type: ignore[attr-defined]


def _end(node: ast.AST) -> tuple[int, int]:
    return node.end_lineno, node.end_col_offset  # type: ignore[attr-defined]


def _names(node: ast.AST | None) -> list[ast.Name]:
    return [n for n in ast.walk(node) if isinstance(n, ast.Name)] if node else []
