"""Chapter 3: what adapters cost, where they go, and why one does not learn."""

import copy
import math
import re

from helpers.course.exercises import Exercise, Wrong, near, one_number


def _is_near(mine, reference):
    """Same shape, and equal up to float32 rounding."""
    import torch

    return mine.shape == reference.shape and torch.allclose(
        mine.float(), reference, atol=1e-4, rtol=1e-4
    )


def _matrices(inputs, outputs, rank):
    """A weight (outputs, inputs) with A and B, drawn the same way each time."""
    import torch

    draw = torch.Generator().manual_seed(rank)
    shapes = ((outputs, inputs), (rank, inputs), (outputs, rank))
    return [torch.randn(*shape, generator=draw) for shape in shapes]


# ── 3.1 ──────────────────────────────────────────────────────────────────────────────────
def _check_cost(answer):
    number = one_number(answer)
    if number == 16 * (576 + 1536):
        return (
            "Sum instead of product: that is the whole saving. The layer itself has "
            "884,736 weights, and doubling the rank only doubles your number."
        )
    if number == 576 * 1536:
        raise Wrong("That is the frozen layer. Count A and B instead.")
    if number in (16 * 576, 16 * 1536):
        raise Wrong("That is one of the two thin matrices. The other one trains as well.")
    if number == 16 * 576 * 1536:
        raise Wrong("The rank multiplies a sum here, not a product: write down both shapes.")
    if number == 2 * 16 * 576 or number == 2 * 16 * 1536:
        raise Wrong("A and B have different lengths here: the layer is not square.")
    raise Wrong("Write down the shapes of A and of B, and add up their elements.")


