"""Follows where models and tensors lie through code that is not run (for portability.py).

A value is a plain one (text, number, list, dict) where it is known, a `Thing` that lies
somewhere, a `Function` of the code itself, or UNKNOWN. Loops over known lists are gone
through, others once; of an unknown `if`, what both sides agree on is kept.
"""

import ast
import operator
import re
from dataclasses import dataclass, replace

HERE = {"device": "cuda", "profile": "gpu"}  # the machine that is imagined
USUAL = ("model", "network")  # parameters of ours that hold a model
DEEP, LONG = 6, 64  # no further down into calls, nor through longer lists
DTYPES = ("float32", "bfloat16", "float16")
MATH = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
MATH |= {ast.Div: operator.truediv, ast.Pow: operator.pow}

# The words of the libraries: makes a tensor, gives back what it got, ...
MAKES = r"torch\.(tensor|zeros|ones|full|empty|rand|randn|randint|randperm|arange|eye"
MAKES += r"|linspace|logspace|from_numpy|as_tensor)"
GIVES_BACK = r"get_peft_model|prepare_model(_for_kbit_training)?|match_dtypes|list|tuple|"
GIVES_BACK += r"iter|next|reversed|sorted"
SAME = r"train|eval|requires_grad_|half|float|double|bfloat16|dequantize|unload|"
SAME += r"merge_and_unload"
PARTS = r"(named_)?(parameters|buffers)|state_dict|weight|bias|data|grad|SCB"
MODULES = r"(named_)?(modules|children)|get_submodule|get_(in|out)put_embeddings"
PLAIN = r"shape|dtype|ndim|size|numel|dim|tolist|item|numpy|data_ptr|nbytes|is_cuda|keys|"
PLAIN += r"(generation_)?config|name_or_path|quant_state"
REDUCES = r"sum|mean|std|max|min|norm|any|all"  # to one number, which goes with any place


class Unknown:
    """A value of which nothing is known."""


UNKNOWN = Unknown()


@dataclass(eq=False)
class Thing:
    """kind: 'model', 'tensor', 'trainer', 'collator', 'config', 'here'.

    place: 'card', 'cpu' or None. model: a trainer's.
    """

    kind: str
    place: str | None = None
    model: object = UNKNOWN


@dataclass(eq=False)
class Function:
    """A function or lambda of the code that is read, and the scopes it was made in."""

    node: ast.AST
    scopes: list


