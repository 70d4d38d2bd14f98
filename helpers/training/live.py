"""The loss, drawn while training runs (Chapter 0)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["LiveLoss"]


class LiveLoss(TrainerCallback):
    """Draws the loss while training runs, with its held-out twin where there is one.

    In a notebook one figure is redrawn at every log and stays when training ends; in a
    terminal each log is a line. An evaluation before training is step 0 of the curve.

    Example:
        >>> from transformers import TrainerState
        >>> live = LiveLoss()  # SFTTrainer(..., callbacks=[live]) makes the next call
        >>> live.on_log(None, TrainerState(global_step=1, epoch=0.5), None, {"loss": 2.0})
        step 1  epoch 0.5  seconds 0.0  loss 2.0
        >>> live.table().loc[1, "loss"].item()
        2.0
    """

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, float]] = {}
        self._handle: Any = None  # of the displayed figure
        self._started: float | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock; of what was logged, keep a first evaluation of this model."""
        if any(self._rows):
            self._rows.clear()
        self._handle = None
        self._started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Take the newest figures and show the curve."""
        names = {"loss": "loss", "eval_loss": "held-out loss"}
        logs = logs or {}
        losses = {said: logs[name] for name, said in names.items() if name in logs}
        if not losses:
            return
        step, now = state.global_step, time.perf_counter()
        seconds = round(now - (self._started or now), 1)  # before training: 0
        row = self._rows.setdefault(step, {})
        row |= {"step": step, "epoch": round(state.epoch or 0, 2), "seconds": seconds} | losses
        self._show(row)

    def _show(self, row: dict[str, float]) -> None:
        from IPython import display, get_ipython

        if get_ipython() is None:
            print("  ".join(f"{name} {value}" for name, value in row.items()))
        elif self._handle is None:
            self._handle = display.display(self.plot(), display_id=True)
        else:
            self._handle.update(self.plot())

    def table(self) -> pd.DataFrame:
        """What was logged, a row per step: epoch, seconds, loss and held-out loss.

        Raises:
            ValueError: when nothing has been logged yet.
        """
        import pandas as pd

        if not self._rows:
            raise ValueError(
                "LiveLoss has no log yet: give it to a trainer (callbacks=[live]) and "
                "train or evaluate; logging_steps must be no more than the run has steps"
            )
        return pd.DataFrame(list(self._rows.values())).set_index("step")

    def plot(self) -> Figure:
        """The losses against the step, on a logarithmic scale.

        Raises:
            ValueError: when nothing has been logged yet.
        """
        from helpers import plots

        table = self.table()
        fig, ax = plots.figure(height=2.8)
        for name, color, marker in (("loss", "blue", ""), ("held-out loss", "orange", "o")):
            if name in table:
                points = table[name].dropna()
                ax.plot(points, color=plots.COLORS[color], marker=marker, label=name)
        ax.set(xlabel="optimizer step", ylabel="loss (nats per token)")
        ax.set_yscale("log", subs=(2, 3, 5))
        ax.yaxis.set_major_formatter("{x:g}")  # no powers of ten, however short the axis
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_title("Loss while training")
        ax.legend()
        return fig
