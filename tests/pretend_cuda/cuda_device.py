"""A CUDA device that is none: its tensors have their bytes on the CPU, and it is as strict as a device.

Without a GPU code that serves on CUDA runs on it, to show that it mixes no tensors of the host with the device's, hands no
memory to a kernel that the device cannot reach, and makes the host wait where it means to: `Device.waits` says of each wait
what it was for. All is done at once, in the order in which it is queued: what streams may do is `simulated_device.py`'s.
"""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
DEVICE = torch.device("cuda:0")
# Whose result the host has to know before it goes on.
WAITING = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.bincount.default,
}
COPIES = {aten._to_copy.default, aten.copy_.default}
# Which queue nothing on the device, beside views.
NO_LAUNCH = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten._unsafe_view,
    aten.lift_fresh,
}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}


class CudaTensor(torch.Tensor):
    """Says that it is on the device; `held` has its bytes."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "CudaTensor":
        # Views of it want a version, whatever mode they are made in.
        with torch.inference_mode(False):
            its = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                held.size(),
                strides=held.stride(),
                storage_offset=held.storage_offset(),
                dtype=held.dtype,
                device=DEVICE,
            )
        its.held = held
        return its  # type: ignore[no-any-return]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CudaTensor({self.held})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} is called while there is no device")


class Device(TorchDispatchMode):
    """While it is entered, "cuda" is this, in the thread that enters it."""

    def __init__(self, its: "Device | None" = None) -> None:
        """Another thread's is the same device as `its`."""
        super().__init__()
        self.waits: list[str] = []  # of this thread for the device, in their order
        self.launches: list[
            str
        ] = []  # of this thread: kernels, and operations that are one or a copy
        self.page_locked: list[range] = [] if its is None else its.page_locked  # addresses
        self._kept: list[torch.Tensor] = []  # whose addresses nothing else is to have
        # While something is captured: records a kernel, which is the first argument and reads and writes the others.
        self.capture: Callable[..., object] | None = None
        # Called with the name of a kernel that is about to run.
        self.before_kernel: Callable[[str], object] = lambda name: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func._can_decompose():  # in inference mode that is left to whoever is asked
            with self:
                return func.decompose(*args, **kwargs)
        given = tree_flatten((args, kwargs))[0]
        tensors = [its for its in given if isinstance(its, torch.Tensor)]
        mine = [its for its in tensors if isinstance(its, CudaTensor)]
        is_locked = bool(kwargs.pop("pin_memory", None))
        device = kwargs.get("device")
        if device is not None:
            is_here = torch.device(device).type == "cuda"
            kwargs["device"] = torch.device("cpu") if is_here else device
        else:
            is_here = bool(mine)
        if func in COPIES:
            is_here = self._note_copy(func, args, kwargs, is_here)
        else:
            self._check(func, args, tensors, mine)
        if (is_here or mine) and not (func.is_view or func.overloadpacket in NO_LAUNCH):
            self.launches.append(func.overloadpacket.__name__)
        result = func(*tree_map(held, args), **tree_map(held, kwargs))
        if is_locked:
            self.keep_locked(result)
        if (changed := returned_argument(func, args, kwargs)) is not None:
            return changed
        if not is_here:
            return result
        return tree_map(lambda its: CudaTensor(its) if is_plain(its) else its, result)

    def keep_locked(self, memory: torch.Tensor) -> None:
        self.page_locked.append(range(memory.data_ptr(), memory.data_ptr() + memory.nbytes))
        self._kept.append(memory)

    def is_locked(self, memory: torch.Tensor) -> bool:
        """Whether the device can reach all of it."""
        start = memory.data_ptr()
        return any(
            its.start <= start and start + memory.nbytes <= its.stop for its in self.page_locked
        )

    def launch(self, name: str, kernel: Callable[[], object], *arguments: Any) -> None:
        """A kernel that reads and writes these, now or whenever what is captured is replayed."""
        self.launches.append(name)
        if self.capture is None:
            kernel()
        else:
            self.capture(kernel, *arguments)

    def wait(self, what: str) -> None:
        if self.capture is not None:
            raise RuntimeError(f"{what}: not permitted when the stream is capturing")
        self.waits.append(what)

    def _note_copy(self, func: Any, args: Any, kwargs: Any, is_here: bool) -> bool:
        """Whether what comes out is the device's."""
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if func == aten.copy_.default:
            target, source = args[:2]
            is_here, is_there = (isinstance(its, CudaTensor) for its in (target, source))
        else:
            target, source = None, args[0]
            is_there = isinstance(source, CudaTensor)
            is_here = is_here if kwargs.get("device") is not None else is_there
        if is_here == is_there:
            return is_here
        host = source if is_here else target
        is_free = host is not None and self.is_locked(host)
        if is_there and not (non_blocking and is_free):
            self.wait("copy to the host")
        if is_here and not non_blocking:
            self.wait("copy to the device")
        return is_here

    def _check(self, func: Any, args: Any, tensors: list[Any], mine: list[Any]) -> None:
        if not mine:
            return
        if func in WAITING:
            self.wait(func.name().removeprefix("aten::"))
        others = [its for its in tensors if not isinstance(its, CudaTensor) and its.dim()]
        if func in INDEXED:
            indices = [its for its in args[1] if its is not None]
            if any(its.dtype == torch.bool for its in indices):
                self.wait("index by a mask")
            if any(not isinstance(its, CudaTensor) for its in indices):
                self.wait("index of the host's")
            others = [its for its in others if not any(its is index for index in indices)]
        if others and not all(its.device.type == "meta" for its in others):
            raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def held(its: Any) -> Any:
    return its.held if isinstance(its, CudaTensor) else its


