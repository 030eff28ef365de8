"""A GPU that is not there: its tensors are tensors of the CPU whose storage is marked. Mixing the two is an error.

Inside `fake_gpu` torch believes in one CUDA device. What a marked tensor says of itself (`device`, `is_cuda`) is what
a tensor of that device would say. An operation that a real GPU refuses because its operands are on two devices raises
DeviceMixError. Everything is computed on the CPU, so results can be compared bit for bit.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class DeviceMixError(RuntimeError):
    "An operation whose operands are on different devices."


class MarkedStorages:
    """Which storages are on the fake GPU, and which autograd's own code made and would have made on either device.

    Storages that were freed are forgotten now and then.
    """

    def __init__(self):
        self.references: dict[int, StorageWeakRef] = {}
        self.made_by_autograd: dict[int, StorageWeakRef] = {}
        self.is_called_from_python = False

    def __contains__(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            return tensor.untyped_storage()._cdata in self.references

    def mark(self, tensor: Tensor, is_marked: bool = True) -> None:
        "Say where a tensor's storage is."
        with torch._C.DisableTorchFunction():
            storage = tensor.untyped_storage()
        if not is_marked:
            self.references.pop(storage._cdata, None)
            return
        self.references[storage._cdata] = StorageWeakRef(storage)
        if len(self.references) % 5000 == 0:
            for name in ("references", "made_by_autograd"):
                kept = {key: ref for key, ref in getattr(self, name).items() if not ref.expired()}
                setattr(self, name, kept)

    def is_on_either(self, tensor: Tensor) -> bool:
        "Whether a tensor was made by autograd's own code."
        return tensor.untyped_storage()._cdata in self.made_by_autograd


ALL_ALIKE = {"cat", "stack", "index_copy", "index_add"}  # take no scalar of the CPU either
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}  # take indices of the CPU
BETWEEN_DEVICES = {"copy_", "_to_copy", "set_", "resize_"}


def find_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    "Yield the tensors among the arguments or results of an operation."
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from find_tensors(value)


class DeviceChecker(TorchDispatchMode):
    "Refuses operations on two devices, inside autograd's functions and backward passes too; marks what comes out."

    def __init__(self, marked: MarkedStorages):
        super().__init__()
        self.marked = marked

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        inputs = list(find_tensors((*args, *kwargs.values())))
        on_gpu = [tensor in self.marked for tensor in inputs]
        if name not in BETWEEN_DEVICES and any(on_gpu) and not all(on_gpu):
            self.check(name, func, args, kwargs, inputs)
        outputs = func(*args, **kwargs)
        is_made_by_autograd = bool(inputs) or not self.marked.is_called_from_python
        if is_made_by_autograd and all(self.marked.is_on_either(tensor) for tensor in inputs):
            for output in find_tensors((outputs,)):
                storage = output.untyped_storage()
                self.marked.made_by_autograd[storage._cdata] = StorageWeakRef(storage)
        if any(on_gpu) and name != "copy_":
            for output in find_tensors((outputs,)):
                self.marked.mark(output)
        return outputs

    def check(self, name: str, func: Any, args: tuple, kwargs: dict[str, Any], inputs: list[Tensor]) -> None:
        "Raise DeviceMixError unless a real GPU takes these operands of two devices."
        if name in INDEXING and args[0] in self.marked:
            inputs = [args[0], *(tensor for tensor in args[2:] if isinstance(tensor, Tensor))]
        on_cpu = [t for t in inputs if t not in self.marked and not self.marked.is_on_either(t)]
        schema_inputs = zip(func._schema.arguments, args)
        changed = [value for argument, value in schema_inputs if argument.alias_info and argument.alias_info.is_write]
        is_changed_on_cpu = any(value is tensor for value in changed for tensor in on_cpu)
        if is_changed_on_cpu or any(tensor.ndim or name in ALL_ALIKE for tensor in on_cpu):
            where = [f"{list(t.shape)} on {'the GPU' if t in self.marked else 'the CPU'}" for t in inputs]
            raise DeviceMixError(f"{name}: operands {', '.join(where)}")


GPU_ANSWERS = {Tensor.device.__get__: GPU, Tensor.is_cuda.__get__: True, Tensor.is_cpu.__get__: False}
PLAIN_GETTERS = {Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.ndim.__get__, Tensor.requires_grad.__get__}
TO_NUMPY = {Tensor.numpy, Tensor.__array__}


class DeviceNames(TorchFunctionMode):
    "Lets functions that take or tell a device speak of the fake GPU."

    def __init__(self, marked: MarkedStorages):
        super().__init__()
        self.marked = marked

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PLAIN_GETTERS:
            return func(*args)
        kwargs = dict(kwargs or {})
        if func in GPU_ANSWERS:
            return GPU_ANSWERS[func] if args[0] in self.marked else func(*args)
        if func in TO_NUMPY and args[0] in self.marked:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if func is Tensor.backward:  # autograd's functions must see this mode
            kwargs["grad_tensors"] = kwargs.pop("gradient", None)
            with self:
                return torch.autograd.backward(*args, **kwargs)
        if func in (Tensor.cuda, Tensor.cpu):
            return self.move(args[0].clone(), GPU if func is Tensor.cuda else CPU)
        if func is Tensor.to:
            return self.convert(args[0], *args[1:], **kwargs)
        device = kwargs.get("device")
        if device is None:
            return self.call(func, *args, **kwargs)
        device = torch.device(device)
        if device.type == "cuda" and kwargs.get("generator") is not None:
            raise DeviceMixError(f"{func.__name__}: a generator of the CPU, and numbers on the GPU")
        result = self.call(func, *args, **kwargs | ({"device": None} if device.type == "cuda" else {}))
        return self.move(result, device)

    def call(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        "Call a function of torch; tensors that it makes are on the CPU because Python said so, or did not say."
        before, self.marked.is_called_from_python = self.marked.is_called_from_python, True
        try:
            return func(*args, **kwargs)
        finally:
            self.marked.is_called_from_python = before

    def move(self, result: Tensor, device: torch.device) -> Tensor:
        "Return a new tensor on a device."
        self.marked.mark(result, device.type == "cuda")
        return result

    def convert(self, tensor: Tensor, *arguments: Any, copy: bool = False, **options: Any) -> Tensor:
        "Do the work of `Tensor.to`."
        device, dtype, _, layout = torch._C._nn._parse_to(*arguments, **options)
        is_on_gpu = should_be = tensor in self.marked
        for like in (value for value in (*arguments, *options.values()) if isinstance(value, Tensor)):
            should_be, device = like in self.marked, None
        if device is not None:
            should_be = device.type == "cuda"
        if should_be == is_on_gpu:
            return tensor.to(dtype or tensor.dtype, copy=copy, memory_format=layout or torch.preserve_format)
        moved = tensor.to(dtype or tensor.dtype, copy=True, memory_format=layout or torch.preserve_format)
        return self.move(moved, GPU if should_be else CPU)


@contextmanager
def fake_gpu() -> Iterator[torch.device]:
    "Inside, torch and Lightning find one GPU; yields its device."
    marked = MarkedStorages()
    answers = dict(
        is_available=True,
        device_count=1,
        current_device=0,
        get_device_capability=(9, 0),
        is_bf16_supported=True,
        mem_get_info=(2**36, 2**36),
        get_device_name="a GPU that is not there",
    )
    silent = ("set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name in silent:
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_: None))
        # torch.autograd.grad would otherwise switch the mode off for autograd's functions
        stack.enter_context(mock.patch.object(torch.autograd, "has_torch_function", lambda _: False))
        stack.enter_context(DeviceChecker(marked))
        stack.enter_context(DeviceNames(marked))
        yield GPU
