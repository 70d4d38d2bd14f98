"""What a prediction says.

Numbers, a table, two pictures, and which cards it fits (Chapter 5).
"""

import re
from dataclasses import dataclass, field

from helpers.memory.cards import CARDS, cublas_workspace, find_card, half_dtype

GIB = 2**30
PHASES = ("forward", "loss", "backward", "optimizer")
GPUS = {name: card.memory for name, card in CARDS.items()}
OTHER_KERNELS = "other kernels (ask with --gpu, or gpu=)"
CONTEXT = (
    0.25e9,
    0.5e9,
)  # the CUDA context on recent stacks, outside every allocator counter


def parse_size(gpu):
    """Bytes from a number, a text like '16GiB' or '24GB', a Card, or a card's name
    (Chapter 5).

    A name may be loose ('4090', 'NVIDIA A100-SXM4-80GB'). Raises ValueError for names that
    are in no table or fit two cards, TypeError for other types.
    """
    if card := find_card(gpu):
        return card.memory
    if isinstance(gpu, bool) or not isinstance(gpu, int | float | str):
        raise TypeError(f"gpu must be a card's name, a size like '16GiB', or bytes, not {gpu!r}")
    if not isinstance(gpu, str):
        return int(gpu)
    found = re.fullmatch(r"\s*([\d.]+)\s*([kmgt]?)(i?)b?\s*", gpu.lower())
    if not found or not found[1].strip("."):
        raise ValueError(
            f"gpu={gpu!r} is neither a size like '16GiB' nor one of {', '.join(GPUS)}; for "
            "the card in this machine pass memory.cards.of_this_machine()"
        )
    base = 1024 if found[3] else 1000
    return int(float(found[1]) * base ** " kmgt".index(found[2] or " "))


