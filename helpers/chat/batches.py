"""How rows become batches: padding, flattening and packing, looked at (Chapter 4).

TRL and transformers do the work; this module lays the same rows out in each of their
ways and keeps track of which token came from which sample, so that padding, cuts and
attention across samples can be counted instead of believed.
"""

from dataclasses import dataclass

import torch

PADDING = -1  # in `Layout.samples`: no sample at all


@dataclass(frozen=True)
class Layout:
    """One way to batch some rows: the `batch` a model gets, and whose token is where."""

    strategy: str
    batch: dict  # of tensors, ready for `model(**batch)`
    samples: torch.Tensor  # (rows, tokens): number of the sample, or PADDING
    lengths: list  # tokens of each sample before batching

    @property
    def padding(self):
        """Share of the batch that is padding, from 0 to 1."""
        return (self.samples == PADDING).float().mean().item()

    @property
    def lost(self):
        """Tokens of the rows that did not make it into the batch."""
        return sum(self.lengths) - int((self.samples != PADDING).sum())

    @property
    def cut(self):
        """Samples that were shortened or torn apart."""
        places = self.batch.get("position_ids")
        whole = 0
        for number, length in enumerate(self.lengths):
            where = (self.samples == number).nonzero()
            steps = where.diff(dim=0)  # (0, 1) from token to token: same row, next column
            together = len(where) == length and bool((steps == torch.tensor([0, 1])).all())
            if together and places is not None:
                together = bool((places[where[:, 0], where[:, 1]].diff() == 1).all())
            whole += together
        return len(self.lengths) - whole


def _columns(rows):
    return [
        {
            "input_ids": list(row["input_ids"]),
            "labels": list(row.get("labels", row["input_ids"])),
            "sample": [number] * len(row["input_ids"]),
        }
        for number, row in enumerate(rows)
    ]


def _grid(sequences):
    """Sample numbers of several rows as one tensor, padded on the right."""
    tensors = [torch.tensor(sequence) for sequence in sequences]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=PADDING)


def _pad_trl(rows, tokenizer, max_length):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows = [{name: column[:max_length] for name, column in row.items()} for row in rows]
    batch = DataCollatorForLanguageModeling(tokenizer.pad_token_id)(rows)
    return batch, _grid([row["sample"] for row in rows])


def _pad_transformers(rows, tokenizer, max_length):
    from transformers import DataCollatorForLanguageModeling

    rows = [{name: column[:max_length] for name, column in row.items()} for row in rows]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    batch = collator([{"input_ids": row["input_ids"]} for row in rows])
    samples = _grid([row["sample"] for row in rows])
    if tokenizer.padding_side == "left":
        samples = _grid([row["sample"][::-1] for row in rows]).flip(1)
    return dict(batch), samples


def _flatten_transformers(rows, tokenizer, max_length):
    from transformers import DataCollatorWithFlattening

    kept = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    batch = DataCollatorWithFlattening()(kept)
    return dict(batch), torch.tensor([[n for row in rows for n in row["sample"]]])


def _flatten_trl(rows, tokenizer, max_length):
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=True)
    return _plain(collator(rows)), torch.tensor([[n for row in rows for n in row["sample"]]])


def _packed(strategy):
    def lay_out(rows, tokenizer, max_length):
        from datasets import Dataset, disable_progress_bars, enable_progress_bars
        from datasets.utils import are_progress_bars_disabled
        from trl import pack_dataset
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

        quiet = are_progress_bars_disabled()
        disable_progress_bars()
        try:
            packed = pack_dataset(Dataset.from_list(rows), max_length, strategy)
        finally:
            if not quiet:
                enable_progress_bars()
        # SFTTrainer does the same: padding-free for all but the wrapped strategy.
        free = strategy != "wrapped"
        collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, padding_free=free)
        packed = packed.with_format(None).to_list()
        samples = _grid([row.pop("sample") for row in packed])
        if free:
            samples = samples[samples != PADDING][None]
        return _plain(collator(packed)), samples

    return lay_out


def _plain(batch):
    """What every attention understands; the extra lengths are for flash attention."""
    names = ("input_ids", "labels", "attention_mask", "position_ids")
    return {name: batch[name] for name in names if name in batch}


STRATEGIES = {
    "padding (TRL)": _pad_trl,
    "padding (transformers, mlm=False)": _pad_transformers,
    "flattening (transformers)": _flatten_transformers,
    "padding-free (TRL)": _flatten_trl,
    "packing: wrapped": _packed("wrapped"),
    "packing: bfd": _packed("bfd"),
    "packing: bfd_split": _packed("bfd_split"),
}


