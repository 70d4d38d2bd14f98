"""Trace one training step without weights and count every live byte (Chapter 5).

Three ideas, one page each: a ledger that adds each new storage and drops it when it dies; a
model whose tensors are fakes (shapes and dtypes, no data); and a stretch that repeats the
middle layer of a short trace, so that eighty layers cost as much to predict as four.
"""

import bisect
import collections
import contextlib
import itertools
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROUND = 512  # the CUDA caching allocator hands out multiples of 512 bytes


def rounded(size, unit=ROUND):
    """Bytes that an allocation of `size` bytes occupies when handed out in multiples of
    `unit`.
    """
    return -(-size // unit) * unit


class Ledger(TorchDispatchMode):
    """Count live tensor bytes by weak reference, as every operator allocates and every
    storage dies (Chapter 5).

    `unit` rounds each storage (512: what CUDA's allocator would hand out; 1: exact).
    `adopt` enters tensors made before. With `inputs=True`, storages first met as an
    operator's input count as alive from the start, and in `before`. `scratch(func, args)`
    gives the bytes that an operator's kernel takes while it runs. Gradients that autograd
    adds up are added in place, as it does with real tensors. `events` is the log of
    (block, size, category): size > 0 allocates, < 0 frees, 0 moves the block to another
    category. `marks` are the (position, name) of the phases and layers within it.
    """

    def __init__(self, unit=ROUND, inputs=False, scratch=None):
        super().__init__()
        self.unit, self.inputs, self.scratch = unit, inputs, scratch
        self.live = {}
        self.events, self.marks = [], []
        self.category = "activations"
        self.before = 0
        self._blocks = itertools.count()
        self._sum = None  # (block of its first term, position) of autograd's latest sum

    def adopt(self, tensor, category):
        """Enter a tensor's storage (or move it) under `category`.

        A storage counts once, whatever its views.
        """
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.live:
            reference, block, size, old = self.live[key]
            if old != category:
                self.live[key] = (reference, block, size, category)
                self.events.append((block, 0, category))
            return
        size = rounded(storage.nbytes(), self.unit)
        if size:
            block = self.enter(size, category)
            reference = weakref.ref(storage, lambda _: self._drop(key))
            self.live[key] = (reference, block, size, category)

    def enter(self, size, category):
        """Log an allocation that has no tensor here (an optimizer state, a repeated layer).

        Returns its block.
        """
        block = next(self._blocks)
        self.events.append((block, size, category))
        return block

    def _drop(self, key):
        _, block, size, category = self.live.pop(key)
        self._leave(block, size, category)

    def _leave(self, block, size, category):
        position = len(self.events)
        if self._sum == (block, position - 1):
            # Nobody else held the first term: with real tensors, the sum is written there.
            position -= 1
        self.events.insert(position, (block, -size, category))

    def mark(self, name):
        """Note that what follows belongs to `name` (a phase, or a layer's forward or
        backward).
        """
        self.marks.append((len(self.events), name))

    def phase(self, name, category):
        """Begin a phase: mark it, and file new storages under `category` from here on."""
        self.mark(name)
        self.category = category

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inputs:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, torch.Tensor):
                    self._found(leaf)
        out = func(*args, **kwargs)
        position = len(self.events)
        for leaf in tree_leaves(out) if isinstance(out, tuple | list) else (out,):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in self.live:
                self.adopt(leaf, self.category)
        if func is torch.ops.aten.add.Tensor and _asked_by_autograd():
            first = self.live.get(args[0].untyped_storage()._cdata)
            alone = first and not args[0]._is_view()  # a view shares it with its base
            self._sum = (first[1], position) if alone else None
        if self.scratch is not None and (size := self.scratch(func, args)):
            size = rounded(size, self.unit)
            self._leave(self.enter(size, self.category), size, self.category)
        return out

    def _found(self, tensor):
        if tensor.untyped_storage()._cdata not in self.live:
            self.adopt(tensor, "before")
            self.before += rounded(tensor.untyped_storage().nbytes(), self.unit)

    @property
    def current(self):
        """Bytes alive now."""
        return sum(size for _, size, _ in self.events)

    @property
    def peak(self):
        """Most bytes alive at once; what was there before counts from the start."""
        current = highest = self.before
        for _, size, category in self.events:
            current += 0 if category == "before" and size > 0 else size
            highest = max(highest, current)
        return highest


