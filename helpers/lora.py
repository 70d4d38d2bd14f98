"""Low-rank adapters: written, placed, counted, merged and checked (Chapter 3).

PEFT does the adapting; this module shows how it works and says when it does not: a LoRA
layer to read in one sitting, the linear layers of any architecture, what an adapter will
cost before it exists, what merging loses, and why a model is not learning.
"""

import copy
import html
import math
import re
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

MAX_ROWS = 20  # of a report; what does not fit is summed up in the last row


# ── the layer ────────────────────────────────────────────────────────────────────────────
class LoRALinear(nn.Module):
    """A frozen linear layer plus a trainable low-rank detour, W x + scaling B A x.

    base: an `nn.Linear` of shape (out_features, in_features), plain or quantized; it is
    frozen here. A has shape (rank, in_features) and starts random, B has shape
    (out_features, rank) and starts at zero, so the first output is the base's. scaling is
    alpha / rank, or alpha / sqrt(rank) with `rslora`. dropout acts on the detour's input.
    Raises TypeError or ValueError for another kind of layer or impossible numbers.
    Source: Hu et al. 2021, "LoRA"; Kalajdzievski 2023 for rsLoRA.
    """

    def __init__(self, base, rank=8, alpha=16, dropout=0.0, *, rslora=False):
        super().__init__()
        if not isinstance(base, nn.Linear):
            raise TypeError(
                f"base must be an nn.Linear, not {type(base).__name__}; for GPT-2's Conv1D "
                "use PEFT, whose LoRA layer stores the transposed weight"
            )
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be an int of at least 1, such as 8, not {rank!r}")
        if not 0 < alpha < math.inf:
            raise ValueError(f"alpha must be a positive number such as 16, not {alpha!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), such as 0.05, not {dropout!r}")
        self.base = base.requires_grad_(False)
        self.scaling = alpha / (math.sqrt(rank) if rslora else rank)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # In float32 beside a 16-bit or quantized base: small updates would round away.
        dtype = torch.float64 if base.weight.dtype == torch.float64 else torch.float32
        like = {"bias": False, "device": base.weight.device, "dtype": dtype}
        self.lora_A = nn.Linear(base.in_features, rank, **like)
        self.lora_B = nn.Linear(rank, base.out_features, **like)
        nn.init.zeros_(self.lora_B.weight)
        self.merged = False

    def forward(self, x):
        """The base's output plus the detour's; x has shape (..., in_features)."""
        output = self.base(x)
        if self.merged:
            return output
        detour = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return (output + self.scaling * detour).to(output.dtype)

    def delta(self):
        """The update in full, scaling B A, of shape (out_features, in_features)."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    @torch.no_grad()
    def merge(self):
        """Add the update to the base's weight: one matrix again, as fast as before.

        Does nothing when merged already; while merged, A and B receive no gradient.
        Raises TypeError on a quantized base, whose codes cannot take an addition.
        """
        return self._shift(+1, merged=True)

    @torch.no_grad()
    def unmerge(self):
        """Take the update out of the base's weight again, exact up to rounding."""
        return self._shift(-1, merged=False)

    def _shift(self, sign, merged):
        weight = self.base.weight
        if not weight.is_floating_point():
            raise TypeError(
                f"base holds {weight.dtype} codes, not numbers one can add to: dequantize "
                "it first, or merge into a full-precision copy of the model"
            )
        if self.merged != merged:
            weight += sign * self.delta().to(weight.dtype)
            self.merged = merged
        return self

    def extra_repr(self):
        """What `print(layer)` adds to the names of its parts."""
        return f"scaling={self.scaling:g}, merged={self.merged}"


# ── where to put adapters ────────────────────────────────────────────────────────────────
def find_target_modules(model, *, attention_only=False):
    """The linear layers of any model as short names for `LoraConfig(target_modules=...)`.

    The same layers as PEFT's 'all-linear': every `nn.Linear` (quantized ones too) and
    GPT-2 `Conv1D` except the output head; with `attention_only`, those inside attention
    blocks. A name is as short as it can be without matching any other module, so GPT-2's
    attention gives 'attn.c_proj', because 'c_proj' alone would match its MLP too.
    Raises TypeError for what is no model and ValueError when there is nothing to adapt
    (Chapter 3; QLoRA, section 4, for adapting every linear layer).
    """
    modules = _named_modules(model)
    linear = set(_linear_layers(model))
    wanted = {name for name in linear if not attention_only or _inside_attention(name)}
    if not wanted:
        kinds = Counter(type(module).__name__ for module in modules.values())
        found = ", ".join(f"{kind} × {n}" for kind, n in kinds.most_common(4)) or "nothing"
        what = "linear layers inside attention blocks" if linear else "linear layers"
        advice = "leave attention_only off" if linear else "name its layers yourself"
        raise ValueError(
            f"model ({type(model).__name__}) has no {what} to adapt; it holds {found}. "
            f"Pass a causal language model, or {advice}."
        )
    targets = []
    for name in modules:  # in the model's order, which reads better than the alphabet's
        if name in wanted and not any(_matches(name, target) for target in targets):
            targets.append(_shortest_suffix(name, wanted, modules))
    return targets