def lay_out(rows, tokenizer, strategy, *, max_length=64):
    """Batch all rows in one of the ways in `STRATEGIES`; returns a `Layout` (Chapter 4).

    rows: dictionaries with `input_ids` and, if not everything is trained, `labels`.
    max_length: where padding cuts a row (as SFTTrainer does, at the end) and packing
    ends one. Flattening knows no limit. Raises ValueError for an unknown strategy,
    empty rows, or a tokenizer without a padding token.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy={strategy!r} is not one of {', '.join(STRATEGIES)}")
    rows = _columns(rows)
    if not rows or not all(row["input_ids"] for row in rows):
        raise ValueError("rows must hold at least one row, and no row may be empty")
    if tokenizer.pad_token_id is None:
        raise ValueError("tokenizer has no padding token: run chat.prepare_tokenizer first")
    batch, samples = STRATEGIES[strategy](rows, tokenizer, max_length)
    return Layout(strategy, batch, samples, [len(row["input_ids"]) for row in rows])


@torch.no_grad()
def leak(model, layout, *, seed=0):
    """How far one sample's words reach into the others: a logit change (Chapter 4).

    All tokens of the first sample in the batch are replaced; returned is the largest
    change of any logit at any token of another sample. 0, or rounding noise below 1e-3,
    means that the samples are really apart; more is contamination. Nothing is assumed
    about masks or kernels: the model that will train is the one that is asked.
    Raises ValueError if the batch holds a single sample.
    """
    samples = layout.samples
    first = samples == samples[samples != PADDING][0]
    others = ~first & (samples != PADDING)
    if not others.any():
        raise ValueError("layout holds a single sample: give lay_out at least two rows")
    inputs = {
        name: value.to(model.device) for name, value in layout.batch.items() if name != "labels"
    }
    changed = inputs["input_ids"].clone()
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(model.config.vocab_size, (int(first.sum()),), generator=generator)
    changed[first] = words.to(model.device)
    training = model.training
    model.eval()  # dropout would look like a leak
    try:
        before = model(**inputs, use_cache=False).logits[others]
        after = model(**{**inputs, "input_ids": changed}, use_cache=False).logits[others]
    finally:
        model.train(training)
    return (before.float() - after.float()).abs().max().item()


def compare(rows, tokenizer, *, max_length=64, model=None):
    """Every strategy on the same rows, as one table (Chapter 4).

    With a model, the column "crosses samples" is measured by `leak`.
    """
    import pandas

    table = []
    for strategy in STRATEGIES:
        layout = lay_out(rows, tokenizer, strategy, max_length=max_length)
        height, width = layout.samples.shape
        entry = {
            "strategy": strategy,
            "rows × width": f"{height} × {width}",
            "tokens computed": height * width,
            "padding": f"{layout.padding:.0%}",
            "tokens lost": layout.lost,
            "samples cut": layout.cut,
            "boundaries in": "position_ids" if "position_ids" in layout.batch else "rows",
        }
        if strategy == "packing: wrapped":
            entry["boundaries in"] = "nowhere"
        if model is not None:
            entry["crosses samples"] = "yes" if leak(model, layout) > 1e-3 else "no"
        table.append(entry)
    return pandas.DataFrame(table).set_index("strategy")


def draw(layouts):
    """Layouts as pictures: a color per sample, gray for padding; returns the Figure."""
    import numpy as np
    from matplotlib.colors import ListedColormap

    from helpers import plots

    colors = [plots.COLORS[name] for name in ("blue", "orange", "green", "purple", "sky")]
    rows = [layout.samples.shape[0] for layout in layouts]
    fig, axes = plots.figure(
        len(layouts),
        width=8,
        height=0.25 * sum(rows) + 0.75 * len(layouts),
        sharex=True,
        squeeze=False,
        height_ratios=[count + 1 for count in rows],
    )
    for ax, layout in zip(axes[:, 0], layouts, strict=True):
        grid = layout.samples.numpy()
        shown = np.where(grid == PADDING, 0, grid % len(colors) + 1)
        palette = ListedColormap(["#DDDDDD", *colors])
        ax.imshow(shown, cmap=palette, vmin=0, vmax=len(colors), aspect="auto")
        ax.set(
            title=f"{layout.strategy}: {layout.padding:.0%} padding",
            yticks=[],
            ylabel="rows",
        )
        ax.grid(False)
    axes[-1, 0].set_xlabel("tokens")
    return fig
