"""Reads our code's calls into the field's libraries; holds them against what is installed.

A type checker (test_types) sees wrong keywords of what is typed. This sees the rest: keys
behind `**`, what a `**kwargs` takes, objects that nobody annotates, and deprecations.
Nothing is run: names are followed through imports and assignments to the real objects, and
methods are looked up on small real examples (a model, a tokenizer, a trainer, a dataset).
"""

import ast
import importlib
import inspect
import re
import typing
from dataclasses import dataclass

import nbformat
import torch

LIBRARIES = ("transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
FOLLOWED = (*LIBRARIES, "helpers")  # helpers make models and tokenizers
SAME = ("eval", "train", "to", "cpu", "float", "half", "bfloat16", "requires_grad_")  # self
OLD = ("torch_dtype",)  # still taken, with a word in the log; the docstrings are silent
STARRED = object()


def cells(path):
    """The source of a notebook's cells, without those that are meant to fail."""
    return "\n".join(
        cell.source
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code" and "raises-exception" not in cell.metadata.get("tags", [])
    )


@dataclass(frozen=True)
class Call:
    """One call whose target is known: its place, its text and what it gives."""

    place: str
    text: str
    targets: tuple
    positional: int
    keywords: tuple[str, ...]
    complete: bool  # no * or ** whose contents are unknown

    @property
    def owner(self):
        return owner(self.targets[0])


def owner(thing):
    """The package an object comes from."""
    thing = getattr(thing, "__func__", thing)
    if not (inspect.isroutine(thing) or inspect.isclass(thing) or inspect.ismodule(thing)):
        thing = type(thing)  # an instance that is called
    module = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    return module.split(".")[0]


class Reader:
    """The calls of one file.

    examples: {kind: [objects]}. makers: {function: kind of what it returns}. usual: names
    of parameters that always hold a kind.
    """

    def __init__(self, name, source, examples, makers, usual):
        self.name, self.examples, self.makers, self.usual = name, examples, makers, usual
        self.calls, self.problems = [], []
        self.tree = ast.parse(source)
        self.scopes, self.parents = {}, {}
        self._bind(self.tree, self.tree)
        self._visit(self.tree)

    # ── who is bound to what, and where ──────────────────────────────────────────────────
    def _bind(self, node, scope):
        bound = self.scopes.setdefault(scope, {})

        def bind(name, value, at):
            bound.setdefault(name, []).append((position(at), value))

        for child in ast.iter_child_nodes(node):
            self.parents[child] = (node, scope)
            inner = scope
            match child:
                case ast.Import(names=names):
                    for alias in names:
                        first = alias.name if alias.asname else alias.name.split(".")[0]
                        bind(alias.asname or first, self._module(alias.name, first), child)
                case ast.ImportFrom(module=module, names=names, level=0):
                    for alias in names:
                        found = self._imported(child, module, alias.name)
                        bind(alias.asname or alias.name, found, child)
                case ast.FunctionDef(name=name):
                    bind(name, None, child)
                    inner = child
                    self.scopes[child] = {}
                case ast.ClassDef(name=name):
                    bind(name, None, child)
                case ast.arg(arg=name):
                    bind(name, None, child)
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    bind(name, value, child)
                case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                    for name, value in zip(names, values, strict=False):
                        if isinstance(name, ast.Name):
                            bind(name.id, value, child)
                case ast.NamedExpr(target=ast.Name(id=name), value=value):
                    bind(name, value, child)
                case ast.Name(id=name, ctx=ast.Store()):
                    if not self._is_plain_target(node, child):
                        bind(name, None, child)
            self._bind(child, inner)

    def _is_plain_target(self, node, child):
        if isinstance(node, ast.Assign):
            return node.targets == [child]
        if isinstance(node, ast.Tuple):
            above = self.parents[node][0]
            return isinstance(above, ast.Assign) and isinstance(above.value, ast.Tuple)
        return isinstance(node, ast.NamedExpr)

    def _module(self, name, wanted):
        if name.split(".")[0] not in FOLLOWED:
            return ()
        try:
            importlib.import_module(name)
            return (importlib.import_module(wanted),)
        except ImportError as error:
            self._complain(None, f"import {name}: {error}")

    def _imported(self, node, module, name):
        if module is None or module.split(".")[0] not in FOLLOWED:
            return ()
        try:
            home = importlib.import_module(module)
            if hasattr(home, name):
                return (getattr(home, name),)
            return (importlib.import_module(f"{module}.{name}"),)
        except ImportError:
            self._complain(node, f"{module} has no {name}")

    def _complain(self, node, text):
        line = f":{node.lineno}" if node is not None else ""
        self.problems.append(f"{self.name}{line}: {text}")

    # ── what an expression is ────────────────────────────────────────────────────────────
    def resolve(self, node, scope):
        """The objects an expression may be; () when that is not known."""
        match node:
            case ast.Name(id=name):
                return self._named(name, node, scope)
            case ast.Attribute(value=value, attr=attr):
                found = self.resolve(value, scope)
                parts = [getattr(thing, attr, None) for thing in found]
                return tuple(part for part in parts if part is not None)
            case ast.Call(func=func):
                return self._made(func, scope)
        return ()

    def _binding(self, name, node, scope):
        # The last one before the use; for a name of an outer scope, the last one of all.
        use, inner = position(node, start=True), scope
        while True:
            if found := self.scopes[scope].get(name):
                before = [bound for bound in found if bound[0] <= use]
                if before or scope is not inner:
                    return (before or found)[-1][1], scope
            if scope is self.tree:
                return None, scope
            scope = self.parents[scope][1]

    def _named(self, name, node, scope):
        value, where = self._binding(name, node, scope)
        found = value if isinstance(value, tuple) else ()
        if isinstance(value, ast.AST):
            found = self.resolve(value, where)
        if not found and name in self.usual and not self._is_foreign(value, where):
            found = tuple(self.examples[self.usual[name]])
        return found

    def _is_foreign(self, value, where):
        # What an import from elsewhere makes, such as a Path, is no usual thing.
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name):
            return self._binding(value.func.id, value, where)[0] == ()
        return value == ()

    def _made(self, func, scope):
        if isinstance(func, ast.Attribute) and func.attr in SAME:
            found = self.resolve(func.value, scope)
            return tuple(t for t in found if isinstance(t, torch.nn.Module))
        for target in self.resolve(func, scope):
            kind = self.makers.get(key(target))
            if kind:
                return tuple(self.examples[kind])
        return ()

    def _keys(self, node, scope, depth=9):
        """The keys of what stands behind `**`; None when they are not known."""
        if depth:
            match node:
                case ast.Dict(keys=keys, values=values):
                    parts = [
                        self._keys(value, scope, depth - 1) if key is None else name(key)
                        for key, value in zip(keys, values, strict=True)
                    ]
                    return None if None in parts else set().union(*parts)
                case ast.BinOp(op=ast.BitOr(), left=left, right=right):
                    parts = [self._keys(side, scope, depth - 1) for side in (left, right)]
                    return None if None in parts else set().union(*parts)
                case ast.Call(func=ast.Name(id="dict"), args=[], keywords=given):
                    if all(keyword.arg for keyword in given):
                        return {keyword.arg for keyword in given}
                case ast.Name(id=identifier):
                    value, where = self._binding(identifier, node, scope)
                    if isinstance(value, ast.AST):
                        return self._keys(value, where, depth - 1)
        return None

    # ── the calls ────────────────────────────────────────────────────────────────────────
    def _visit(self, node):
        scope = node if node in self.scopes else self.parents.get(node, (0, self.tree))[1]
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Load):
                self._look_up(child, scope)
            if isinstance(child, ast.Call):
                self._call(child, scope)
            self._visit(child)

    def _look_up(self, node, scope):
        found = self.resolve(node.value, scope)
        if not found or any(hasattr(thing, node.attr) for thing in found):
            return
        parent = self.parents[node][0]
        is_called = isinstance(parent, ast.Call) and parent.func is node
        if not is_called and any(isinstance(thing, torch.nn.Module) for thing in found):
            return  # may be a layer that only this model has
        kind = getattr(found[0], "__name__", type(found[0]).__name__)
        self._complain(node, f"{ast.unparse(node)}: {kind} has no {node.attr}")

    def _call(self, node, scope):
        targets = self.resolve(node.func, scope)
        targets = tuple(t for t in targets if owner(t) in LIBRARIES and callable(t))
        if not targets:
            return
        keywords, complete = [], not any(isinstance(a, ast.Starred) for a in node.args)
        for keyword in node.keywords:
            names = {keyword.arg} if keyword.arg else self._keys(keyword.value, scope)
            complete = complete and names is not None
            keywords += sorted(names or ())
        text = ast.unparse(node)
        self.calls.append(
            Call(
                f"{self.name}:{node.lineno}",
                text if len(text) < 80 else text[:77] + "...",
                targets,
                sum(not isinstance(a, ast.Starred) for a in node.args),
                tuple(keywords),
                complete,
            )
        )