# ── 3.2 ──────────────────────────────────────────────────────────────────────────────────
def _check_forward(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (x, W, A, B, alpha).")
    for inputs, outputs, rank in ((7, 5, 3), (4, 4, 4), (6, 9, 1)):
        W, A, B = _matrices(inputs, outputs, rank)
        x = torch.randn(2, inputs, generator=torch.Generator().manual_seed(1))
        for alpha in (16, rank):
            mine = answer(x, W.clone(), A.clone(), B.clone(), alpha)
            if not isinstance(mine, torch.Tensor):
                raise Wrong(f"It returned a {type(mine).__name__}; return a tensor.")
            base, detour = x @ W.T, x @ A.T @ B.T
            if _is_near(mine, base + alpha / rank * detour):
                continue
            if mine.shape != base.shape:
                raise Wrong(
                    f"For x of shape (2, {inputs}) the output is (2, {outputs}); yours is "
                    f"{tuple(mine.shape)}."
                )
            if _is_near(mine, alpha / rank * detour):
                raise Wrong("That is the detour alone. The frozen layer still answers too.")
            if _is_near(mine, base + detour):
                raise Wrong("Both paths are there; the detour is not scaled yet.")
            if _is_near(mine, base + alpha * detour):
                raise Wrong("You scaled by alpha alone. The rank has a say in it.")
            if _is_near(mine, base + alpha / math.sqrt(rank) * detour):
                raise Wrong("That is rsLoRA's scaling; the plain one divides by the rank.")
            if _is_near(mine, alpha / rank * (base + detour)):
                raise Wrong("The scaling belongs to the detour, not to the sum.")
            raise Wrong("The shape is right, the numbers are not: go path by path.")
    return (
        "Note the order: x A first, then B. The wide product B A is never formed, so a "
        "training step costs two thin products and not a second full one."
    )


# ── 3.3 ──────────────────────────────────────────────────────────────────────────────────
def _check_alpha(answer):
    number = one_number(answer)
    if near(number, 2 * math.sqrt(32)):
        return (
            "With rsLoRA, the alpha to keep grows with the root of the rank, plain LoRA's "
            "with the rank. People who only flip `use_rslora` raise the scaling unawares."
        )
    if near(number, 64):
        raise Wrong("64 is right for plain LoRA. rsLoRA divides by something smaller.")
    if near(number, 16):
        raise Wrong(
            f"Keeping alpha gives a scaling of {16 / math.sqrt(32):.2f}, more than the 2 "
            "of the first adapter."
        )
    if near(number, 16 * math.sqrt(32)):
        raise Wrong("You multiplied alpha by the root; it is the scaling that is given.")
    raise Wrong("First the scaling of the old adapter; then solve for the new alpha.")


# ── 3.4 ──────────────────────────────────────────────────────────────────────────────────
def _check_break_even(answer):
    number, exact = one_number(answer), 576 * 1536 / (576 + 1536)
    if number == math.floor(exact):
        return (
            "Far above any rank in use: at r = 16, an adapter has about 4 % of the layer's "
            "weights. For a square layer, break-even is at half its width."
        )
    if number == math.ceil(exact):
        raise Wrong("At this rank the adapter is already the larger of the two.")
    if near(number, exact):
        raise Wrong("That is where they are equal; a rank is a whole number, and fewer.")
    if number == 576:
        raise Wrong("576 is full rank. The adapter is larger than the layer long before.")
    raise Wrong("Set r (in + out) against in times out and solve for r.")


# ── 3.5 ──────────────────────────────────────────────────────────────────────────────────
def _tiny_gpt2():
    """GPT-2 with two small, random blocks: fused c_attn, and two kinds of c_proj."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=32, vocab_size=64)
        )


def _check_targets(answer):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if isinstance(answer, str) or not all(isinstance(name, str) for name in answer):
        raise Wrong("Give a list of module names, such as ['q_proj', 'v_proj'].")
    config = LoraConfig(target_modules=list(answer), fan_in_fan_out=True)
    try:
        model = get_peft_model(_tiny_gpt2(), config)
    except ValueError as error:
        said = re.sub(r"\(\n.*?\n\)", "", str(error), flags=re.DOTALL).splitlines()[0]
        raise Wrong(f"PEFT refuses these names: {said}") from None
    names = [n for n, m in model.named_modules() if isinstance(m, LoraLayer)]
    stray = [name for name in names if ".attn." not in name]
    if stray:
        where = stray[0].removeprefix("base_model.model.transformer.")
        raise Wrong(
            f"{len(stray)} of the {len(names)} adapted layers are outside attention, such "
            f"as `{where}`: a name matches everything that ends in it."
        )
    if len(names) < 4:
        raise Wrong(f"{len(names)} layers are adapted; two blocks have four in their attention.")
    return (
        "A target is a suffix, so the fix is a longer suffix. c_attn is query, key and "
        "value in one matrix: the three share one A, hence cheaper and a bit less free."
    )


# ── 3.6 ──────────────────────────────────────────────────────────────────────────────────
def _check_conv1d(answer):
    import torch

    if not callable(answer):
        raise Wrong("The answer should be a function of (weight, A, B, alpha).")
    for inputs, outputs, rank, alpha in ((6, 9, 2, 8), (5, 5, 3, 3)):
        W, A, B = _matrices(inputs, outputs, rank)
        weight, delta = W.T.contiguous(), alpha / rank * (B @ A)
        mine = answer(weight.clone(), A.clone(), B.clone(), alpha)
        if not isinstance(mine, torch.Tensor) or mine.shape != weight.shape:
            raise Wrong(f"Return a tensor shaped like the weight, {tuple(weight.shape)}.")
        if _is_near(mine, weight + delta.T):
            continue
        if inputs == outputs and _is_near(mine, weight + delta):
            raise Wrong(
                "Right for a long layer, wrong for a square one: there the missing "
                "transpose fits, silently. Which way round is the weight stored?"
            )
        if _is_near(mine, weight + (B @ A).T):
            raise Wrong("The orientation is right; the scaling alpha / r is missing.")
        if _is_near(mine, weight - delta.T):
            raise Wrong("The update is taken away: that is how to unmerge.")
        raise Wrong("A is (r, in) and B is (out, r); the stored weight is (in, out).")
    return (
        "This transpose is all that `fan_in_fan_out=True` means. On a square layer, nobody "
        "would have told you that it was missing."
    )


# ── 3.7 ──────────────────────────────────────────────────────────────────────────────────
def _stalled_model():
    """A tiny Llama: a finished adapter 'poems' and a new one, 'yoda', that stays put."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4), "poems")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)  # as if trained
        model.add_adapter("yoda", LoraConfig(r=4))
    # Someone thawed the new adapter by hand and never made it the active one. Gradient
    # checkpointing needs inputs with gradients, and so backward() raises no error either.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("yoda" in name)
    model.enable_input_require_grads()
    return model


def _check_repaired(answer):
    import torch

    if not isinstance(answer, torch.nn.Module):
        raise Wrong("Repair the model you were given and answer with the model itself.")
    if not any("yoda" in name for name, _ in answer.named_parameters()):
        raise Wrong("The adapter 'yoda' is gone. It was to be trained, not removed.")
    # Two steps on a copy: B starts at zero, so A has its first gradient in the second.
    model, ids = copy.deepcopy(answer), torch.arange(2, 12).reshape(1, -1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = model(input_ids=ids).logits.detach()
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise Wrong("Now nothing is trainable at all.")
    optimizer = torch.optim.SGD(trainable, lr=1.0)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = [n for n, p in model.named_parameters() if not torch.equal(p, before[n])]
    base = [name for name in moved if "lora_" not in name]
    if base:
        raise Wrong(
            f"It learns, but in the wrong place: {len(base)} tensors of the base model "
            "moved, and they would not be saved with the adapter."
        )
    if any("poems" in name for name in moved):
        raise Wrong("It learns, but 'poems' changed too, and that one was finished work.")
    if not moved or torch.equal(model(input_ids=ids).logits, logits):
        raise Wrong(
            "Two steps of training still change nothing. There are trainable parameters, "
            "so ask the other question: does the forward pass go through them?"
        )
    still = [n for n, _ in model.named_parameters() if "yoda" in n and n not in moved]
    if still:
        raise Wrong(f"'yoda' learns in part: {len(still)} of its tensors never moved.")
    return (
        "`set_adapter` does both halves: it routes the forward pass through the adapter "
        "and makes it the trainable one. Flags set by hand do only the half that shows."
    )


EXERCISES = [
    Exercise(
        "3.1",
        "The price of one adapter",
        _check_cost,
        hints=("A has the shape (r, in), B has (out, r).", "r times in, plus out times r."),
        solution="answer = 16 * 576 + 1536 * 16\n",
    ),
    Exercise(
        "3.2",
        "Two forward passes",
        _check_forward,
        hints=(
            "A linear layer with weight W of shape (out, in) computes x @ W.T.",
            "The detour is x @ A.T @ B.T, and the rank is A.shape[0].",
        ),
        solution=(
            "def answer(x, W, A, B, alpha):\n"
            "    rank = A.shape[0]\n"
            "    return x @ W.T + alpha / rank * (x @ A.T @ B.T)\n"
        ),
    ),
    Exercise(
        "3.3",
        "The same scaling at another rank",
        _check_alpha,
        hints=(
            "The first adapter has a scaling of 16 / 8.",
            "rsLoRA: scaling = alpha / sqrt(rank). Solve 2 = alpha / sqrt(32).",
        ),
        solution="import math\n\nanswer = 16 / 8 * math.sqrt(32)\n",
    ),
    Exercise(
        "3.4",
        "Where LoRA stops saving",
        _check_break_even,
        hints=("The adapter has r (in + out) weights.", "Divide in · out by in + out."),
        solution="answer = (576 * 1536) // (576 + 1536)\n",
    ),
    Exercise(
        "3.5",
        "Attention only, on GPT-2",
        _check_targets,
        hints=(
            "Print the names: `[name for name, _ in model.named_modules()]`.",
            "Two modules of a block are called c_proj; 'attn.' in front tells them apart.",
        ),
        solution='answer = ["c_attn", "attn.c_proj"]\n',
        given=_tiny_gpt2,
    ),
    Exercise(
        "3.6",
        "Merging into a transposed weight",
        _check_conv1d,
        hints=(
            "B @ A has the shape (out, in).",
            "Transpose the update before you add it.",
        ),
        solution=(
            "def answer(weight, A, B, alpha):\n    return weight + alpha / A.shape[0] * (B @ A).T\n"
        ),
    ),
    Exercise(
        "3.7",
        "A model that does not learn",
        _check_repaired,
        hints=(
            "`lora.check_training(model)` names what it sees; then find out why.",
            "`model.active_adapters` says which adapter the forward pass uses.",
            "One call activates an adapter, thaws it and freezes the others.",
        ),
        solution='model = given\nmodel.set_adapter("yoda")\nanswer = model\n',
        given=_stalled_model,
    ),
]
