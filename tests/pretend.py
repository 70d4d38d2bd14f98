"""Pretends that a card is there: real numbers, computed by the CPU, and CUDA's complaints.

    from pretend import pretend_cuda

    pretend_cuda()  # from a notebook's first cell on; or: with pretend_cuda(): ...

What is put on 'cuda' stays in the CPU's memory and is marked; what is computed from it is
marked, too. An operation that gets marked tensors together with others raises what CUDA
would raise. `runtime.detect()` finds a card, and no Hub, so the embedded model is taken.
"""

import contextlib
import dataclasses
from unittest import mock

import torch
from torch.autograd.function import BackwardCFunction
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CARD = torch.device("cuda", 0)
APART = (
    "Expected all tensors to be on the same device, but found at least two devices, "
    "cuda:0 and cpu! (when computing {name})"
)
# What CUDA takes from two places: copies, and indices that lie on the CPU.
MIXED = {"copy_", "_to_copy", "set_", "_local_scalar_dense"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}


class Marks:
    """Which storages lie on the card; by weak reference, so that none is kept alive."""

    def __init__(self):
        self.held = {}

    def __contains__(self, tensor):
        return tensor.untyped_storage()._cdata in self.held

    def put(self, tensor, on_card=True):
        """Mark a tensor's storage, or take its mark away."""
        storage = tensor.untyped_storage()
        if on_card:
            self.held[storage._cdata] = StorageWeakRef(storage)
        else:
            self.held.pop(storage._cdata, None)
        if len(self.held) > 10_000:  # an address is not used again while it is in here
            self.held = {k: ref for k, ref in self.held.items() if not ref.expired()}


def tensors(*values):
    """All plain tensors with a storage, at any depth."""
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [t for t in found if t.layout is torch.strided and t.device.type != "meta"]


class Operations(TorchDispatchMode):
    """Every operation of torch: complains like CUDA, and marks what comes out."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = tensors(args, kwargs)
        marked = [tensor in self.marks for tensor in given]
        name = func.overloadpacket.__name__
        if any(marked) and name not in MIXED:
            checked = given[:1] if name in INDEXED and marked[0] else given
            if any(t not in self.marks and t.dim() > 0 for t in checked):
                raise RuntimeError(APART.format(name=name))
        before = {tensor.untyped_storage()._cdata for tensor in given}
        out = func(*args, **kwargs or {})
        if any(marked):
            for tensor in tensors(out):
                if tensor.untyped_storage()._cdata not in before:
                    self.marks.put(tensor)
        return out


class Devices(TorchFunctionMode):
    """What is said of devices: .device, .to('cuda'), device='cuda'."""

    def __init__(self, marks):
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return CARD if args[0] in self.marks else func(*args)
        if func == torch.Tensor.is_cuda.__get__:
            return args[0] in self.marks
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self.moved(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and is_card(device):
            out = func(*args, **kwargs | {"device": "cpu"})
            self.marks.put(out)
            return out
        return func(*args, **kwargs)

    def moved(self, func, args, kwargs):
        """`.to(...)`, `.cuda()`, `.cpu()`: a new place is a copy with another mark."""
        tensor, *said = args
        where = on_card = tensor in self.marks
        dtype = kwargs.pop("dtype", None)
        if func != torch.Tensor.to:
            where, said, kwargs = func == torch.Tensor.cuda, [], {}
        for value in (*said, kwargs.pop("device", None)):
            if isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, torch.Tensor):
                where, dtype = value in self.marks, value.dtype
            elif value is not None and not isinstance(value, bool):
                where = is_card(value)
        kwargs["copy"] = where != on_card or kwargs.get("copy", False)
        out = torch.Tensor.to(tensor, dtype or tensor.dtype, **kwargs)
        if where != on_card:
            self.marks.put(out, where)
        return out


def is_card(device):
    """Whether a device, or its name, is a CUDA card."""
    return isinstance(device, int) or torch.device(device).type == "cuda"


def scales(weight):
    """The tensors that bitsandbytes keeps beside a quantized weight."""
    found, state = tensors(vars(weight)), getattr(weight, "quant_state", None)
    while state is not None:
        found += tensors(vars(state))
        state = state.state2
    return found


def pretend_cuda():
    """From now on there is a card, and no Hub; returns a stack whose `close()` ends it."""
    from accelerate.state import AcceleratorState, PartialState
    from transformers import PreTrainedModel, TrainingArguments

    from helpers import runtime

    marks, load = Marks(), PreTrainedModel.from_pretrained.__func__
    devices, apply = Devices(marks), BackwardCFunction.apply
    card = {"device": "cuda", "device_name": "a pretended card", "profile": "gpu"}
    card |= {"compute_dtype": torch.float32, "offline": True}  # no autocast, no scaler
    here = dataclasses.replace(runtime.detect(), **card)

    def loaded(cls, *args, device_map=None, **settings):
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        wanted = any(place is not None and is_card(place) for place in places)
        device_map = {"": "cpu"} if wanted else device_map
        found = load(cls, *args, device_map=device_map, **settings)
        model = found[0] if isinstance(found, tuple) else found  # output_loading_info
        for tensor in (*model.parameters(), *model.buffers()) if wanted else ():
            for part in (tensor, *scales(tensor)):
                marks.put(part)
        return found

    def chosen(args):
        usual = args._setup_devices
        return usual if args.use_cpu else CARD

    def backward(function, *gradients):  # written in Python, it asks for devices, too
        with devices:
            return apply(function, *gradients)

    replaced = [
        (BackwardCFunction, "apply", backward),
        (PreTrainedModel, "from_pretrained", classmethod(loaded)),
        (runtime, "detect", lambda: here),
        (PartialState, "default_device", CARD),  # where trainers put their batches
        (TrainingArguments, "device", property(chosen)),  # and their models
        (torch.cuda, "set_device", lambda device: None),
        (torch.cuda, "get_device_name", lambda device=0: here.device_name),
    ]
    stack = contextlib.ExitStack()
    stack.callback(AcceleratorState._reset_state, True)  # which remembers the card
    for owner, name, value in replaced:
        stack.enter_context(mock.patch.object(owner, name, value))
    stack.enter_context(devices)
    stack.enter_context(Operations(marks))
    return stack