def position(node, start=False):
    """Where a node begins, or ends: (line, column)."""
    if start:
        return node.lineno, node.col_offset
    return node.end_lineno, node.end_col_offset


def name(node):
    """The key of a dict display, as a set; None unless it is a plain string."""
    known = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return {node.value} if known else None


def key(thing):
    """What tells functions and methods apart: bound methods are made anew at each look."""
    return f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', thing)}"


# ── against the installed signatures ─────────────────────────────────────────────────────
def complaint(call, extra, real):
    """What is wrong with a call, '' if any of its targets takes it.

    extra: {key: keywords its ** takes}. real: {key: function whose signature counts}.
    """
    found = [_complaint(call, real.get(key(target), target), extra) for target in call.targets]
    return min(found, key=len)


def _complaint(call, target, extra):
    target = target if inspect.isroutine(target) or inspect.isclass(target) else target.__call__
    if key(target).endswith("Module._wrapped_call_impl"):
        target = target.__self__.forward  # what calling a torch module comes down to
    try:
        signature = inspect.signature(target)
    except ValueError:  # compiled code without one
        return ""
    further = set(extra.get(key(target), ()))
    parameters = signature.parameters.values()
    for parameter in parameters:
        if parameter.kind is parameter.VAR_KEYWORD:
            further |= unpacked(parameter.annotation) | inherited(target)
    parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    named = {p.name for p in parameters if p.kind is not p.VAR_POSITIONAL}
    unknown = [word for word in call.keywords if word not in named | further]
    if unknown:
        return f"{call.place}: {call.text} does not take {', '.join(unknown)}"
    words = {word: STARRED for word in call.keywords if word in named}
    strict = signature.replace(parameters=parameters)
    try:
        bind = strict.bind if call.complete else strict.bind_partial
        bind(*[STARRED] * call.positional, **words)
    except TypeError as error:
        return f"{call.place}: {call.text}: {error}"
    if old := [word for word in call.keywords if word in OLD or is_old(target, word)]:
        return f"{call.place}: {call.text}: {', '.join(old)} is deprecated"
    if is_old(target):
        return f"{call.place}: {call.text}: deprecated"
    return ""


