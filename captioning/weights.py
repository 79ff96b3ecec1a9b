"""Weights read from files, never running what a pickle may ask for."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
import torch.nn as nn
from safetensors.torch import load_file
from torch import Tensor

from captioning.errors import InputError


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a .pkl or .safetensors file, never running what a pickle may ask for.

    Raises `InputError` if it is none, or if it is compressed: torch.save never compresses, and a file that
    does could unpack to a thousand times its size.
    """
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path) and any(x.compress_type for x in zipfile.ZipFile(path).infolist()):
            raise ValueError("it is compressed")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; check the path.") from None
    except Exception as error:  # a foreign or torn file makes the unpickler raise nearly anything
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path} is not a file of weights that can be read safely ({reason}).") from None
    if not isinstance(state, dict) or not all(isinstance(key, str) and _is_whole(state[key]) for key in state):
        raise InputError(f"{path} holds no state dict: names with tensors.")
    return state


def _is_whole(value: object) -> bool:
    """Whether it is a plain tensor whose numbers are all there, so that a copy takes no more memory than its file."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def load_weights(module: nn.Module, state: dict[str, Tensor], path: str | Path, may_lack: tuple[str, ...] = ()) -> None:
    """Put `state`, read from `path`, into `module`; `InputError` names a key that does not go with it.

    Keys that begin with one of `may_lack` may be absent. The module may stand on the meta device, so that
    nothing is allocated before the sizes are known to agree.
    """
    expected = module.state_dict()
    for key in [*expected, *(key for key in state if key not in expected)]:
        if key not in expected:
            raise InputError(f"{path} has the weight {key}, which this model has not; it belongs to another model.")
        if key not in state:
            if not key.startswith(may_lack or "/") and not key.endswith("num_batches_tracked"):
                raise InputError(f"{path} lacks the weight {key}; it belongs to another model.")
        elif expected[key].is_floating_point() and not state[key].is_floating_point():
            raise InputError(f"{path} has {key} as {state[key].dtype}, which is no weight of this model.")
        elif expected[key].shape != state[key].shape:
            raise InputError(
                f"{path} has {key} of size {tuple(state[key].shape)} where the model needs "
                f"{tuple(expected[key].shape)}; weights, vocabulary and captioner.json must come from one training."
            )
    state = {key: value.to(expected[key].dtype) for key, value in state.items()}
    module.load_state_dict(state, strict=False, assign=True)