def _named_modules(model):
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch module such as a loaded model, not {type(model).__name__}"
        )
    # The children of an adapted layer (base_layer, lora_A, ...) are its private matter.
    modules, private = {}, ()
    for name, module in model.named_modules():
        if name and not name.startswith(private):
            modules[name] = module
            if hasattr(module, "base_layer"):
                private += (f"{name}.",)
    return modules


def _linear_layers(model):
    """{name: layer} of what LoRA adapts by default, the output head left out."""
    from transformers.pytorch_utils import Conv1D

    find_head = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    return {
        name: module
        for name, module in _named_modules(model).items()
        if isinstance(getattr(module, "base_layer", module), nn.Linear | Conv1D)
        and module is not head
    }


def _inside_attention(name):
    return any("attn" in part or "attention" in part for part in name.split("."))


def _matches(name, target):
    return name == target or name.endswith(f".{target}")


def _shortest_suffix(name, wanted, modules):
    parts = name.split(".")
    for length in range(1, len(parts)):
        suffix = ".".join(parts[-length:])
        if all(other in wanted for other in modules if _matches(other, suffix)):
            return suffix
    return name


# ── what an adapter costs, before it exists ──────────────────────────────────────────────
def count_trainable(model, config):
    """How many parameters `get_peft_model(model, config)` will train, by formula.

    Each adapted layer costs r (in + out), an embedding r (rows + width); DoRA adds out.
    `modules_to_save` count whole, as copies; `bias="all"` and `trainable_token_indices`
    for what they release. model: before adapters are attached; quantized or on the meta
    device is fine. config: a `LoraConfig`, not changed. Raises ValueError when nothing
    matches, and for fields that this formula does not cover (Chapter 3).
    """
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    for field in _NOT_COUNTED:
        if getattr(config, field, None):  # not every PEFT has every field
            raise ValueError(f"config.{field} is not covered by this formula")
    modules, config = _named_modules(model), _with_targets(model, config)
    total = 0
    for name, module in modules.items():
        found = check_target_module_exists(config, name)
        if found is True or isinstance(found, re.Match):  # PEFT marks excluded ones too
            inputs, outputs = _in_out(name, module)
            pattern = get_pattern_key(config.rank_pattern, name)
            rank = config.rank_pattern.get(pattern, config.r)
            total += rank * (inputs + outputs) + outputs * config.use_dora
        # These match in mid-word, unlike target_modules: 'norm' is 'input_layernorm' too.
        if name.endswith(tuple(config.modules_to_save or ())):
            total += sum(_numel(parameter) for parameter in module.parameters())
    if not total:
        raise ValueError(f"config.target_modules={config.target_modules!r} match no module")
    if config.bias == "all":
        total += sum(p.numel() for name, p in model.named_parameters() if "bias" in name)
    if tokens := config.trainable_token_indices:
        total += len(tokens) * model.get_input_embeddings().embedding_dim
    return total


_NOT_COUNTED = ("lora_bias", "layer_replication", "target_parameters", "use_bdlora")
_NOT_COUNTED += ("kasa_config", "monteclora_config", "arrow_config", "ensure_weight_tying")


def _with_targets(model, config):
    config = copy.copy(config)
    if config.bias == "lora_only" or isinstance(config.trainable_token_indices, dict):
        raise ValueError("bias='lora_only' and dicts of token indices are not covered")
    if config.target_modules is None:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known

        kind = getattr(getattr(model, "config", None), "model_type", None)
        if kind not in known:
            raise ValueError(
                f"config.target_modules is not set and PEFT knows no default for model "
                f"type {kind!r}; set it, for instance to find_target_modules(model)"
            )
        config.target_modules = known[kind]
    elif config.target_modules == "all-linear":
        config.target_modules = list(_linear_layers(model))
    return config


