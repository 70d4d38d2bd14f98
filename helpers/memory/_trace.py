"""Trace one training step without weights and count every live byte (Chapter 5).

Two ideas: a ledger adds each new storage to a log and drops it when it dies; and the log of
five layers is made the log of eighty by repeating what the third layer did.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.memory._allocator import ROUND, CachingAllocator, rounded

SHORT = 5  # layers of a short trace: the third and its neighbors have neighbors on both sides
Event = tuple[Hashable, int, str]  # block, size (> 0 allocates, < 0 frees, 0 moves), category
Mark = tuple[int, Any]  # position in the log, and a phase's name or (what, index of a layer)


class Ledger(TorchDispatchMode):
    """Count live tensor bytes, as operators allocate and storages die (by weak reference).

    `unit` rounds each storage (512: what CUDA's allocator hands out; 1: exact). With `inputs`,
    storages first met as an operator's input were alive `before`. `scratch(func, args)` gives
    the bytes that an operator's kernel takes while it runs. Gradients that autograd adds up
    are added in place, as it does with real tensors.
    """

    def __init__(self, unit: int = ROUND, inputs: bool = False, scratch: Any = None) -> None:
        super().__init__()
        self.unit, self.inputs, self.scratch = unit, inputs, scratch
        self.live: dict[int, tuple] = {}
        self.events: list[Event] = []
        self.marks: list[Mark] = []
        self.category, self.before = "activations", 0
        self._blocks = count()
        self._sum: tuple | None = None  # (block of its first term, position) of autograd's last sum

    def register(self, tensor: torch.Tensor, category: str) -> None:
        """Enter a tensor's storage, once whatever its views, or move it to another category."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            reference, block, size, old = self.live[key]
            if old != category:
                self.live[key] = (reference, block, size, category)
                self.events.append((block, 0, category))
        elif size := rounded(storage.nbytes(), self.unit):
            reference = weakref.ref(storage, lambda _: self._free(*self.live.pop(key)[1:]))
            self.live[key] = (reference, self.allocate(size, category), size, category)

    def allocate(self, size: int, category: str) -> Hashable:
        """Log an allocation that has no tensor here (an optimizer's state); returns its block."""
        block = next(self._blocks)
        self.events.append((block, size, category))
        return block

    def _free(self, block: Hashable, size: int, category: str) -> None:
        position = len(self.events)
        if self._sum == (block, position - 1):
            # Nobody else held the first term: with real tensors, the sum is written there.
            position -= 1
        self.events.insert(position, (block, -size, category))

    def mark(self, name: Any) -> None:
        """Note that what follows belongs to a phase, or to (something, index of a layer)."""
        self.marks.append((len(self.events), name))

    def phase(self, name: str, category: str) -> None:
        """Begin a phase: mark it, and file new storages under `category` from here on."""
        self.mark(name)
        self.category = category

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inputs:
            for leaf in _tensors((args, kwargs)):
                if leaf.untyped_storage()._cdata not in self.live:
                    self.register(leaf, "before")
                    self.before += rounded(leaf.untyped_storage().nbytes(), self.unit)
        if func is torch.ops.aten.index.Tensor:  # a list of numbers, which goes to the card too
            for leaf in _tensors(args[1]):
                if leaf.untyped_storage()._cdata not in self.live:
                    self.register(leaf, self.category)
        out = func(*args, **kwargs)
        if func is torch.ops.aten.native_layer_norm.default and out[0].is_meta:
            # Statistics as wide as a CPU's; CUDA's are float32, 0.01 % of a peak at most.
            out = out[0], *(x.to((args[0] if args[2] is None else args[2]).dtype) for x in out[1:])
        position = len(self.events)
        for leaf in _tensors(out):
            if leaf.untyped_storage()._cdata not in self.live:
                self.register(leaf, self.category)
        if func is torch.ops.aten.add.Tensor and _asked_by_autograd():
            first = self.live.get(args[0].untyped_storage()._cdata)
            alone = first and not args[0]._is_view()  # a view shares it with its base
            self._sum = (first[1], position) if first and alone else None
        if self.scratch is not None and (size := self.scratch(func, args)):
            size = rounded(size, self.unit)
            self._free(self.allocate(size, self.category), size, self.category)
        return out

    @property
    def current(self) -> int:
        """Bytes alive now."""
        return sum(size for _, size, _ in self.events)

    @property
    def peak(self) -> int:
        """Most bytes alive at once; what was there before counts from the start."""
        sizes = (0 if kind == "before" and size > 0 else size for _, size, kind in self.events)
        return max(accumulate(sizes, initial=self.before))


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _asked_by_autograd() -> bool:
    """Whether autograd's engine runs the operator, and no Python code under the engine.

    (Backward functions of one's own and recomputed forward passes are such code.)
    """
    frame = sys._getframe(2)  # whoever called the operator that __torch_dispatch__ got
    while frame and Path(frame.f_code.co_filename).name in ("_compile.py", "eval_frame.py"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@dataclass
class Trace:
    """The log of one traced step: its events, marks of phases and layers, what is adapted."""

    events: list[Event]
    marks: list[Mark]
    adapted: tuple[str, ...] = ()

    def states(self) -> Iterator[tuple[int, Counter[str]]]:
        """(bytes, {category: bytes}, the same object each time) after each event."""
        held: dict[Hashable, tuple[int, str]] = {}
        totals: Counter[str] = Counter()
        current = 0
        for block, size, category in self.events:
            before, old = held.pop(block, (0, category))
            totals[old] -= before
            if size >= 0:
                held[block] = before + size, category
                totals[category] += before + size
            current += size
            yield current, totals

    def peak(self) -> tuple[int, dict[str, int], str, dict[str, int]]:
        """(peak bytes, {category: bytes} then, the phase then, {phase: its own peak})."""
        begins = defaultdict(list)
        for position, name in self.marks:
            if isinstance(name, str):
                begins[position].append(name)
        before, best, parts, where, phase = 0, 0, {}, "", ""
        instants: dict[str, int] = {}
        for position, (current, totals) in enumerate(self.states()):
            for phase in begins.get(position, ()):
                instants[phase] = max(instants.get(phase, 0), before)
            instants[phase] = max(instants.get(phase, 0), current)
            if current > best:
                best, parts, where = current, dict(totals), phase
            before = current
        return best, {k: v for k, v in parts.items() if v}, where, instants

    def timeline(self, points: int = 600) -> list[tuple[int, dict[str, int]]]:
        """[(position, {category: bytes})]: the highest moment of each stretch, and the end."""
        step = max(1, len(self.events) // points)
        found: list[tuple[int, int, dict[str, int]]] = []
        begins = {position for position, name in self.marks if isinstance(name, str)}
        for at, (current, totals) in enumerate(self.states()):
            if at % step == 0 or at in begins:
                found.append((-1, at, {}))
            if current > found[-1][0]:
                found[-1] = current, at, dict(totals)
        return [(at, parts) for _, at, parts in found] + [(len(self.events), dict(totals))]

    def with_allocator(self) -> tuple[Trace, int]:
        """The log with the sizes of CUDA's blocks, and the bytes its allocator reserves."""
        allocator, events = CachingAllocator(), []
        for block, size, category in self.events:
            if size > 0:
                size = allocator.allocate(block, size)
            elif size < 0:
                size = -allocator.free(block)
            events.append((block, size, category))
        return Trace(events, self.marks, self.adapted), allocator.reserved

    def extrapolate(self, layers: int) -> Trace | None:
        """The log of a model of so many layers, from that of `SHORT`; None where it is a guess.

        The log is cut at its marks. A block is named by the layer it was born in and its number
        among that layer's, so what the third layer does to its own blocks and its neighbors' is
        done again for each layer more, provided that layers 2, 3 and 4 did the same.
        """
        cuts = pairwise([*self.marks, (len(self.events), None)])
        segments = [(name, self.events[start:stop]) for (start, name), (stop, _) in cuts]
        born: dict[Hashable, tuple] = {}
        logs: dict[tuple, list] = defaultdict(list)
        for name, events in segments:
            for block, size, category in events if isinstance(name, tuple) else ():
                if size > 0:
                    born[block] = (*name, len(logs[name]))
                logs[name].append((size, category))
        kinds = {"forward", "backward"} | {kind for kind, _ in logs}
        if any(not logs[kind, i] for kind in kinds for i in range(SHORT)) or any(
            logs[kind, 1] != logs[kind, i] for kind in kinds for i in (2, 3)
        ):
            return None
        extra, done = layers - SHORT, False  # done: on the way back, the first layer was reached

        def blocks(block: Hashable, layer: int | None, shift: int) -> Iterable[Hashable]:
            """What a block means where the log of `layer` stands for that of layer + shift."""
            if block not in born:
                return [block]
            kind, home, number = born[block]
            if layer == 2:
                homes: Iterable[int] = [home + shift]
            elif done and home == 2:  # what dies now was kept by every layer
                homes = range(2, 3 + extra)
            else:
                homes = [home + extra if home > 1 and (done or layer not in (0, 1)) else home]
            return [(kind, at, number) for at in homes]

        log: list[Event] = []
        marks: list[Mark] = []
        alive: set[Hashable] = set()
        for name, events in segments:
            kind, layer = name if isinstance(name, tuple) else (name, None)
            done |= name == ("backward", 0)
            shifts = range(extra + 1) if layer == 2 else [extra if layer in (3, 4) else 0]
            for shift in reversed(shifts) if kind == "backward" else shifts:
                marks.append((len(log), name if layer is None else (kind, layer + shift)))
                for event in events:
                    for block in blocks(event[0], layer, shift):
                        if (event[1] > 0) == (block in alive):
                            return None  # a layer's log refers to what its twin's does not
                        if event[1]:
                            alive ^= {block}
                        log.append((block, *event[1:]))
        return Trace(log, marks, self.adapted)
