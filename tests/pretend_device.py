"""Devices that this machine does not have, played by its CPU: tensors that say they are on "mps" or "xpu:1", and hold to it.

    with pretended():
        q = torch.randn(2, 3).to("xpu:1")     # q.device is xpu:1; what is made of q is there too

A function of torch's that is given tensors of two devices raises as it would there, and so does float64 on MPS. The
arithmetic is the CPU's: what the device's own kernels would get wrong does not show.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

_PRETENDED = ("mps", "xpu", "cuda")


class OnDevice(torch.Tensor):
    """A tensor in the CPU's memory that says it is elsewhere."""

    place = torch.device("cpu")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


def _on(device, result):
    """A result's tensors on a device."""
    def placed(value):
        if type(value) is not torch.Tensor or device.type not in _PRETENDED:
            return value
        if device.type == "mps" and value.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        there = value.as_subclass(OnDevice)
        there.place = device
        return there

    return tree_map(placed, result)


def _plain(value):
    return value.as_subclass(torch.Tensor) if isinstance(value, OnDevice) else value


def _call(func, args, kwargs):
    with torch._C.DisableTorchFunctionSubclass():
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return args[0].place if isinstance(args[0], OnDevice) else func(args[0])
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        # As on a real machine: a single number, indices and the source of a copy may come from the CPU.
        if name in ("__getitem__", "__setitem__", "copy_", "index_put_"):
            tensors = tensors[:1]
        devices = {value.place if isinstance(value, OnDevice) else torch.device("cpu") for value in tensors if value.dim()}
        devices = devices or {value.place for value in tensors if isinstance(value, OnDevice)}
        if len(devices) > 1:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {sorted(map(str, devices))}")
        asked = []

        def known(value):
            if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in (*_PRETENDED, "cpu")):
                asked.append(torch.device(value))
                return torch.device("cpu")
            return value

        kwargs = {key: known(value) if key == "device" else value for key, value in kwargs.items()}
        if name == "to":
            args = (args[0], *map(known, args[1:]))
        if name == "cpu":
            asked.append(torch.device("cpu"))
        device = (asked or list(devices) or [torch.device("cpu")])[0]
        result = func(*tree_map(_plain, args), **tree_map(_plain, kwargs))
        if isinstance(result, torch.Tensor) and name.endswith("_") and not name.endswith("__") and isinstance(args[0], OnDevice):
            return args[0]
        return _on(device, result)


class _Pretend(TorchFunctionMode):
    """Keeps the names of devices that are not there from torch, which would ask for their drivers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return _call(func, args, kwargs or {})


@contextlib.contextmanager
def pretended():
    """Makes `.to("mps")` and `device=` work; in this thread alone, as torch's modes do."""
    with _Pretend():
        yield
