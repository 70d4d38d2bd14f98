"""How rows become batches: padding, flattening and packing, looked at (Chapter 4).

TRL and transformers do the work; here it is known which token came from which sample, so
that padding, cuts and attention across samples can be counted instead of believed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import transformers
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pandas import DataFrame
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from helpers import plots
from helpers._checks import one_of, whole_number

Rows: TypeAlias = Sequence[Mapping[str, Sequence[int]]]

PADDING = -1  # in `Layout.samples`: no sample at all
# Pale enough for a number on top; nine, so that neighbors differ.
_PALE = "9CC9E6 F3CF8E 8FD0BB E5C1D6 F5B895 C9C3E6 F3EBA0 C4DDA0 D8C4AE"
STRATEGIES = (
    "padding (TRL)",
    "flattening (transformers)",
    "padding-free (TRL)",
    "packing: wrapped",
    "packing: bfd",
    "packing: bfd_split",
)


@dataclass(frozen=True)
class Layout:
    """One way to batch some rows: the batch a model gets, and whose token is where."""

    strategy: str
    batch: dict[str, torch.Tensor]  # ready for `model(**batch)`, (rows, tokens) each
    samples: torch.Tensor  # (rows, tokens): number of the sample, or PADDING
    lengths: list[int]  # tokens of each sample before batching

    @property
    def padding(self) -> float:
        """Share of the batch that is padding, from 0 to 1."""
        return (self.samples == PADDING).float().mean().item()

    @property
    def lost(self) -> int:
        """Tokens of the rows that did not make it into the batch."""
        return sum(self.lengths) - int((self.samples != PADDING).sum())

    @property
    def cut(self) -> int:
        """Samples that were shortened or torn apart."""
        columns = torch.arange(self.samples.shape[1]).expand_as(self.samples)
        places, whole = self.batch.get("position_ids", columns), 0
        for number, length in enumerate(self.lengths):
            row, column = torch.where(self.samples == number)
            # From token to token: the same row, the next column, the next position.
            steps = torch.stack([row, column, places[row, column]], dim=1).diff(dim=0)
            whole += len(row) == length and bool((steps == torch.tensor([0, 1, 1])).all())
        return len(self.lengths) - whole


def lay_out(rows: Rows, tokenizer: Tokenizer, strategy: str, *, max_length: int = 64) -> Layout:
    """Batch all rows in one of the ways in `STRATEGIES`.

    Args:
        rows: each with `input_ids` and, if not everything is trained, `labels`.
        tokenizer: one with a padding token.
        strategy: one of `STRATEGIES`.
        max_length: where padding cuts a row (as SFTTrainer does, at the end) and packing
            ends one; flattening knows no limit.

    Returns:
        The batch, with the sample of each token.

    Raises:
        ValueError: for an unknown strategy, empty rows, or no padding token.

    Example:
        >>> lay_out(rows, tokenizer, "padding (TRL)").padding  # doctest: +SKIP
    """
    one_of("strategy", strategy, STRATEGIES)
    whole_number("max_length", max_length)
    lengths = [len(row["input_ids"]) for row in rows]
    if not lengths or not all(lengths):
        raise ValueError("rows must hold at least one row, and no row may be empty")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no padding token: run chat.prepare_tokenizer first")
    columns: list[dict[str, Any]] = [
        {
            "input_ids": list(row["input_ids"]),
            "labels": list(row.get("labels", row["input_ids"])),
            "sample": [number] * len(row["input_ids"]),
        }
        for number, row in enumerate(rows)
    ]
    for number, (row, length) in enumerate(zip(columns, lengths, strict=True)):
        if len(row["labels"]) != length:
            raise ValueError(f"rows[{number}] has {length} ids but {len(row['labels'])} labels")
    if strategy == "padding (TRL)":
        columns = [{name: c[:max_length] for name, c in row.items()} for row in columns]
    elif strategy.startswith("packing: "):
        from datasets import Dataset
        from trl import pack_dataset

        kind = strategy.removeprefix("packing: ")
        packed = pack_dataset(Dataset.from_list(columns), max_length, kind)
        columns = packed.with_format(None).to_list()
    collate = _collator(strategy, tokenizer)
    numbers = [row.pop("sample") for row in columns]
    batch = collate(columns)
    # The same collator, given sample numbers for ids, tells whose token went where.
    traced = [{**row, "input_ids": n} for row, n in zip(columns, numbers, strict=True)]
    samples = collate(traced)["input_ids"]
    if "attention_mask" in batch:
        samples = samples.masked_fill(batch["attention_mask"] == 0, PADDING)
    return Layout(strategy, batch, samples, lengths)


def _collator(strategy: str, tokenizer: Tokenizer) -> Callable[[list], dict[str, torch.Tensor]]:
    """A library's collator; of its batch, what every kind of attention understands."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator: Callable[[list], Mapping[str, Any]]
    if strategy == "flattening (transformers)":
        collator = transformers.DataCollatorWithFlattening()
    else:  # SFTTrainer does the same: padding-free for all packing but the wrapped
        free = strategy not in {"padding (TRL)", "packing: wrapped"}
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=free)

    def collate(rows: list) -> dict[str, torch.Tensor]:
        batch = collator(rows)
        names = ("input_ids", "labels", "attention_mask", "position_ids")
        return {name: batch[name] for name in names if name in batch}

    return collate