def _asked_by_autograd():
    """Whether an operator comes from autograd's engine, and from no Python code under it.

    (Custom backward functions and recomputed forward passes are such code.)
    """
    frame = sys._getframe(2)  # whoever called the operator that __torch_dispatch__ got
    while frame and Path(frame.f_code.co_filename).name in ("_compile.py", "eval_frame.py"):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


@dataclass
class Trace:
    """The log of one traced run.

    `events` (block, size, category), `marks` (position, name of a phase).
    """

    events: list
    marks: list

    def peak(self):
        """(peak bytes, {category.

        Bytes} at that moment, name of the phase it falls in, {phase: its own peak}).
        """
        current, best, parts, where = 0, 0, {}, ""
        sizes, totals, phases = {}, collections.Counter(), {}
        marks, upcoming, phase = [m for m in self.marks if isinstance(m[1], str)], 0, ""
        for position, (block, size, category) in enumerate(self.events):
            while upcoming < len(marks) and marks[upcoming][0] <= position:
                phase, upcoming = marks[upcoming][1], upcoming + 1
                phases[phase] = max(phases.get(phase, 0), current)
            if size > 0:
                sizes[block] = (size, category)
                totals[category] += size
                current += size
                phases[phase] = max(phases.get(phase, 0), current)
            else:
                held, old = sizes.pop(block)
                totals[old] -= held
                if size == 0:
                    sizes[block] = (held, category)
                    totals[category] += held
                else:
                    current -= held
            if current > best:
                best, parts, where = current, dict(totals), phase
        return best, {k: v for k, v in parts.items() if v}, where, phases

    def timeline(self, points=600):
        """[(position, bytes)] thinned to about `points`, keeping the highest of each
        stretch.
        """
        totals, current = [], 0
        for _, size, _ in self.events:
            current += size
            totals.append(current)
        step = max(1, len(totals) // points)
        return [(i, max(totals[i : i + step])) for i in range(0, len(totals), step)]

    def stretch(self, layers, target):
        """Repeat the third of `layers` layers until there are `target`.

        The log of the whole model, or None.

        Marks ("forward", i) and ("backward", i) say where layer i begins. The second and
        third layer must have allocated and freed the same sizes in the same order, each
        referring to its own blocks and its neighbor's; otherwise repeating one would be a
        guess, and the answer is None.
        """
        at = {name: position for position, name in self.marks if isinstance(name, tuple)}
        starts = [at.get((way, i)) for way in ("forward", "backward") for i in range(layers)]
        if None in starts or layers < 4:
            return None
        events, extra = self.events, target - layers
        forward = [events[at["forward", i] : at["forward", i + 1]] for i in range(1, 3)]
        backward = [events[at["backward", i] : at["backward", i - 1]] for i in (1, 2)]
        twin = {}  # a block of the third layer: the second layer's counterpart
        for first, second in (forward, backward):
            if [e[1:] for e in first] != [e[1:] for e in second]:
                return None
            twin |= {b[0]: a[0] for a, b in zip(first, second, strict=True) if b[1] > 0}
        back = {a: b for b, a in twin.items()}
        own = {e[0] for part in (forward[1], backward[1]) for e in part if e[1] > 0}
        copies = [dict() for _ in range(extra)]  # layer 3, 4, …: the template's block -> its own
        fresh = itertools.count(max((e[0] for e in events), default=0) + 1)

        def block_in(copy, block):
            """The block that `block` of the third layer's log means in repetition `copy` (0
            is the original).
            """
            if block in own:
                return block if copy == 0 else copies[copy - 1].setdefault(block, next(fresh))
            if block in back and back[block] in own:  # the layer below
                return block if copy == 0 else block_in(copy - 1, back[block])
            return None

        above = {}  # a block of the last layer that the third frees: its counterpart
        for a, b in zip(*backward, strict=True):
            if b[1] <= 0 and a[0] in own and b[0] not in own and b[0] not in back:
                above[b[0]] = a[0]
        log, marks = [], []

        def append(start, stop, change=None):
            for position, name in self.marks:
                if start <= position < stop and isinstance(name, str):
                    marks.append((len(log) + position - start, name))
            for block, size, category in events[start:stop]:
                for renamed in [block] if change is None else change(block, size):
                    log.append((renamed, size, category))

        def repeat(copy):
            def change(block, size):
                known = block_in(copy, block)
                if known is None and block in above:
                    known = block if copy == extra else block_in(copy + 1, above[block])
                if known is None:
                    raise _Irregular
                return [known]

            return change

        def last(
            block, size
        ):  # after the repetitions, the third layer's blocks are the last repetition's
            return [block_in(extra, block) if block in own else block]

        def below(block, size):  # on the way back, the second layer meets the original again
            return [block]

        def every(block, size):
            return [block_in(copy, block) for copy in range(extra + 1)] if block in own else [block]

        seam, turn = at["forward", 3], at["backward", 2]
        try:
            append(0, seam)
            for copy in range(1, extra + 1):
                append(at["forward", 2], seam, repeat(copy))
            append(seam, turn, last)
            for copy in range(extra, -1, -1):
                append(turn, at["backward", 1], repeat(copy))
            append(at["backward", 1], at["backward", 0], below)
            append(at["backward", 0], len(events), every)
        except _Irregular:
            return None
        return Trace(log, marks)

    def on_card(self):
        """The same log with every block as large as CUDA's caching allocator makes it, and
        the bytes it reserves.
        """
        allocator, events = CachingAllocator(), []
        for block, size, category in self.events:
            if size > 0:
                events.append((block, allocator.allocate(block, size), category))
            elif size < 0:
                events.append((block, -allocator.free(block), category))
            else:
                events.append((block, 0, category))
        return Trace(events, self.marks), allocator.reserved


class _Irregular(Exception):
    """A layer's log refers to blocks that its twin's does not."""


class CachingAllocator:
    """PyTorch's CUDA caching allocator in miniature.

    Which block answers a request, and what is reserved (Chapter 5).

    Requests round up to 512 bytes; up to 1 MiB they share 2 MiB segments, under 10 MiB 20
    MiB ones, above that they get their own, rounded up to 2 MiB. The smallest free block
    that is large enough answers; what is left over splits off only when it exceeds 1 MiB
    (512 bytes in the small pool), else the caller holds it too. Source:
    c10/cuda/CUDACachingAllocator.cpp with default settings.
    """

    MIB = 2**20

    def __init__(self):
        self.reserved = 0
        self._free = {True: [], False: []}  # small pool?, sorted (size, address)
        self._size, self._next, self._previous, self._small = {}, {}, {}, {}
        self._is_free, self._address = set(), {}

    def allocate(self, name, size):
        """Give `name` a block for `size` bytes.

        Returns the block's size, which is what the counters count.
        """
        size = rounded(size)
        small = size <= self.MIB
        pool = self._free[small]
        found = bisect.bisect_left(pool, (size, 0))
        if found < len(pool):
            have, address = pool.pop(found)
            self._is_free.discard(address)
        else:
            have = 2 * self.MIB if small else 20 * self.MIB
            if size >= 10 * self.MIB:
                have = rounded(size, 2 * self.MIB)
            address = self.reserved
            self.reserved += have
            self._size[address], self._small[address] = have, small
            self._next[address] = self._previous[address] = None
        rest = have - size
        if rest >= ROUND if small else rest > self.MIB:
            new, after = address + size, self._next[address]
            self._size[new], self._small[new] = rest, small
            self._next[new], self._previous[new], self._next[address] = after, address, new
            if after is not None:
                self._previous[after] = new
            self._size[address] = size
            self._put_back(new)
        self._address[name] = address
        return self._size[address]

    def free(self, name):
        """Return `name`'s block, joined with free neighbors.

        Returns the size the counters drop by.
        """
        address = self._address.pop(name)
        size = self._size[address]
        previous = self._previous[address]
        if previous in self._is_free:
            self._join(previous, address, taken=previous)
            address = previous
        if self._next[address] in self._is_free:
            self._join(address, self._next[address], taken=self._next[address])
        self._put_back(address)
        return size

    def _join(self, left, right, taken):
        pool = self._free[self._small[taken]]
        del pool[bisect.bisect_left(pool, (self._size[taken], taken))]
        self._is_free.discard(taken)
        self._size[left] += self._size.pop(right)
        self._next[left] = self._next.pop(right)
        del self._previous[right]
        if self._next[left] is not None:
            self._previous[self._next[left]] = left

    def _put_back(self, address):
        bisect.insort(self._free[self._small[address]], (self._size[address], address))
        self._is_free.add(address)


@contextlib.contextmanager
def patched(owner, name, value):
    """Set an attribute and put the old one back, whatever happens."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)
