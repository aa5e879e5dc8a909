"""The pretended device is as strict as one."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from cuda_device import Device, pretend_cuda


@triton.jit
def double(values: tl.tensor, doubled: tl.tensor, SIZE: tl.constexpr) -> None:
    place = tl.arange(0, SIZE)
    tl.store(doubled + place, 2 * tl.load(values + place))


@pytest.fixture
def device() -> Iterator[Device]:
    with pretend_cuda() as device:
        yield device


def test_tensors_of_the_host_cannot_be_mixed_with_its_own(device: Device) -> None:
    there, here = torch.ones(4, device="cuda"), torch.ones(4)
    assert there.is_cuda
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([there, here])
    assert (there + here[0]).cpu().tolist() == [2, 2, 2, 2]  # a number is none
    assert (there + here.to("cuda")).cpu().tolist() == [2, 2, 2, 2]


def test_numpy_does_not_see_its_memory(device: Device) -> None:
    with pytest.raises(RuntimeError, match="numpy"):
        torch.ones(4, device="cuda").numpy()


@pytest.mark.parametrize(
    ("ask", "waits"),
    [
        (lambda its: its.cpu(), ["copy to the host"]),
        (lambda its: its.to("cpu", non_blocking=True), ["copy to the host"]),  # it is not locked
        (lambda its: its.sum().item(), ["_local_scalar_dense"]),
        (lambda its: its.nonzero(), ["nonzero"]),
        (lambda its: its[its > 0], ["index by a mask"]),
        (lambda its: its[torch.tensor([0])], ["index of the host's"]),
        (lambda its: torch.zeros(4).to("cuda"), ["copy to the device"]),
        (lambda its: torch.zeros(4).to("cuda", non_blocking=True), []),
        (lambda its: torch.zeros(4, pin_memory=True).copy_(its, non_blocking=True), []),
        (lambda its: torch.zeros(4, pin_memory=True).copy_(its), ["copy to the host"]),
        (lambda its: (its[1:] * 2).view(3, 1).long(), []),
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_waits_are_seen(device: Device, ask: object, waits: list[str], mode: type) -> None:
    its = torch.arange(4, device="cuda").float()
    assert callable(ask)
    device.waits.clear()
    with mode():
        ask(its)
    assert device.waits == waits


def test_nothing_that_is_captured_may_wait(device: Device) -> None:
    its = torch.ones(4, device="cuda")
    device.capture = lambda kernel, *arguments: kernel()
    with pytest.raises(RuntimeError, match="capturing"):
        its.sum().item()
    device.capture = None


def test_kernels_reach_its_memory_and_what_is_page_locked(device: Device) -> None:
    there = torch.arange(4, device="cuda")
    locked = torch.arange(4, pin_memory=True)
    registered = np.arange(4)
    torch.cuda.cudart().cudaHostRegister(registered.ctypes.data, registered.nbytes, 0)
    for values in (there, locked, torch.from_numpy(registered)):
        doubled = torch.zeros_like(there)
        double[(1,)](values, doubled, SIZE=4)
        assert doubled.cpu().tolist() == [0, 2, 4, 6]
    with pytest.raises(ValueError, match="cannot reach"):
        double[(1,)](torch.arange(4), there, SIZE=4)


def test_views_are_of_the_same_memory(device: Device) -> None:
    its = torch.zeros(4, 4, device="cuda")
    its[1:3, ::2].fill_(1.0)
    flat = its.view(torch.int32).as_strided((4,), (4,), 0)
    assert its.sum().item() == 4
    assert flat.count_nonzero().item() == 2
    torch.add(its, 1, out=its)
    assert its.sum().item() == 20


def test_launches_are_seen(device: Device) -> None:
    its = torch.zeros(4, device="cuda")
    double[(1,)](its[1:], torch.empty_like(its), SIZE=2)
    its.view(2, 2).add_(1).cpu()
    torch.ones(4) + 1  # the host's
    assert device.launches == ["zeros", "double", "add_", "_to_copy"]
