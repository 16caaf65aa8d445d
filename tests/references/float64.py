"""Runs transformers wholly in float64: its norms, rotary tables and softmax ask for float32."""

import contextlib
from collections.abc import Iterator

import torch
from torch.overrides import TorchFunctionMode


class _Promote(TorchFunctionMode):
    """Turns every request for float32 into one for float64; `strict` lets no float32 appear."""

    def __init__(self, strict: bool):
        super().__init__()
        self._strict = strict

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        result = func(*args, **kwargs)
        if self._strict and isinstance(result, torch.Tensor) and result.dtype is torch.float32:
            raise AssertionError(f"{func} computed in float32")
        return result


@contextlib.contextmanager
def computing(dtype: torch.dtype, strict: bool = True) -> Iterator[None]:
    """A context in which models are made and run in `dtype`, float32 (as released) or float64."""
    if dtype is torch.float32:
        with torch.no_grad():
            yield
        return
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), _Promote(strict):
            yield
    finally:
        torch.set_default_dtype(torch.float32)
