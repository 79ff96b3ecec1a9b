"""Captioning without torch's compiler, whose import takes seconds."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

UTILS = "torch._dynamo.utils"


@contextmanager
def compiler_left_out() -> Iterator[None]:
    """Import libraries in this context without torch's compiler; they import it when they use it.

    torchvision imports a function of the compiler that only its `roi_align` calls. timm marks functions that the
    compiler leaves alone.
    """
    if UTILS in sys.modules:
        yield
        return
    disable = torch.compiler.disable
    sys.modules[UTILS], torch.compiler.disable = _Utils(UTILS), _disable
    try:
        yield
    finally:
        torch.compiler.disable = disable
        if isinstance(sys.modules.get(UTILS), _Utils):
            del sys.modules[UTILS]


class _Utils(ModuleType):
    """Takes the place of the compiler's module, and imports it when something of it is used."""

    def is_compile_supported(self, device_type: str) -> bool:
        return self._compiler().is_compile_supported(device_type)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._compiler(), name)

    def _compiler(self) -> Any:
        if sys.modules.get(UTILS) is self:
            del sys.modules[UTILS]
        return importlib.import_module(UTILS)


def _disable(function: Callable | None = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """Do as `torch.compiler.disable`, but only where the function is compiled."""
    if function is None:
        return functools.partial(_disable, recursive=recursive, reason=reason)

    @functools.wraps(function)
    def disabled(*args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        called = torch.compiler.disable(function, recursive, reason=reason) if compiling else function
        return called(*args, **kwargs)

    return disabled


@contextmanager
def meta_device() -> Iterator[None]:
    """Build networks on the meta device, where weights take no memory, and do not initialize them.

    On this device, torch draws random weights with the compiler's help.
    """
    with torch.device("meta"), _NotInitialized():
        yield


class _NotInitialized(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.normal_, Tensor.uniform_, torch.nn.init.normal_, torch.nn.init.uniform_):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