class Follower:
    """Reads a module in order; `report(kind, node)` is told what would break.

    usual: whether a parameter called `model` is taken for one that lies on the card.
    """

    def __init__(self, report, usual):
        self.report, self.usual = report, usual
        self.scopes, self.returned, self.made, self.called = [{}], [], [], set()
        self.default = "cpu"  # where new tensors are made

    def module(self, tree):
        """Follow a module, then the functions that nothing called."""
        self.block(tree.body)
        while waiting := [f for f in self.made if f.node not in self.called]:
            for function in waiting:
                self.inline(function, [], {}, self.usual)

    # ── statements ───────────────────────────────────────────────────────────────────────
    def block(self, body):
        """Follow statements; whether they end the function or the turn of a loop."""
        return any(self.statement(node) for node in body)

    def statement(self, node):
        match node:
            case ast.Return(value=value):
                self.returned[-1].append(self.value(value))
                return True
            case ast.Raise() | ast.Break() | ast.Continue():
                return True
            case ast.Assign(targets=targets, value=value):
                found = self.value(value)
                for target in targets:
                    self.bind(target, found)
            case ast.AugAssign(target=target, op=op, value=value):
                both = ast.copy_location(ast.BinOp(target, op, value), node)
                self.bind(target, self.value(both))
            case ast.For(target=target, iter=turns, body=body):
                for turn in self.turns(turns):
                    self.bind(target, turn)
                    self.block(body)
            case ast.If(test=test, body=body, orelse=orelse):
                return self.branch(self.value(test), body, orelse)
            case ast.With(items=items, body=body):
                return self.within(items, body)
            case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=final):
                rest = [part for handler in handlers for part in handler.body]
                self.branch(UNKNOWN, [*body, *orelse], rest)
                return self.block(final)
            case ast.FunctionDef(name=name):
                self.scopes[-1][name] = self.function(node)
            case ast.ClassDef(body=body):
                self.scopes.append({})
                self.block(body)
                self.scopes.pop()
            case _:
                self.parts(node)

    def branch(self, test, body, orelse):
        if known(test):
            return self.block(body if test else orelse)
        scope, before = self.scopes[-1], dict(self.scopes[-1])
        ended, after = self.block(body), dict(scope)
        scope.clear()
        scope.update(before)
        ended_too = self.block(orelse)
        if not ended:
            both = {n: either(scope.get(n, UNKNOWN), v) for n, v in after.items()}
            scope.update(after if ended_too else both)
        return ended and ended_too

    def within(self, items, body):
        default = self.default
        for item in items:
            found = self.value(item.context_expr)
            if dotted(getattr(item.context_expr, "func", None)) == "torch.device":
                self.default = place(found)
            if item.optional_vars:
                self.bind(item.optional_vars, UNKNOWN)
        ended = self.block(body)
        self.default = default
        return ended

    def turns(self, node):
        """The values that a loop goes through, as far as they are known."""
        found = self.value(node)
        if is_a(found, dict | list) and 0 < len(found) <= LONG:
            return [part if known(part) or is_a(found, list) else UNKNOWN for part in found]
        return [found if is_a(found, Thing) else UNKNOWN]

    def bind(self, target, value):
        match target:
            case ast.Name(id=name):
                self.scopes[-1][name] = value
            case ast.Tuple(elts=parts) | ast.List(elts=parts):
                fits = is_a(value, list) and len(value) == len(parts)
                shared = value if is_a(value, Thing) else UNKNOWN
                for i, part in enumerate(parts):
                    self.bind(part, value[i] if fits else shared)
            case ast.Subscript(value=base, slice=index):
                base, key = self.value(base), self.value(index)
                if is_a(base, dict) and known(key):
                    base[key] = value

    # ── expressions ──────────────────────────────────────────────────────────────────────
    def value(self, node):
        """What an expression is worth; reports what would break inside it."""
        match node:
            case None:  # a bare return
                return None
            case ast.Constant(value=value):
                return value
            case ast.Name(id=name):
                return next((s[name] for s in reversed(self.scopes) if name in s), UNKNOWN)
            case ast.Attribute(value=base, attr=attr):
                return self.attribute(node, self.value(base), attr)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return self.sequence(parts)
            case ast.Dict(keys=keys, values=values):
                return self.mapping(zip(keys, values, strict=True))
            case ast.Call():
                return self.call(node)
            case ast.BinOp(left=left, op=op, right=right):
                return self.binary(node, self.value(left), op, self.value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                return self.binary(node, self.value(left), op, self.value(right))
            case ast.IfExp(test=test, body=body, orelse=orelse):
                if known(test := self.value(test)):
                    return self.value(body if test else orelse)
                return either(self.value(body), self.value(orelse))
            case ast.Subscript(value=base, slice=index):
                return self.item(node, self.value(base), self.value(index))
            case ast.Lambda():
                return self.function(node)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
                return self.comprehension(node)
        return self.parts(node)

    def parts(self, node):
        for child in ast.iter_child_nodes(node):
            if is_a(child, ast.stmt):
                self.statement(child)
            elif is_a(child, ast.expr):
                self.value(child)
        return UNKNOWN

    def sequence(self, parts):
        found = []
        for part in parts:
            starred = is_a(part, ast.Starred)
            value = self.value(part.value if starred else part)
            found += value if starred and is_a(value, list) else [value]
        return found

    def mapping(self, pairs):
        found = {}
        for key, value in pairs:
            if key is None:  # **value
                value = self.value(value)
                found |= value if is_a(value, dict) else {UNKNOWN: value}
            else:
                key = self.value(key)
                found[key if known(key) else object()] = self.value(value)
        return found

    def comprehension(self, node):
        made, is_dict = [], is_a(node, ast.DictComp)
        self.scopes.append({})

        def turn(generators):
            if not generators:
                parts = (node.key, node.value) if is_dict else (node.elt,)
                return made.append([self.value(part) for part in parts])
            for value in self.turns(generators[0].iter):
                self.bind(generators[0].target, value)
                if all(self.value(test) or True for test in generators[0].ifs):
                    turn(generators[1:])

        turn(node.generators)
        self.scopes.pop()
        if is_dict:
            return {key if known(key) else object(): value for key, value in made}
        return [value for (value,) in made]

    def attribute(self, node, base, attr):
        if dotted(node).startswith("torch.") and attr in DTYPES:
            return attr
        if not is_a(base, Thing) or re.fullmatch(PLAIN, attr):
            return UNKNOWN
        if base.kind == "here":
            return HERE.get(attr, UNKNOWN)
        if base.kind not in ("model", "tensor"):
            return base.model if attr == "model" else UNKNOWN
        if attr == "device":
            return {"card": "cuda", "cpu": "cpu"}.get(base.place, UNKNOWN)
        return Thing("tensor", base.place) if re.fullmatch(PARTS, attr) else replace(base)

    def binary(self, node, left, op, right):
        """Two values joined by an operator or compared."""
        if is_a(op, ast.Is | ast.IsNot) and right is None and left is not UNKNOWN:
            return (left is None) == is_a(op, ast.Is)
        if is_a(op, ast.BitOr) and is_a(left, dict) and is_a(right, dict):
            return left | right
        if any(is_a(side, Thing) for side in (left, right)):
            return self.meet(node, things([left, right]))
        if is_a(op, ast.Eq | ast.NotEq) and known(left) and known(right):
            return (left == right) == is_a(op, ast.Eq)
        numbers = is_a(left, int | float) and is_a(right, int | float) and right
        return MATH[type(op)](left, right) if numbers and type(op) in MATH else UNKNOWN

    def item(self, node, base, key):
        if is_a(base, dict) and known(key):
            return base.get(key, UNKNOWN)
        if is_a(base, list) and type(key) is int and -len(base) <= key < len(base):
            return base[key]
        if is_a(base, Thing):  # a tensor of the card may be indexed from the CPU
            if base.place == "cpu" and any(t.place == "card" for t in things(key)):
                self.report("device", node)
            return replace(base)
        return UNKNOWN

    # ── calls ────────────────────────────────────────────────────────────────────────────
    def function(self, node):
        self.made.append(Function(node, list(self.scopes)))
        return self.made[-1]

    def inline(self, function, args, given, usual=False):
        """What a function of the code gives for these arguments."""
        self.called.add(function.node)
        if len(self.returned) > DEEP:
            return UNKNOWN
        taken, scopes, self.scopes = function.node.args, self.scopes, function.scopes
        names = [a.arg for a in (*taken.posonlyargs, *taken.args)]
        pairs = [*zip(names[::-1], taken.defaults[::-1], strict=False)]
        names += [a.arg for a in taken.kwonlyargs]
        pairs += zip([a.arg for a in taken.kwonlyargs], taken.kw_defaults, strict=True)
        scope = dict.fromkeys(names, UNKNOWN)
        scope |= {name: self.value(node) for name, node in pairs if node}
        if usual:
            scope |= {n: Thing("model", "card") for n in names if n in USUAL}
        bound = dict(zip(names, args, strict=False)) | given
        scope |= {name: bound[name] for name in names if name in bound}
        if taken.kwarg:
            rest = {name: value for name, value in bound.items() if name not in names}
            scope[taken.kwarg.arg] = rest
        self.scopes = [*function.scopes, scope]
        self.returned.append([])
        if is_a(function.node, ast.Lambda):
            self.returned[-1].append(self.value(function.node.body))
        else:
            self.block(function.node.body)
        self.scopes = scopes
        first, *others = self.returned.pop() or [UNKNOWN]
        for other in others:
            first = either(first, other)
        return first

    def call(self, node):
        func, args = node.func, self.sequence(node.args)
        given = self.mapping((k.arg and ast.Constant(k.arg), k.value) for k in node.keywords)
        if is_a(func, ast.Attribute):
            base = self.value(func.value)
            if is_a(base, Thing):
                return self.method(node, base, func.attr, args, given)
            if is_a(base, dict) and func.attr in ("items", "values"):
                pairs = [[k if known(k) else UNKNOWN, v] for k, v in base.items()]
                return pairs if func.attr == "items" else list(base.values())
        elif is_a(target := self.value(func), Function):
            return self.inline(target, args, given)
        elif is_a(target, Thing):
            return self.method(node, target, "forward", args, given)
        return self.library(node, dotted(func), args, given)

    def meet(self, node, found):
        """What comes out where tensors of several places go in."""
        places = {thing.place for thing in found}
        if {"cpu", "card"} <= places:
            self.report("device", node)
        return Thing("tensor", places.pop() if len(places) == 1 else None)

    def method(self, node, base, attr, args, given):
        """A method of a model, a tensor, ...; 'forward' for calling the thing itself."""
        if base.kind == "collator" or attr == "data_collator":
            return Thing("tensor", "cpu")
        if base.kind == "trainer" and attr == "model" and is_a(base.model, Thing):
            return self.method(node, base.model, "forward", args, given)
        if base.kind not in ("model", "tensor") or re.fullmatch(PLAIN, attr):
            return UNKNOWN
        if attr in ("copy_", "load_state_dict"):  # from anywhere to anywhere
            return base
        if attr in ("to", "cpu", "cuda"):
            return self.moved(node, base, attr, [*args, *given.values()])
        met = [base, *things([args, given])]
        if base.kind == "tensor":
            one = re.fullmatch(REDUCES, attr) and not args and not given
            return UNKNOWN if one else self.meet(node, met)
        if attr == "bfloat16" and base.place == "card":
            self.report("dtype", node)
        if attr in ("generate", "forward") or len(met) > 1:  # or one of its layers
            self.meet(node, met)
            return Thing("tensor", base.place)
        if re.fullmatch(SAME, attr):
            return base
        if re.fullmatch(PARTS, attr):
            return Thing("tensor", base.place)
        return replace(base) if re.fullmatch(MODULES, attr) else UNKNOWN

    def moved(self, node, base, attr, args):
        """`.to(...)`: a model itself moves, of a tensor there is a new one."""
        where = {"cpu": "cpu", "cuda": "card"}.get(attr, base.place)
        written = [*node.args, *(k.value for k in node.keywords)]
        for value, text in zip(args, map(ast.unparse, written), strict=False):
            if value == "bfloat16" and base.kind == "model" and base.place == "card":
                self.report("dtype", node)
            if is_a(value, Thing):
                where = value.place
            elif not re.search(r"dtype|^torch\.(?!device)|^True|^False", text):
                where = where if value in DTYPES else place(value)
        if base.kind == "tensor":
            return Thing("tensor", where)
        base.place = where
        return base

    def library(self, node, text, args, given):
        """What a function that is not of this code gives; what is wrong with the call."""
        last, inputs = text.rpartition(".")[2], things([args, given])
        first = args[0] if args else UNKNOWN
        match last:
            case "start" | "detect" if text.startswith("runtime."):
                return Thing("here")
            case "from_pretrained" if inputs:
                return inputs[0]
            case "load_model" | "from_pretrained" if "Tokenizer" not in text:
                where = self.told(given, "card" if last == "load_model" else "cpu")
                if where == "card" and given.get("dtype") == "bfloat16":
                    self.report("dtype", node)
                return Thing("model", where)
            case "SFTConfig" | "TrainingArguments":
                use_cpu = given.get("use_cpu", UNKNOWN if UNKNOWN in given else False)
                where = {True: "cpu", False: "card"}.get(use_cpu)
                if where == "card" and given.get("bf16") is True:
                    self.report("dtype", node)
                return Thing("config", where)
            case "export_recipe":
                processes, config = given.get("processes"), given.get("args")
                many = is_a(processes, int) and processes > 1
                if many and is_a(config, Thing) and config.place != "cpu":
                    self.report("processes", node)
                return UNKNOWN
            case "find_max_batch_size":
                budget = given.get("memory_budget")
                if is_a(budget, int | float) and 1e6 < budget < 1e12:  # not all, nor none
                    self.report("budget", node)
                return UNKNOWN
            case "autocast" if first == "cuda" and given.get("dtype") == "bfloat16":
                self.report("dtype", node)
                return UNKNOWN
            case "deepcopy" | "copy":
                return replace(first) if is_a(first, Thing) else first
            case "zip" if all(is_a(arg, list) for arg in args):
                return [list(turn) for turn in zip(*args, strict=False)]
        if re.fullmatch(GIVES_BACK, last) or text == "torch.device":
            return first
        if last.endswith("Trainer"):  # it takes its model along to where its arguments say
            config = given.get("args", args[1] if len(args) > 1 else UNKNOWN)
            for model in [m for m in inputs if m.kind == "model"][:1]:
                model.place = config.place if is_a(config, Thing) else None
                first = model
            return Thing("trainer", model=first)
        if "collat" in last.lower() or last == "lay_out" or "return_tensors" in given:
            return Thing("collator" if last[0] == "D" else "tensor", "cpu")
        return self.torch(node, text, last, args, given)

    def torch(self, node, text, last, args, given):
        inputs = things([args, given])
        layer = re.match(r"(torch\.)?nn\.[A-Z]", text) and last != "Parameter"
        if layer or last.endswith("ForCausalLM") or last == "from_config":
            return Thing("model", self.told(given, self.default))
        if re.fullmatch(MAKES, text) and not inputs:
            number = last == "tensor" and args and known(args[0])  # goes with any place
            return UNKNOWN if number else Thing("tensor", self.told(given, self.default))
        if not inputs or not re.match(r"(torch|F|nn|functional)\.", text):
            return UNKNOWN
        if "device" in given:
            return Thing("tensor", self.told(given, None))
        found = self.meet(node, inputs)
        return UNKNOWN if last in ("equal", "allclose", "dist") else found

    def told(self, given, usual):
        """Where something is made: as device= says, else where it usually is."""
        device = given.get("device", given.get("device_map"))
        if device is None:
            return None if UNKNOWN in given else usual
        return place(device)


# ── small questions ──────────────────────────────────────────────────────────────────────
is_a = isinstance


def dotted(node):
    """'a.b.c' of a chain of names; '.c' where its beginning is something else."""
    if is_a(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if is_a(node, ast.Attribute) else ""


def place(device):
    """Where a value given as device=, or a device_map's only one, puts things."""
    if is_a(device, dict) and len(device) == 1:
        device = next(iter(device.values()))
    text = "cuda" if type(device) is int else str(device)
    return {"cuda": "card", "cpu": "cpu"}.get(text.split(":")[0])


def things(value):
    """The models and tensors in a value, at any depth."""
    if is_a(value, Thing):
        return [value] if value.kind in ("model", "tensor") else []
    parts = value.values() if is_a(value, dict) else value if is_a(value, list) else ()
    return [thing for part in parts for thing in things(part)]


def known(value):
    """Whether a value is a plain one: a text, a number, True, False or None."""
    return value is None or is_a(value, str | int | float)


def either(one, other):
    """What two ways of getting a value agree on."""
    if is_a(one, Thing) and is_a(other, Thing) and one.kind == other.kind:
        return one if one.place == other.place else Thing(one.kind)
    same = one == other if known(one) and known(other) else one is other
    return one if same else UNKNOWN