def unpacked(annotation):
    """The keywords of `**kwargs: Unpack[SomeTypedDict]`."""
    inside = typing.get_args(annotation)
    return set().union(*(part.__required_keys__ | part.__optional_keys__ for part in inside))


def inherited(target):
    """The keywords that a class hands on to the class it is derived from."""
    bases = target.__mro__[1:-1] if inspect.isclass(target) else ()
    starts = [base.__init__ for base in bases if "__init__" in vars(base)]
    return {word for start in starts for word in inspect.signature(start).parameters}


def is_old(target, word=None):
    """Whether the documentation calls a function, or one of its arguments, deprecated."""
    classes = inspect.getmro(target) if inspect.isclass(target) else (target,)
    entry = r"\A\s*" if word is None else rf"^\s*{word} \(.*\n\s+"
    documents = [getattr(part, "__doc__", None) or "" for part in classes]
    return any(re.search(entry + "Deprecated", text, re.MULTILINE) for text in documents)


def named(*functions):
    """The keywords of functions: those of their signatures and those they pop."""
    signatures = [inspect.signature(function).parameters for function in functions]
    return {word for parameters in signatures for word in parameters} | popped(*functions)


def popped(*functions):
    """The names that functions take out of their `**kwargs`, read from their source."""
    taken = r"""kwargs(?:\.pop|\.get)\(["'](\w+)["']"""
    return {word for function in functions for word in re.findall(taken, _source(function))}


def _source(function):
    return inspect.getsource(inspect.unwrap(getattr(function, "__func__", function)))
