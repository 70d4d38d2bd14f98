"""What a prediction says: numbers, a table, two pictures, and which cards it fits (Chapter 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers import _report
from helpers.memory.cards import (
    AMPERE,
    CARDS,
    Card,
    cublas_workspace,
    find_card,
    parse_size,
)

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from helpers.memory._model import Choices
    from helpers.memory._trace import Trace

GIB = 2**30
PHASES = ("forward", "loss", "backward", "optimizer")
_WHEN = {"forward": "in the forward pass", "backward": "in the backward pass"}
_OTHER_KERNELS = "other kernels (ask with --gpu, or gpu=)"
_SIGNS = {"fits": "✓ fits", "tight": "≈ tight", "no": "✗ no"}
_CONTEXT = (0.25e9, 0.5e9)  # of CUDA on recent stacks, outside every allocator counter
_COLORS = {  # in the order in which they are stacked: what stays is below
    "weights": "gray", "adapters": "blue", "optimizer": "purple", "workspace": "yellow",
    "gradients": "orange", "activations": "sky", "logits": "green", "temporaries": "red",
}  # fmt: skip


@dataclass(frozen=True, repr=False)
class MemoryEstimate(_report.Shown):
    """A predicted training step: how many bytes at the peak, when, and what they are (Chapter 5).

    Args:
        name: the model's.
        peak_bytes: what `max_memory_allocated` would say.
        parts: {category: bytes} at that moment, adding up to it.
        peak_instant: 'forward', 'loss', 'backward' or 'optimizer'.
        instants: the peak of each.
        reserved_bytes: what the caching allocator holds.
        trace: the log of the step.
        choices: of the run, as `estimate_training` takes them.
        config: the model's.
        card: the Card it was asked for; None: any with the kernels of Ampere and later.
    """

    name: str
    peak_bytes: int
    parts: dict[str, int]
    peak_instant: str
    instants: dict[str, int]
    reserved_bytes: int
    trace: Trace
    choices: Choices
    config: Any
    card: Card | None = None

    @property
    def adapted(self) -> tuple[str, ...]:
        """The kinds of layers that carry LoRA adapters, as in ('q_proj', 'v_proj')."""
        return self.trace.adapted

    @property
    def largest(self) -> dict[str, int]:
        """{category: the most bytes it held}, each at its own moment of the step."""
        found: dict[str, int] = {}
        for _, totals in self.trace.states():
            for name, size in totals.items():
                found[name] = max(found.get(name, 0), size)
        return {name: size for name, size in found.items() if size}

    @property
    def margin(self) -> tuple[int, int]:
        """(low, high) bytes beyond the peak: CUDA's context, and blocks held but not used."""
        slack = max(0, self.reserved_bytes - self.peak_bytes)
        return int(_CONTEXT[0] + slack / 2), int(_CONTEXT[1] + slack)

    def fits(self, gpu: Card | str | float) -> bool:
        """Whether the peak and the whole margin fit a card or a size.

        A card without bfloat16 is asked about the same run in float16, on its own kernels.

        Args:
            gpu: 'T4', 'A100 80GB', a Card, '16GiB', or bytes.

        Raises:
            ValueError: flash attention on a card that has none, or an unknown card.
        """
        return self.verdict(gpu) == "fits"

    def verdict(self, gpu: Card | str | float) -> str:
        """'fits', 'tight' (only with a small context and no fragmentation) or 'no'.

        Args:
            gpu: as `fits` takes it.
        """
        card, run, capacity = find_card(gpu), self, parse_size(gpu)
        if card and not self._same_kernels(card):
            from helpers.memory.estimate import for_card

            run = for_card(self, card)
        need, (low, high) = run.peak_bytes, run.margin
        if card:
            mine = cublas_workspace(run.choices.capability)
            need += 2 * (cublas_workspace(card.capability) - mine)
        if need + high <= capacity:
            return "fits"
        return "tight" if need + low <= capacity else "no"

    def _same_kernels(self, card: Card) -> bool:
        return (card.capability >= AMPERE) == (self.choices.capability >= AMPERE)

    def _verdicts(self) -> dict[str, str]:
        """{verdict: names of cards}; a card with other kernels needs its own prediction."""
        groups: dict[str, list[str]] = {name: [] for name in (*_SIGNS, _OTHER_KERNELS)}
        for card in [self.card] if self.card else CARDS.values():
            same = self._same_kernels(card)
            groups[self.verdict(card) if same else _OTHER_KERNELS].append(card.name)
        return {verdict: ", ".join(names) for verdict, names in groups.items() if names}

    def table(self) -> pd.DataFrame:
        """The parts, largest first: MB (1e6 bytes) and share of the peak."""
        import pandas as pd

        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        rows = [(name, size / 1e6, size / self.peak_bytes) for name, size in parts]
        return pd.DataFrame(rows, columns=["part", "MB", "share"]).set_index("part")

    def __str__(self) -> str:
        when = _WHEN.get(self.peak_instant, f"at the {self.peak_instant}")
        low, high = (size / GIB for size in self.margin)
        lines = [
            f"{self.name}: peak {self.peak_bytes / GIB:.2f} GiB {when}",
            f"margin for CUDA context and fragmentation: {low:.2f} to {high:.2f} GiB",
        ]
        if self.adapted:
            usual = " (PEFT's default for a rank)" * isinstance(self.choices.lora, int)
            lines.append(f"adapters on {', '.join(self.adapted)}{usual}")
        for name, mb, share in self.table().itertuples():
            if mb >= 0.05:
                lines.append(f"  {name:<12} {mb:>10,.1f} MB  {share:>6.1%}")
        return "\n".join(lines + [f"{key}: {names}" for key, names in self._verdicts().items()])

    def _repr_html_(self) -> str:
        from helpers.plots import COLORS

        style = "<span style='display:inline-block;height:18px;width:{};background:{}'></span>"
        bars, rows = "", []
        for name, mb, share in self.table().itertuples():
            color = COLORS[_COLORS[name]]
            bars += style.format(f"{share:.2%}", color)
            if mb >= 0.05:
                part = _report.Markup(f"{style.format('1em', color)} {name}")
                rows.append((part, f"{mb:,.1f}", f"{share:.1%}"))
        cards = [(_SIGNS.get(key, key), names) for key, names in self._verdicts().items()]
        tables = _report.table(rows, ("part", "MB", "share")) + _report.table(cards, ("", "cards"))
        peak, margin = str(self).splitlines()[:2]
        return _report.card(
            peak,
            html=f"<b>{_report.escape(peak)}</b>; {margin}"
            f"<div aria-hidden='true' style='max-width:640px'>{bars}</div>"
            f"<div style='display:flex;gap:2em'>{tables}</div>",
        )

    def plot(self, gpu: Card | str | float | None = None) -> Figure:
        """The parts as one stacked bar, and the step's timeline, by category too.

        Args:
            gpu: a card or a size, drawn as a line.
        """
        import numpy as np

        from helpers import plots

        told = ", ".join(f"{name} {size / GIB:.2f}" for name, size in self.instants.items())
        shape: dict[str, Any] = {"width": 9.5, "height": 3.8, "width_ratios": [1, 2.6]}
        shape["alt"] = f"{str(self).splitlines()[0]}; of each phase, in GiB: {told}."
        fig, (left, right) = plots.figure(1, 2, **shape, sharey=True)
        at, states = zip(*self.trace.timeline(), strict=True)
        marks = {name: at for at, name in reversed(self.trace.marks) if name in PHASES}
        names, begins = zip(*sorted(marks.items(), key=lambda mark: mark[1]), strict=True)
        # a phase of few allocations would be a line: each gets a sixth of the longest at least
        end = len(self.trace.events) + 1
        spans = np.diff([*begins, end])
        edges = np.cumsum([0, *np.maximum(spans, spans.max() / 6)])
        shown = [i for i in range(len(at)) if at[i] >= begins[0]]
        x = np.interp([at[i] for i in shown] + [end], [*begins, end], edges)
        bottom, low = 0.0, np.zeros(len(shown))
        for name in filter(self.largest.__contains__, _COLORS):
            color, mine = plots.COLORS[_COLORS[name]], self.parts.get(name, 0) / GIB
            left.bar([0], [mine], 0.6, bottom=bottom, color=color, label=name)
            high = low + [states[i].get(name, 0) / GIB for i in shown]
            right.fill_between(
                x, [*low, low[-1]], [*high, high[-1]], step="post", color=color, lw=0.3
            )
            bottom, low = bottom + mine, high
        left.set(xticks=[], xlim=(-0.5, 1.9), ylabel="GiB (2**30 bytes)", title="at the peak")
        handles, labels = left.get_legend_handles_labels()
        left.legend(handles[::-1], labels[::-1], loc="lower right", fontsize=8)
        capacity, worst = 0.0 if gpu is None else parse_size(gpu) / GIB, int(low.argmax())
        near = capacity < 2.5 * low[worst]  # a line far above would leave the picture empty
        top = max(1.15 * low[worst], 1.08 * capacity * near)
        for name, begin, stop in zip(names, edges[:-1], edges[1:], strict=True):
            right.axvline(begin, color=plots.COLORS["black"], linewidth=0.8, linestyle=":")
            right.text((begin + stop) / 2, 0.98 * top, name, ha="center", va="top", fontsize=8)
        right.plot(x[worst], low[worst] + 0.02 * top, "v", color=plots.COLORS["black"])
        right.set(xlabel="allocations and frees, in order (short phases widened)", xticks=[])
        right.set(title="one training step", xlim=(0, 1.01 * edges[-1]), ylim=(0, top))
        if gpu is not None:
            label = f"{find_card(gpu) or 'limit'}\n{capacity:.1f} GiB" + "\n(above)" * (not near)
            style = {"color": plots.COLORS["red"], "transform": right.get_yaxis_transform()}
            right.text(1.01, capacity if near else top, label, va="top", fontsize=8, **style)
            for axis in (left, right) if near else ():
                axis.axhline(capacity, color=plots.COLORS["red"], linewidth=1.5)
        return fig