def _in_out(name, module):
    for inputs, outputs in (
        ("in_features", "out_features"),  # a 4-bit weight's own shape is that of its bytes
        ("num_embeddings", "embedding_dim"),
        ("nx", "nf"),  # GPT-2's Conv1D
    ):
        if hasattr(module, inputs):
            return getattr(module, inputs), getattr(module, outputs)
    raise ValueError(f"{name} is a {type(module).__name__}: not covered by this formula")


# ── what there is, by kind ───────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ParameterReport:
    """Parameters by kind of module: prints as a table of at most 20 rows.

    frame: a DataFrame indexed by kind with the columns tensors, parameters, trainable,
    dtypes and bytes; `.parameters`, `.trainable`, `.bytes` are its sums.
    """

    frame: object

    parameters = property(lambda self: int(self.frame["parameters"].sum()))
    trainable = property(lambda self: int(self.frame["trainable"].sum()))
    bytes = property(lambda self: int(self.frame["bytes"].sum()))

    def headline(self):
        """One sentence: trainable of all, the share, and the storage in MB (1e6 bytes)."""
        return (
            f"{self.trainable:,} of {self.parameters:,} parameters are trainable "
            f"({self.trainable / max(1, self.parameters):.2%}); {self.bytes / 1e6:,.1f} MB"
        )

    def _pretty(self):
        pretty = self.frame.reset_index().rename(columns={"bytes": "MB"})
        for column in ("parameters", "trainable"):
            pretty[column] = pretty[column].map("{:,}".format)
        pretty["MB"] = pretty["MB"].map(lambda size: f"{size / 1e6:,.2f}")
        return pretty

    def __str__(self):
        return f"{self._pretty().to_string(index=False)}\n{self.headline()}"

    __repr__ = __str__

    def _repr_html_(self):
        return f"{self._pretty().to_html(index=False, border=0)}<p>{self.headline()}</p>"


def parameter_report(model):
    """What a model holds and what of it trains, by kind of module (Chapter 3).

    Counts every parameter once, 4-bit ones by what they stand for rather than by the bytes
    they are packed in. `trainable` is requires_grad, nothing more: `check_training` says
    whether it makes sense. Raises TypeError when `model` is no torch module.
    """
    import pandas as pd

    _named_modules(model)  # for its TypeError
    adapters = {id(p): adapter for _, adapter, ps in _adapter_parts(model) for p in ps}
    rows = []
    for name, parameter in model.named_parameters():
        kind = _kind(name, model.get_submodule(name.rpartition(".")[0]))
        if id(parameter) in adapters:
            kind = f"adapter {adapters[id(parameter)]!r}: {kind}"
        trains = _numel(parameter) * parameter.requires_grad
        size = parameter.numel() * parameter.element_size()
        rows.append((kind, 1, _numel(parameter), trains, _dtype_name(parameter), size))
    columns = ["kind", "tensors", "parameters", "trainable", "dtypes", "bytes"]
    frame = pd.DataFrame(rows, columns=columns)
    if frame["kind"].nunique() > MAX_ROWS:
        kept = list(frame["kind"].unique()[: MAX_ROWS - 1])
        frame.loc[~frame["kind"].isin(kept), "kind"] = "all other kinds"
    sums = dict.fromkeys(columns[1:], "sum")
    sums["dtypes"] = lambda names: ", ".join(dict.fromkeys(names))
    return ParameterReport(frame.groupby("kind", sort=False).agg(sums))


def _kind(name, module):
    if not {"lm_head", "embed_out"}.isdisjoint(name.split(".")):  # GPT-NeoX has the latter
        return "output head"
    if isinstance(module, nn.Embedding) or "embed" in name or "token_adapter" in name:
        return "embedding"
    if _is_norm(module):
        return "norm"
    if _inside_attention(name):
        return "attention"
    feed_forward = ("mlp", "ffn", "feed_forward", "fc", "dense_", "expert")
    if any(part.startswith(feed_forward) for part in name.split(".")):
        return "feed-forward"
    return "other"


def _is_norm(module):
    return "norm" in type(module).__name__.lower()


def _numel(parameter):
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def _dtype_name(parameter):
    state = getattr(parameter, "quant_state", None)
    stored = str(parameter.dtype).removeprefix("torch.")
    return f"{state.quant_type} (in {stored})" if state is not None else stored