def is_plain(its: Any) -> bool:
    return isinstance(its, torch.Tensor) and not isinstance(its, CudaTensor)


def returned_argument(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operation returns that changes arguments: these; None for others."""
    schema = func._schema
    if not schema.returns or not all(
        its.alias_info is not None and its.alias_info.is_write for its in schema.returns
    ):
        return None
    given = dict(zip((its.name for its in schema.arguments), args, strict=False)) | kwargs
    changed = [
        given[its.name]
        for its in schema.arguments
        if its.alias_info is not None and its.alias_info.is_write
    ]
    return changed[0] if len(changed) == 1 else tuple(changed)


class Stream:
    """As `torch.cuda.Stream`, of a device that has done what is queued."""

    wait: Callable[[str], None]

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def synchronize(self) -> None:
        self.wait("stream")


class Event:
    """As `torch.cuda.Event`."""

    wait: Callable[[str], None]

    def __init__(self, enable_timing: bool = False):
        self._recorded_at: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        self._recorded_at = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        if self._recorded_at is not None:
            self.wait("event")

    def elapsed_time(self, end: "Event") -> float:
        assert self._recorded_at is not None
        assert end._recorded_at is not None
        return 1000 * (end._recorded_at - self._recorded_at)


@contextmanager
def pretend_cuda() -> Generator[Device, None, None]:
    """`torch.cuda` is about it meanwhile, threads that are begun are on it, and kernels in Triton's interpreter take what it
    can reach."""
    torch._C._ensureCUDADeviceGuardSet()
    device = Device()
    here = threading.local()
    here.device = device

    class Thread(threading.Thread):
        def run(self) -> None:
            with Device(device) as here.device:
                super().run()

    def wait(_: Any, what: str) -> None:
        here.device.wait(what)

    its_stream, its_event = (
        type(kind.__name__, (kind,), {"wait": wait}) for kind in (Stream, Event)
    )
    stream = its_stream()

    def register(address: int, num_bytes: int, flags: int) -> int:
        device.page_locked.append(range(address, address + num_bytes))
        return 0

    make_tensor = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        made = make_tensor(*args, **kwargs)  # no operation with such an argument
        if pin_memory:
            device.keep_locked(made)
        return made

    instead = {
        "_lazy_init": lambda: None,
        "Stream": its_stream,
        "Event": its_event,
        "stream": lambda its: nullcontext(),
        "current_stream": lambda *_: stream,
        "synchronize": lambda *_: here.device.wait("device"),
        "cudart": lambda: SimpleNamespace(cudaHostRegister=register),
    }
    with ExitStack() as stack:
        # `torch.tensor` makes one of the host's, and moves it.
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)
        for name, its in instead.items():
            stack.enter_context(patch.object(torch.cuda, name, its))
        stack.enter_context(patch.object(torch, "tensor", tensor))
        stack.enter_context(patch.object(threading, "Thread", Thread))
        stack.enter_context(kernels_take_its_tensors(device))
        stack.enter_context(device)
        yield device


@contextmanager
def kernels_take_its_tensors(device: Device) -> Generator[None, None, None]:
    """In the interpreter, one at a time; products of bfloat16 are right."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    really_run = GridExecutor.__call__
    one_at_a_time = threading.Lock()  # the interpreter changes Triton's modules

    def reach(its: Any) -> Any:
        if is_plain(its) and not device.is_locked(its):
            raise ValueError("a kernel gets a tensor that the device cannot reach")
        return held(its)

    def run(executor: Any, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tuple(map(reach, args)), {name: reach(its) for name, its in kwargs.items()}

        def run_now() -> None:
            device.before_kernel(executor.fn.__name__)
            with one_at_a_time:
                really_run(executor, *args, **kwargs)

        device.launch(executor.fn.__name__, run_now, *args, *kwargs.values())

    really_dot = InterpreterBuilder.create_dot

    def dot(builder: Any, left: Any, right: Any, *others: Any) -> Any:
        return really_dot(builder, in_float32(left), in_float32(right), *others)

    with (
        patch.object(GridExecutor, "__call__", run),
        patch.object(InterpreterBuilder, "create_dot", dot),
    ):
        yield


def in_float32(its: Any) -> Any:
    """Values in bfloat16, which the interpreter multiplies as the integers that it stores them in."""
    from triton import language as tl
    from triton.runtime.interpreter import TensorHandle

    if its.dtype.scalar != tl.bfloat16:
        return its
    return TensorHandle((its.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
