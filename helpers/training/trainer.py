"""What SFTTrainer does not offer: a lean loss, live curves, machine settings (Chapter 0).

TRL trains; these are the few pieces around it that make a 2-core laptop a place to
fine-tune: see `tests/benchmarks/cpu_training.py` for what each of them buys.
"""

import contextlib
import time

import torch
from torch.nn import functional
from transformers import PrinterCallback, TrainerCallback
from trl import SFTTrainer

from helpers.models import dequantized_once


def machine_settings(runtime):
    """`SFTConfig` keywords that the machine decides, not the lesson (Chapter 0).

    runtime: what `runtime.start()` returned. On a CPU activation checkpointing is off
    (memory is plenty, recomputing costs time) and so is autocast, since the model was
    loaded in the dtype it should compute in. A GPU gets autocast in its native 16-bit
    type. Rows of similar length share a batch, so that little padding is computed. A loss
    that is not a number is logged as such; transformers would log the others' mean instead.
    """
    on_gpu = runtime.device == "cuda"
    return {
        "use_cpu": not on_gpu,
        "bf16": on_gpu and runtime.compute_dtype == torch.bfloat16,
        "fp16": on_gpu and runtime.compute_dtype == torch.float16,
        "activation_checkpointing": on_gpu,
        "dataloader_pin_memory": on_gpu,
        "train_sampling_strategy": "group_by_length",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


# What TRL's head scores at once, tokens x vocabulary. Up to this its tiles save nothing.
TILE = 4096 * 32_768


class LeanSFTTrainer(SFTTrainer):
    """SFTTrainer for short answers: vocabulary scores only where a label is trained.

    The same loss and gradients as SFTTrainer's (tested), without scores for the prompt
    and padding, without the tokens behind the last trained one, and without entropy
    metrics, which on a CPU cost more than the adapters. It forgoes TRL's head, which never
    holds more scores than a tile: on a GPU, where the answers of a batch would need more
    (`tiles_save_memory`), that head computes the loss after all. Where no token is trained
    the loss is nan, as the model's own is, and not TRL's 0.
    On a CPU all that is not quantized shares one dtype, and 4-bit weights are unpacked
    once per run instead of twice per step (`match_dtypes`, `dequantized_once`). With
    `fp16=True` (a T4) what is trained is float32, the only type the gradient scaler takes.
    Where a notebook sees several cards it trains on the first.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if any(isinstance(c, LiveLoss) for c in self.callback_handler.callbacks):
            self.remove_callback(PrinterCallback)  # would print every figure once more
        if self.args.fp16:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        elif self.args.use_cpu:  # a GPU mixes types for free, and has no memory to spare
            match_dtypes(self.model)

    def create_accelerator_and_postprocess(self):
        """Settle for one card before the parent looks how many there are.

        One process that sees several would wrap the model in `nn.DataParallel`, which TRL
        refuses; processes of their own (`accelerate launch`) see one each.
        """
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1
        super().create_accelerator_and_postprocess()

    def train(self, *args, **kwargs):
        """Train as the parent does; on a CPU, with weights dequantized once."""
        with self.weights_in_training():
            return super().train(*args, **kwargs)

    def weights_in_training(self):
        """The context that training runs in: on a CPU, 4-bit weights stay unpacked."""
        return dequantized_once(self.model) if self.args.use_cpu else contextlib.nullcontext()

    def floating_point_ops(self, inputs):
        """Zero: the parent walks all parameters at every step for this log entry."""
        return 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy over the trained tokens of the (accumulated) batch."""
        # The scores at position t predict the token at t + 1.
        targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        many = tiles_save_memory(targets.device.type, targets, vocabulary)
        if return_outputs or many:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        targets, inputs = _without_tail(targets, inputs)
        trained = targets != -100
        with _scores_only_at(model, trained):
            logits = model(**inputs, use_cache=False).logits
        loss = functional.cross_entropy(logits.float(), targets[trained], reduction="sum")
        if num_items_in_batch is None:
            return loss / trained.sum()
        if self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes
        return loss / num_items_in_batch


def tiles_save_memory(device, targets, vocabulary):
    """Whether a batch has more scores than TRL's head holds at once, on a GPU (Chapter 5).

    device: 'cuda' or 'cpu', where that head is slower and memory plenty. targets: labels of
    any shape, -100 where none is trained. vocabulary: rows of the head.
    """
    return device == "cuda" and int((targets != -100).sum()) * vocabulary > TILE


def _without_tail(targets, inputs):
    # Behind the last trained token of the batch nothing matters: no earlier position of a
    # causal model looks there. Two of some thirty tokens in a short chat.
    columns = (targets != -100).any(0).nonzero()
    if not len(columns) or set(inputs) != {"input_ids", "attention_mask"}:
        return targets, inputs  # nothing trained, or packed: lengths stand elsewhere too
    length = int(columns[-1]) + 1
    return targets[:, :length], {name: x[:, :length] for name, x in inputs.items()}


@contextlib.contextmanager
def _scores_only_at(model, positions):
    # The head is the last thing a language model computes. Narrowing what goes in leaves
    # everything after it (scaling, soft caps) to the model's own forward.
    unwrapped = getattr(model, "module", model)
    head = unwrapped.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()


def simple_loop(
    model, batches, *, lr, accumulation=1, schedule="linear", warmup_steps=0, max_norm=1.0
):
    """What a trainer does, in plain PyTorch; returns the loss of every update (Chapter 5).

    batches: dicts with input_ids, attention_mask and labels of shape (rows, tokens), -100
    where nothing is learned. accumulation: batches per update. schedule, warmup_steps: as
    `lr_scheduler_type` and `warmup_steps`. max_norm: gradients are clipped to it.
    The losses equal SFTTrainer's on the same batches (tested). There is no gradient scaler:
    raises ValueError for a float16 model, whose small gradients would become zero.
    """
    from transformers import get_scheduler

    _refuse_float16(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    groups = [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]
    scheduler = get_scheduler(schedule, optimizer, warmup_steps, len(groups))
    losses = []
    model.train()
    for group in groups:
        # Every trained token of the update counts the same, whatever batch it is in.
        tokens = sum((batch["labels"][:, 1:] != -100).sum() for batch in group)
        total = 0.0
        for batch in group:
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]  # position t predicts token t + 1
            loss = functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
            )
            (loss / tokens).backward()
            total += (loss / tokens).item()
        torch.nn.utils.clip_grad_norm_(trained, max_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _refuse_float16(model):
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError(
            "model holds float16 weights, which need a gradient scaler: load it with "
            "dtype='float32' (or 'bfloat16'), or train it with LeanSFTTrainer and fp16=True"
        )


def match_dtypes(model):
    """Cast what is not quantized to the dtype the model computes in; returns the model.

    Adapters and the base may disagree (TRL makes adapters of 4-bit models bfloat16,
    `prepare_model_for_kbit_training` makes norms and embeddings float32), and every
    disagreement is a cast per layer and step, or silently the slower kind of product.
    """
    config = getattr(model.config, "quantization_config", None)
    # A config of 8-bit layers has a 4-bit compute dtype too, which nothing computes in.
    four_bit = getattr(config, "load_in_4bit", False)
    dtype = config.bnb_4bit_compute_dtype if four_bit else model.dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model


class LiveLoss(TrainerCallback):
    """Draws the loss while training runs, with its held-out twin where there is one.

    Add it to a trainer: `callbacks=[LiveLoss()]`. In a notebook one figure is redrawn at
    every log and stays when training ends; in a terminal it prints a line per log.
    `.table()` gives the numbers as a DataFrame, `.plot()` the figure, afterwards too; both
    raise ValueError before anything was logged. An evaluation before training is step 0.
    """

    def __init__(self):
        self.history = []
        self._handle = None
        self._started = None

    def on_train_begin(self, args, state, control, **_):
        """Start the clock; of what was logged, keep a first evaluation of this model."""
        if any(row["step"] for row in self.history):
            self.history.clear()
        self._handle = None
        self._started = time.perf_counter()

    def on_log(self, args, state, control, logs=None, **_):
        """Take the newest figures and redraw."""
        if not logs or not {"loss", "eval_loss"} & set(logs):
            return
        entry = {"step": state.global_step, "epoch": round(state.epoch or 0, 2)}
        now = time.perf_counter()
        entry["seconds"] = round(now - (self._started or now), 1)  # before training: 0
        if "loss" in logs:
            entry["loss"] = logs["loss"]
        if "eval_loss" in logs:
            entry["held-out loss"] = logs["eval_loss"]
        self._merge(entry)
        self._show()

    def _merge(self, entry):
        if self.history and self.history[-1]["step"] == entry["step"]:
            self.history[-1].update(entry)
        else:
            self.history.append(entry)

    def _show(self):
        from IPython import get_ipython

        if get_ipython() is None:
            print("  ".join(f"{name} {value}" for name, value in self.history[-1].items()))
            return
        from IPython.display import display

        if self._handle is None:
            self._handle = display(self.plot(), display_id=True)
        else:
            self._handle.update(self.plot())

    def _logged(self):
        if not self.history:
            raise ValueError(
                "LiveLoss has no log yet: give it to a trainer (callbacks=[live]) and "
                "train or evaluate; logging_steps must be no more than the run has steps"
            )
        return self.history

    def table(self):
        """What was logged: step, epoch, seconds, loss and held-out loss, as a DataFrame."""
        import pandas as pd

        return pd.DataFrame(self._logged()).set_index("step")

    def plot(self):
        """The loss against the step, on a logarithmic scale; a matplotlib Figure."""
        from helpers import plots

        fig, ax = plots.figure(height=2.8)
        for name, color, marker in (
            ("loss", "blue", ""),
            ("held-out loss", "orange", "o"),
        ):
            points = [(row["step"], row[name]) for row in self._logged() if name in row]
            if points:
                ax.plot(
                    *zip(*points, strict=True),
                    color=plots.COLORS[color],
                    marker=marker,
                    label=name,
                )
        ax.set(xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
        ax.set_title("Training loss")
        ax.legend()
        return fig
