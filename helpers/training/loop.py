"""What a trainer does, in plain PyTorch (Chapter 5)."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.functional import cross_entropy

__all__ = ["simple_loop"]


def simple_loop(
    model: nn.Module,
    batches: Sequence[Mapping[str, torch.Tensor]],
    *,
    lr: float,
    gradient_accumulation_steps: int = 1,
    lr_scheduler_type: str = "linear",
    warmup_steps: int = 0,
    max_grad_norm: float = 1.0,
) -> list[float]:
    """Train on the batches in order, with the losses that SFTTrainer has on them (tested).

    Args:
        model: a causal language model of transformers, changed in place.
        batches: dicts of labels, (rows, tokens) with -100 where nothing is learned, and of
            what the model is called with: input_ids, attention_mask, position_ids, ...
        lr: AdamW's learning rate, at its highest.
        gradient_accumulation_steps: batches per update.
        lr_scheduler_type: a name that `transformers.get_scheduler` knows.
        warmup_steps: updates until the learning rate is `lr`.
        max_grad_norm: the length that gradients are clipped to.

    Returns:
        The loss of every update, in nats per trained token.

    Raises:
        ValueError: for float16 weights, whose small gradients would become zero without
            a gradient scaler, and for an update without a trained token.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, vocab_size=9))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        >>> first, second = simple_loop(model, [batch] * 2, lr=0.01)
        >>> second < first
        True
    """
    from transformers import get_scheduler

    n = gradient_accumulation_steps
    groups = [batches[i : i + n] for i in range(0, len(batches), n)]
    _check(model, groups)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    steps = warmup_steps, len(groups)
    scheduler = get_scheduler(lr_scheduler_type, optimizer, *steps)
    losses = []
    model.train()
    for group in groups:
        # Position t predicts token t + 1. Every trained token of the update
        # counts the same, whatever batch it is in.
        labels = [batch["labels"][:, 1:].flatten() for batch in group]
        tokens = (torch.cat(labels) != -100).sum()
        total = 0.0
        for batch, y in zip(group, labels, strict=True):
            inputs = {k: x for k, x in batch.items() if k != "labels"}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            loss = cross_entropy(logits.flatten(0, 1), y, reduction="sum")
            (loss / tokens).backward()
            total += (loss / tokens).item()
        torch.nn.utils.clip_grad_norm_(trained, max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _check(model: nn.Module, groups: list) -> None:
    if any(p.dtype == torch.float16 for p in model.parameters()):
        raise ValueError(
            "model holds float16 weights, which need a gradient scaler: load it with "
            "dtype='float32' (or 'bfloat16'), or train it with LeanSFTTrainer and fp16=True"
        )
    for update, group in enumerate(groups, 1):
        if all((batch["labels"][:, 1:] == -100).all() for batch in group):
            raise ValueError(
                f"batches of update {update} have no trained token (all labels are -100), and a "
                "loss of 0 / 0 would make every weight NaN: leave them out"
            )
