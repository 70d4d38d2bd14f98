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
_COLORS = {
    "weights": "gray", "adapters": "blue", "gradients": "orange", "optimizer": "purple",
    "activations": "sky", "logits": "green", "temporaries": "red", "workspace": "yellow",
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
        """The parts as one stacked bar, and the step's timeline.

        Args:
            gpu: a card or a size, drawn as a line.
        """
        from helpers import plots

        size: dict[str, Any] = {"width": 9.5, "height": 3.6, "alt": f"{str(self).splitlines()[0]}."}
        fig, (left, right) = plots.figure(1, 2, **size, width_ratios=[1, 2.2], sharey=True)
        bottom = 0.0
        for name, mb, _ in self.table().itertuples():
            color = plots.COLORS[_COLORS[name]]
            left.bar([0], [mb * 1e6 / GIB], 0.6, bottom=bottom, color=color, label=name)
            bottom += mb * 1e6 / GIB
        left.set(xticks=[], xlim=(-0.5, 1.9), ylabel="GiB (2**30 bytes)", title="at the peak")
        handles, labels = left.get_legend_handles_labels()
        left.legend(handles[::-1], labels[::-1], loc="lower right", fontsize=8)
        x, y = zip(*self.trace.timeline(), strict=True)
        heights = [size / GIB for size in y]
        right.fill_between(x, heights, step="post", color=plots.COLORS["sky"], alpha=0.7)
        marks = {name: at for at, name in reversed(self.trace.marks) if name in PHASES}
        for name, position in marks.items():
            right.axvline(position, color=plots.COLORS["gray"], linewidth=0.8, linestyle=":")
            offset = {"textcoords": "offset points", "rotation": 90, "fontsize": 8}
            right.annotate(name, (position, 0), (2, 4), **offset)
        right.set(xlabel="allocations and frees, in order", title="one training step")
        end = len(self.trace.events)
        right.set_xlim(max(0, min(marks.values()) - end // 20), end)
        if gpu is not None:
            capacity, red = parse_size(gpu) / GIB, plots.COLORS["red"]
            for axis in (left, right):
                axis.axhline(capacity, color=red, linewidth=1.5)
            label, across = (
                str(find_card(gpu) or f"{capacity:.1f} GiB"),
                right.get_yaxis_transform(),
            )
            right.text(0.99, capacity, label, ha="right", va="top", color=red, transform=across)
        return fig