@torch.no_grad()
def leak(model: PreTrainedModel, layout: Layout, *, seed: int = 0) -> float:
    """How far one sample's words reach into the others: nothing assumed, the model asked.

    Args:
        model: the one that will train, with its own kind of attention.
        layout: at least two samples; all tokens of the first are replaced.
        seed: of the words that replace them.

    Returns:
        The largest change of any logit at another sample: 0, or rounding noise below 1e-4,
        means that the samples are really apart; more is contamination. It depends on the
        architecture: OPT and Falcon leak where Llama does not.

    Raises:
        ValueError: if the layout holds a single sample.

    Example:
        >>> leak(model, lay_out(rows, tokenizer, "packing: wrapped"))  # doctest: +SKIP
    """
    samples = layout.samples
    first = samples == samples[samples != PADDING][0]
    others = ~first & (samples != PADDING)
    if not others.any():
        raise ValueError("layout holds a single sample: give lay_out at least two rows")
    inputs = {k: tensor.to(model.device) for k, tensor in layout.batch.items() if k != "labels"}
    changed = inputs["input_ids"].clone()
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    words = torch.randint(vocabulary, (int(first.sum()),), generator=generator)
    changed[first] = words.to(model.device)
    training = model.training
    model.eval()  # dropout would look like a leak
    try:
        before = model(**inputs, use_cache=False).logits[others]
        after = model(**{**inputs, "input_ids": changed}, use_cache=False).logits[others]
    finally:
        model.train(training)
    return (before.float() - after.float()).abs().max().item()


def compare(
    rows: Rows,
    tokenizer: Tokenizer,
    *,
    max_length: int = 64,
    model: PreTrainedModel | None = None,
) -> DataFrame:
    """Every strategy on the same rows, as one table: size, padding, lost tokens, cut samples.

    Args:
        rows: as for `lay_out`, like `tokenizer` and `max_length`.
        tokenizer: one with a padding token.
        max_length: where padding cuts a row and packing ends one.
        model: if given, `leak` measures the column "crosses samples".

    Example:
        >>> compare(rows, tokenizer, model=model)  # doctest: +SKIP
    """
    table = []
    for strategy in STRATEGIES:
        layout = lay_out(rows, tokenizer, strategy, max_length=max_length)
        height, width = layout.samples.shape
        entry = {
            "strategy": strategy,
            "rows × width": f"{height} × {width}",
            "padding": f"{layout.padding:.0%}",
            "tokens lost": layout.lost,
            "samples cut": layout.cut,
            "boundaries in": "position_ids" if "position_ids" in layout.batch else "rows",
        }
        if strategy == "packing: wrapped":
            entry["boundaries in"] = "nowhere"
        if model is not None:
            entry["crosses samples"] = "yes" if leak(model, layout) > 1e-4 else "no"
        table.append(entry)
    return DataFrame(table).set_index("strategy")


def plot(layouts: Sequence[Layout]) -> Figure:
    """Layouts as pictures: a color and a number per sample, white borders, gray for padding.

    Args:
        layouts: one strip each, from top to bottom.

    Example:
        >>> plot([lay_out(rows, tokenizer, name) for name in STRATEGIES])  # doctest: +SKIP
    """
    palette = ListedColormap([f"#{color}" for color in ("DDDDDD", *_PALE.split())])
    look: dict[str, Any] = {"cmap": palette, "vmin": 0, "vmax": 9, "interpolation": "nearest"}
    heights = [len(layout.samples) + 1 for layout in layouts]
    shared: dict[str, Any] = {"sharex": True, "squeeze": False, "height_ratios": heights}
    height = 0.25 * sum(heights) + 0.5 * len(layouts)
    fig, axes = plots.figure(len(layouts), width=9, height=height, **shared)
    for ax, layout in zip(axes[:, 0], layouts, strict=True):
        shown = (layout.samples % 9 + 1).masked_fill(layout.samples == PADDING, 0)
        ax.imshow(shown.numpy(), aspect="auto", **look)
        for row, samples in enumerate(layout.samples):
            for number in samples.unique_consecutive().tolist():
                columns = torch.where(samples == number)[0].tolist()
                corner = columns[0] - 0.5, row - 0.5
                ax.add_patch(Rectangle(corner, len(columns), 1, fill=False, ec="white", lw=2))
                if number != PADDING:
                    middle = sum(columns) / len(columns)
                    ax.text(middle, row, str(number), ha="center", va="center", fontsize=7)
        ax.set(title=f"{layout.strategy}: {layout.padding:.0%} padding", yticks=[], ylabel="rows")
        ax.grid(False)
    widest = max(layout.samples.shape[1] for layout in layouts)
    axes[-1, 0].set(xlabel="tokens", xlim=(-0.5, widest - 0.5))  # or the last picture decides
    return fig