@dataclass(frozen=True)
class MemoryEstimate:
    """A predicted training step.

    How many bytes at the peak, when, and what they are (Chapter 5).

    peak_bytes: what `max_memory_allocated` would say. parts: {category: bytes} at that
    moment, adding up to it. peak_instant: 'forward', 'loss', 'backward' or 'optimizer';
    instants: the peak of each. reserved_bytes: what the caching allocator holds. margin:
    (low, high) bytes on top of the peak for that and the CUDA context. card: the Card it
    was asked for, or None: any card with the kernels of Ampere and later.
    """

    name: str
    peak_bytes: int
    parts: dict
    peak_instant: str
    instants: dict
    reserved_bytes: int
    trace: object = field(repr=False)  # thousands of events
    recipe: object
    config: object = field(repr=False)
    card: object = None

    @property
    def margin(self):
        """(low, high) bytes beyond the peak.

        CUDA context, and blocks the allocator holds but nobody uses.
        """
        slack = max(0, self.reserved_bytes - self.peak_bytes)
        return int(CONTEXT[0] + slack / 2), int(CONTEXT[1] + slack)

    def fits(self, gpu):
        """Whether the peak and the whole margin fit a card ('T4', 'A100 80GB', '16GiB', or
        bytes).

        A card without bfloat16 is asked about the same run in float16, on its own kernels.
        Raises ValueError for flash attention on a card that has none.
        """
        return self.verdict(gpu) == "fits"

    def verdict(self, gpu):
        """'fits', 'tight' (only with a small context and no fragmentation) or 'no'."""
        card, run, capacity = find_card(gpu), self, parse_size(gpu)
        if card and not self._same_kernels(card):
            from helpers import memory

            run = memory.for_card(self, card)
        need, (low, high) = run.peak_bytes, run.margin
        if card:
            mine = cublas_workspace(run.recipe.capability)
            need += 2 * (cublas_workspace(card.capability) - mine)
        if need + high <= capacity:
            return "fits"
        return "tight" if need + low <= capacity else "no"

    def _same_kernels(self, card):
        return half_dtype(card.capability) == half_dtype(self.recipe.capability)

    def _verdicts(self):
        """{verdict: names of cards}; a card with other kernels needs its own prediction."""
        groups = {"fits": [], "tight": [], "no": [], OTHER_KERNELS: []}
        for card in [self.card] if self.card else CARDS.values():
            same = self._same_kernels(card)
            groups[self.verdict(card) if same else OTHER_KERNELS].append(card.name)
        return {verdict: ", ".join(names) for verdict, names in groups.items() if names}

    def table(self):
        """The parts as a table: MB (1e6 bytes) and share of the peak, largest first."""
        import pandas as pd

        parts = sorted(self.parts.items(), key=lambda item: -item[1])
        rows = [(name, size / 1e6, size / self.peak_bytes) for name, size in parts]
        return pd.DataFrame(rows, columns=["part", "MB", "share"]).set_index("part")

    def __str__(self):
        where = {"forward": "in the forward pass", "backward": "in the backward pass"}
        instant = where.get(self.peak_instant, f"at the {self.peak_instant}")
        lines = [
            f"{self.name}: peak {self.peak_bytes / GIB:.2f} GiB {instant}",
            f"margin for CUDA context and fragmentation: {_span(self.margin)}",
        ]
        for name, row in self.table().iterrows():
            if row.MB >= 0.05:
                lines.append(f"  {name:<12} {row.MB:>10,.1f} MB  {row.share:>6.1%}")
        lines += [f"{verdict}: {names}" for verdict, names in self._verdicts().items()]
        return "\n".join(lines)

    def _repr_html_(self):
        colors, table = _colors(), self.table()
        style = "display:inline-block;height:18px"
        bars = "".join(
            f'<span title="{name}: {row.MB:,.0f} MB" '
            f'style="{style};width:{100 * row.share:.2f}%;background:{colors[name]}">'
            "</span>"
            for name, row in table.iterrows()
        )
        rows = "".join(
            f'<tr><td><span style="color:{colors[name]}">&#9632;</span> {name}</td>'
            f"<td>{row.MB:,.1f}</td><td>{row.share:.1%}</td></tr>"
            for name, row in table.iterrows()
            if row.MB >= 0.05
        )
        signs = {"fits": "&#10003; fits", "tight": "&#8776; tight", "no": "&#10007; no"}
        cards = "".join(
            f"<tr><td>{signs.get(verdict, verdict)}</td><td>{names}</td></tr>"
            for verdict, names in self._verdicts().items()
        )
        head = "<tr><th>part</th><th>MB</th><th>share</th></tr>"
        return (
            f"<b>{self.name}</b>: peak <b>{self.peak_bytes / GIB:.2f} GiB</b> "
            f"({self.peak_instant}), plus {_span(self.margin)} for the CUDA context and "
            f'fragmentation<div style="max-width:640px">{bars}</div>'
            f'<div style="display:flex;gap:2em"><table>{head}{rows}</table>'
            f"<table><tr><th></th><th>cards</th></tr>{cards}</table></div>"
        )

    def plot(self, gpu=None):
        """Draw the parts as one stacked bar and the step's timeline, against a card's line.

        Returns the Figure.
        """
        from helpers import plots

        fig, (left, right) = plots.figure(
            1, 2, width=9.5, height=3.6, width_ratios=[1, 2.2], sharey=True
        )
        bottom, colors = 0, _colors()
        for name, row in self.table().iterrows():
            height = row.MB * 1e6 / GIB
            left.bar([0], [height], 0.6, bottom=bottom, color=colors[name], label=name)
            bottom += height
        left.set(xticks=[], xlim=(-0.5, 1.9), ylabel="GiB (2**30 bytes)", title="at the peak")
        handles, labels = left.get_legend_handles_labels()
        left.legend(handles[::-1], labels[::-1], loc="lower right", fontsize=8)
        samples = self.trace.timeline()
        x, y = zip(*samples, strict=True)
        right.fill_between(
            x, [v / GIB for v in y], step="post", color=plots.COLORS["sky"], alpha=0.7
        )
        marks = [(position, name) for position, name in self.trace.marks if name in PHASES]
        for position, name in marks:
            right.axvline(position, color=plots.COLORS["gray"], linewidth=0.8, linestyle=":")
            right.annotate(
                name,
                (position, 0),
                (2, 4),
                textcoords="offset points",
                fontsize=8,
                rotation=90,
            )
        right.set(xlabel="allocations and frees, in order", title="one training step")
        right.set_xlim(
            max(0, marks[0][0] - len(self.trace.events) // 20) if marks else 0,
            len(self.trace.events),
        )
        if gpu is not None:
            capacity = parse_size(gpu) / GIB
            for axis in (left, right):
                axis.axhline(capacity, color=plots.COLORS["red"], linewidth=1.5)
            label = str(find_card(gpu) or f"{capacity:.1f} GiB")
            across = right.get_yaxis_transform()
            style = dict(ha="right", va="top", color=plots.COLORS["red"], transform=across)
            right.text(0.99, capacity, label, **style)
        return fig


def _span(margin):
    return f"{margin[0] / GIB:.2f} to {margin[1] / GIB:.2f} GiB"


def _colors():
    from helpers.plots import COLORS

    order = {
        "weights": "gray",
        "adapters": "blue",
        "gradients": "orange",
        "optimizer": "purple",
    }
    order |= {
        "activations": "sky",
        "logits": "green",
        "temporaries": "red",
        "workspace": "yellow",
    }
    return {name: COLORS[color] for name, color in order.items()}
