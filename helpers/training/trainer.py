"""SFTTrainer for short answers and small machines (Chapter 0).

TRL trains; these are the few pieces around it that make a 2-core laptop a place to
fine-tune: see `tests/benchmarks/cpu_training.py` for what each of them buys.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, PrinterCallback
from trl import SFTTrainer

from helpers.models import dequantized_once
from helpers.training.live import LiveLoss

if TYPE_CHECKING:
    from helpers.runtime import Runtime

__all__ = ["LeanSFTTrainer", "machine_settings", "match_dtypes"]

Model = TypeVar("Model", bound=nn.Module)

# What TRL's head scores at once, tokens x vocabulary. Up to this its tiles save nothing.
_TILE = 4096 * 32_768


def machine_settings(runtime: Runtime) -> dict[str, Any]:
    """`SFTConfig` keywords that the machine decides, not the lesson (Chapter 0).

    A CPU has memory to spare and computes in the dtype that the model was loaded in: no
    checkpointing, no autocast. A GPU gets both, autocast in its native 16-bit type. Rows of
    similar length share a batch, so that little padding is computed, and a loss that is not
    a number is logged as such.

    Args:
        runtime: what `runtime.start()` returned.

    Example:
        >>> from helpers import runtime
        >>> settings = machine_settings(runtime.detect())
        >>> settings["use_cpu"] != settings["activation_checkpointing"]
        True
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


class LeanSFTTrainer(SFTTrainer):
    """SFTTrainer for short answers: vocabulary scores only where a label is trained.

    The same loss and gradients as SFTTrainer's (tested), without scores for prompt and
    padding, without the tokens behind the last trained one, and without entropy metrics,
    which on a CPU cost more than the adapters. On a GPU, where the answers of a batch need
    more scores than TRL's head holds at once, that head computes the loss after all. Where
    no token is trained the loss is nan, as the model's own is.
    On a CPU all that is not quantized shares one dtype (`match_dtypes`), and 4-bit weights
    are unpacked once per run. With `fp16=True` (a T4) what is trained is float32, the only
    type the gradient scaler takes. Of several cards it uses the first.

    Args:
        *args: as SFTTrainer's, and so are the keywords.
        **kwargs: `model`, `args`, `train_dataset`, `processing_class`, `peft_config`, ...

    Example:
        >>> trainer = LeanSFTTrainer(
        ...     model, args=SFTConfig("out", **machine_settings(runtime.start())),
        ...     train_dataset=rows, processing_class=tokenizer, peft_config=LoraConfig(),
        ... )  # doctest: +SKIP
    """

    model: PreTrainedModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if any(isinstance(c, LiveLoss) for c in self.callback_handler.callbacks):
            self.remove_callback(PrinterCallback)  # would print every figure once more
        if self.args.fp16:
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        elif self.args.use_cpu:  # a GPU mixes types for free, and has no memory to spare
            match_dtypes(self.model)

    def create_accelerator_and_postprocess(self) -> None:
        """Settle for one card: of several, the parent makes `nn.DataParallel`, refused by TRL."""
        if self.args.n_gpu > 1:
            self.args._n_gpu = 1
        super().create_accelerator_and_postprocess()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent does; on a CPU, with weights dequantized once."""
        with self._training_context():
            return super().train(*args, **kwargs)

    def _training_context(self) -> contextlib.AbstractContextManager[Any]:
        return dequantized_once(self.model) if self.args.use_cpu else contextlib.nullcontext()

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Zero: the parent walks all parameters at every step for this log entry."""
        return 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Mean cross-entropy over the trained tokens of the (accumulated) batch."""
        # The scores at position t predict the token at t + 1.
        targets = functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
        vocabulary = self.model.get_output_embeddings().weight.shape[0]
        many = _tiles_save_memory(targets.device.type, targets, vocabulary)
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


def _tiles_save_memory(device: str, targets: torch.Tensor, vocabulary: int) -> bool:
    # On a CPU TRL's head is slower, and memory plenty.
    return device == "cuda" and int((targets != -100).sum()) * vocabulary > _TILE


def _without_tail(targets: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, dict]:
    # Behind the last trained token of the batch nothing matters: no earlier position of a
    # causal model looks there. Two of some thirty tokens in a short chat.
    columns = (targets != -100).any(0).nonzero()
    if not len(columns) or set(inputs) != {"input_ids", "attention_mask"}:
        return targets, inputs  # nothing trained, or packed: lengths stand elsewhere too
    length = int(columns[-1]) + 1
    return targets[:, :length], {name: x[:, :length] for name, x in inputs.items()}


@contextlib.contextmanager
def _scores_only_at(model: nn.Module, positions: torch.Tensor) -> Iterator[None]:
    # The head is the last thing a language model computes. Narrowing what goes in leaves
    # everything after it (scaling, soft caps) to the model's own forward.
    unwrapped: Any = getattr(model, "module", model)
    head = unwrapped.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()


def match_dtypes(model: Model) -> Model:
    """Cast what is not quantized to the dtype the model computes in (Chapter 5).

    Adapters and the base may disagree (TRL makes adapters of 4-bit models bfloat16,
    `prepare_model_for_kbit_training` makes norms and embeddings float32), and every
    disagreement is a cast per layer and step, or silently the slower kind of product.

    Args:
        model: a model of transformers or PEFT, changed in place.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=9))
        >>> model.lm_head.bfloat16()
        Linear(in_features=8, out_features=9, bias=False)
        >>> {p.dtype for p in match_dtypes(model).parameters()}
        {torch.float32}
    """
    config: Any = getattr(model.config, "quantization_config", None)
    # A config of 8-bit layers has a 4-bit compute dtype too, which nothing computes in.
    four_bit = getattr(config, "load_in_4bit", False)
    dtype: Any = config.bnb_4bit_compute_dtype if four_bit else model.dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model