# ── merging ──────────────────────────────────────────────────────────────────────────────
@torch.no_grad()
def merge_error(model, into=("nf4", "bfloat16", "float16", "float32")):
    """How much of the adapters' update is lost by merging, per destination (Chapter 3).

    model: a PEFT model with unmerged LoRA adapters, its base quantized or not; it is not
    changed. into: what the merged weight is stored as, 'nf4', 'fp4' or a float dtype.
    Returns a DataFrame, a row per kind of layer and one for all: `update` is |BA| / |W|,
    each other column |stored - exact| / |BA| with Frobenius norms, where exact is W + BA in
    float32. 0 keeps the update, 1 loses as much as the update is long.
    Raises ValueError without adapters, with merged or untrained ones, or for a variant
    such as DoRA, which merges differently.
    """
    import pandas as pd
    from peft.tuners.lora import LoraLayer
    from peft.utils.integrations import dequantize_module_weight

    rows = []
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer) or not len(layer.lora_A):
            continue
        if layer.merged or layer.lora_variant or _is_repacked(layer.get_base_layer()):
            state = "repacked for CPU inference (see check_training)"
            state = "a variant such as DoRA" if layer.lora_variant else state
            state = "merged already" if layer.merged else state
            raise ValueError(f"{name} is {state}; merge_error needs unmerged, plain LoRA")
        weight = dequantize_module_weight(layer.get_base_layer()).float()
        active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
        update = sum(layer.get_delta_weight(adapter).float() for adapter in active)
        exact = weight + update
        row = {"kind": name.rsplit(".", 1)[-1], "layers": 1, "weight": weight}
        row |= {"update": exact - weight}
        row |= {target: _stored(exact, target) - exact for target in into}
        rows.append({k: _square(v) if torch.is_tensor(v) else v for k, v in row.items()})
    frame = pd.DataFrame(rows, columns=["kind", "layers", "weight", "update", *into])
    if not frame["update"].sum():
        raise ValueError("model has no trained LoRA layers: attach an adapter and train it")
    frame = frame.groupby("kind", sort=False).sum()
    frame.loc["all layers"] = frame.sum()
    lost = frame[list(into)].div(frame["update"], axis=0) ** 0.5
    lost.insert(0, "update", (frame["update"] / frame["weight"]) ** 0.5)
    lost.insert(0, "layers", frame["layers"].astype(int))
    return lost


def _square(tensor):
    return float(tensor.square().sum())


def _stored(weight, target):
    """`weight` after a round trip through the storage type `target`, in float32."""
    if target in ("nf4", "fp4"):
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(
            weight, quant_type=target, blocksize=64, compress_statistics=True
        )
        return bnb.dequantize_4bit(codes, state).float()
    dtype = getattr(torch, target, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"into must name 'nf4', 'fp4' or float dtypes, not {target!r}")
    return weight.to(dtype).float()


# ── will it learn? ───────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a training set-up: a code to test, a text to read."""

    code: str
    message: str


@dataclass(frozen=True)
class TrainingCheck:
    """What `check_training` found; `.ok` when there is nothing to say."""

    problems: list
    headline: str

    ok = property(lambda self: not self.problems)
    codes = property(lambda self: [problem.code for problem in self.problems])

    def __str__(self):
        lines = [f"✗ {problem.code}: {problem.message}" for problem in self.problems]
        return "\n".join([*(lines or ["✓ ready to train"]), self.headline])

    __repr__ = __str__

    def _repr_html_(self):
        lines = [
            f"<li><b style='color:#D55E00'>✗ {problem.code}</b>: "
            f"{html.escape(problem.message)}</li>"
            for problem in self.problems
        ] or ["<li><b style='color:#009E73'>✓ ready to train</b></li>"]
        return f"<ul>{''.join(lines)}</ul><p>{self.headline}</p>"


def check_training(model, optimizer=None):
    """Say why a model is going to learn nothing, or the wrong thing (Chapter 3).

    model: plain, quantized, or with adapters of PEFT or of this module. optimizer: give it
    to have its parameters compared with the model's. Returns a `TrainingCheck` whose
    problems have the codes 'nothing_trainable', 'adapter_frozen', 'adapter_inactive',
    'adapter_merged', 'base_trainable', 'norms_half_precision', 'no_gradient_path',
    'optimizer_misses'.
    It looks at flags and dtypes and runs nothing. Raises TypeError for what is no model.
    """
    modules = _named_modules(model)
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    problems = []
    adapters = _check_adapters(model, problems)
    # 'Params4bit' and 'Int8Params', told by name to leave bitsandbytes unimported.
    kinds = {type(parameter).__name__ for parameter in model.parameters()}
    kbit = not kinds.isdisjoint({"Params4bit", "Int8Params"})
    if not trainable:
        cure = "its adapter is the part to unfreeze" if adapters else "nothing is left to do"
        if kbit and not adapters:
            cure = "quantized weights cannot train by themselves: attach an adapter"
        message = f"all {len(list(model.parameters()))} tensors are frozen: {cure}."
        problems.insert(0, Problem("nothing_trainable", message))
    if adapters or kbit:
        _check_base(model, trainable, adapters, problems)
    half = [
        name
        for name, module in modules.items()
        if _is_norm(module) and any(p.dtype in _HALF for p in module.parameters())
    ]
    if kbit and half:
        message = (
            f"{len(half)} norm layers are in half precision, such as {half[0]}: call "
            "prepare_model_for_kbit_training(model) before attaching the adapter."
        )
        problems.append(Problem("norms_half_precision", message))
    if packed := [name for name, module in modules.items() if _is_repacked(module)]:
        message = (
            f"{len(packed)} 4-bit layers ran in eval mode on this CPU, where bitsandbytes "
            f"repacks them for good and without gradients, such as {packed[0]}: load the "
            "model again and call model.train() before its first forward pass."
        )
        problems.append(Problem("no_gradient_path", message))
    if optimizer is not None:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missed := [name for key, name in trainable.items() if key not in held]:
            message = (
                f"{len(missed)} of {len(trainable)} trainable tensors are not in the "
                f"optimizer, such as {missed[0]}: create it after the adapter."
            )
            problems.append(Problem("optimizer_misses", message))
    return TrainingCheck(problems, parameter_report(model).headline())


_HALF = (torch.float16, torch.bfloat16)


def _is_repacked(module):
    """True for a 4-bit layer in bitsandbytes' inference format for AVX512-BF16 CPUs.

    Its first forward in eval mode converts it there and back comes nothing: the kernel has
    no autograd, and whoever dequantizes the weight reads it in the wrong order.
    """
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return getattr(state, "packing_format_for_cpu", False)


def _adapter_parts(model):
    """Yield (layer, adapter name, its parameters) for adapters, PEFT's or `LoRALinear`."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            yield layer, "default", [layer.lora_A.weight, layer.lora_B.weight]
        elif isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper):
            for part in layer.adapter_layer_names:
                for adapter, item in getattr(layer, part, {}).items():
                    whole = isinstance(item, nn.Parameter)
                    yield layer, adapter, [item] if whole else list(item.parameters())


def _check_adapters(model, problems):
    """Append what is wrong with the adapters; return the ids of their parameters."""
    known, merged = set(), set()
    frozen, active, idle = Counter(), Counter(), Counter()
    off, used = False, set()
    for layer, adapter, parameters in _adapter_parts(model):
        known.update(map(id, parameters))
        in_use = adapter in getattr(layer, "active_adapters", ["default"])
        disabled = getattr(layer, "disable_adapters", False)
        off |= disabled
        if getattr(layer, "merged", False):
            merged.add(adapter)
        if in_use and not disabled:
            used.add(adapter)
            active[adapter] += len(parameters)
            frozen[adapter] += sum(not p.requires_grad for p in parameters)
        elif any(p.requires_grad for p in parameters):
            idle[adapter] += 1
    if off:
        message = (
            "the adapters are switched off, so the base model answers alone and they get "
            "no gradient: call model.enable_adapter_layers()."
        )
        problems.append(Problem("adapter_inactive", message))
    elif idle or (known and not used):
        names = ", ".join(map(repr, idle)) or "every adapter"
        message = (
            f"{names} is attached and not used: the forward pass goes through "
            f"{', '.join(map(repr, sorted(used))) or 'no adapter'}. "
            "Call model.set_adapter(name)."
        )
        problems.append(Problem("adapter_inactive", message))
    for adapter, count in frozen.items():
        if count:
            message = (
                f"{count} of the {active[adapter]} tensors of adapter {adapter!r} are "
                "frozen. Loaded from disk? PeftModel.from_pretrained(..., "
                f"is_trainable=True); else model.set_adapter({adapter!r})."
            )
            problems.append(Problem("adapter_frozen", message))
    if merged:
        message = (
            f"{', '.join(map(repr, sorted(merged)))} is merged into the base weights and "
            "gets no gradient: unmerge first (model.unmerge_adapter())."
        )
        problems.append(Problem("adapter_merged", message))
    return known


def _check_base(model, trainable, adapters, problems):
    """Append base weights that train although nobody asked for them in the config."""
    configs = getattr(model, "peft_config", {}).values()
    biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    strays = [
        name
        for key, name in trainable.items()
        if key not in adapters and not (biases and name.endswith("bias"))
    ]
    if strays:
        message = (
            f"{len(strays)} tensors of the base model train too, such as {strays[0]}, and "
            "would not be saved with an adapter: freeze them, or name their modules in "
            "LoraConfig(modules_to_save=...)."
        )
        problems.append(Problem("base_trainable", message))
