"""Safe reading of untrusted weight files: nothing in them is executed, and their memory is bounded.

`torch.load(weights_only=True)` runs nothing, but it allocates what a file asks for: a pickle of a hundred bytes can
ask for gigabytes, and so can a zip whose entries are compressed or share their bytes. Files are checked first.
"""

from __future__ import annotations

import io
import mmap
import os
import pickletools
import re
import zipfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.nn as nn
from torch import Tensor

from captioning.errors import InputError
from captioning.files import format_bytes, missing_file, require_access, web_address
from captioning.image_formats import describe_content

MAX_PICKLE = 4 << 20  # maximum size of the pickle of names and shapes, in bytes; the numbers lie outside it
MAX_ENTRIES = 50_000  # maximum number of entries in a zip, one per tensor
MAX_HEADER = 100 * MAX_ENTRIES  # size limit of the header of safetensors, in bytes
MAX_WEIGHT = 1e10  # maximum magnitude of a weight; a few products of larger numbers overflow float32
STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
GLOBALS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch.nn.parameter Parameter",
    *(f"torch {name}Storage" for name in STORAGES),
}
OTHER_CALLS = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4"}  # pickle operations that torch.save never writes
LEGACY_PICKLES = 5  # magic number, protocol, system, state dict, names of storages; the numbers follow
WRAPPERS = ("state_dict", "model_state_dict", "model")  # keys under which training scripts save a state dict
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile prepend to keys


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file of torch.save or safetensors.

    It may be wrapped as {"state_dict": ...}, and its names may begin with "module.". No two of the tensors returned
    share memory. Raises `InputError` if the file holds no state dict or cannot be read safely.
    """
    _require_file(path)
    if header := _header_size(path):
        from safetensors.torch import load_file

        try:
            if header > MAX_HEADER:
                raise ValueError("its header is too long")
            content: Any = load_file(path)
        except Exception as error:  # safetensors shares no base class with what the system raises
            raise _unsafe(path, error) from None
    else:
        content = read_saved(path)
    return as_state_dict(content, path)


def read_saved(path: str | Path) -> Any:
    """Read what torch.save wrote: tensors in dictionaries and lists, with text and numbers.

    Takes at most about twice the file's size and 300 MB in memory. Raises `InputError` if the file does not exist,
    holds anything else, or would take more memory.
    """
    _require_file(path)
    try:
        with open(path, "rb") as file:
            source = _checked_zip(file) if file.read(4) == b"PK\x03\x04" else _checked_legacy(file)
            return torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # zipfile, pickletools and torch raise nearly anything on a damaged file
        raise _unsafe(path, error) from None


def _header_size(path: str | Path) -> int:
    """Return the size of the JSON header that safetensors begin with, whatever the file's name; 0 for another file."""
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(9)
        size = int.from_bytes(start[:8], "little")
        return size if start[8:] == b"{" and size < os.path.getsize(path) else 0
    return 0


def _require_file(path: str | Path) -> None:
    if not os.path.exists(path):
        if not web_address(path):
            require_access(Path(path).parent)
        raise missing_file(path)
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name that no file can have, too
        raise InputError(f"{path} is not a file; check the path.")


def _unsafe(path: str | Path, error: Exception) -> InputError:
    if isinstance(error, OSError) and error.strerror:
        return InputError(f"{path} cannot be read ({error.strerror}).")
    reason = (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(".")
    if isinstance(error, zipfile.BadZipFile):
        reason = "it is damaged or not complete"
    with suppress(OSError), open(path, "rb") as file:
        start = file.read(64)
        if not start.startswith(b"PK"):  # torch.save's files are zip archives
            reason = describe_content(start) or reason
    return InputError(f"{path} is not a file of weights that can be read safely ({reason}).")


def _checked_zip(file: BinaryIO) -> BinaryIO:
    """Check and copy a file of torch.save: its entries must be uncompressed, disjoint and harmless.

    torch reads the copy, because its own zip reader and `zipfile` may find different entries in a forged file.
    """
    size = file.seek(0, os.SEEK_END)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if next(islice(re.finditer(rb"PK\x01\x02", content), MAX_ENTRIES, None), None):
            raise ValueError("it has too many entries")
    with zipfile.ZipFile(file) as source:
        entries = source.infolist()
        if any("/code/" in entry.filename or entry.filename.endswith("constants.pkl") for entry in entries):
            raise ValueError("it is a TorchScript model; save its state_dict() by torch.save")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("it is compressed")
        if sum(max(entry.file_size, entry.compress_size) for entry in entries) > size:
            raise ValueError("its entries are larger than the file")
        if len({entry.filename.lower() for entry in entries}) < len(entries):
            raise ValueError("it has two entries of one name")
        pickles = [entry for entry in entries if entry.filename.lower().endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("it is not a file of torch.save")
        if pickles[0].file_size > MAX_PICKLE:
            raise ValueError(
                f"it holds more than {format_bytes(MAX_PICKLE)} besides tensors; save the state dict alone"
            )
        _check_pickle(io.BytesIO(source.read(pickles[0])))
        copy = io.BytesIO()
        with zipfile.ZipFile(copy, "w") as target:
            for entry in entries:
                target.writestr(entry.filename, source.read(entry))
    copy.seek(0)
    return copy


def _checked_legacy(file: BinaryIO) -> BinaryIO:
    """Check a file of torch.save before version 1.6; returns it, at its beginning, if it is harmless."""
    file.seek(0)
    head = io.BytesIO(file.read(MAX_PICKLE))
    if head.getvalue()[:1] != b"\x80":
        raise ValueError("it is neither of torch.save nor of safetensors")
    for _ in range(LEGACY_PICKLES):
        _check_pickle(head)
    file.seek(0)
    return file


def _check_pickle(file: BinaryIO) -> None:
    """Refuse a pickle that names anything that is not part of a state dict; leaves the file at the pickle's end."""
    for operation, argument, _ in pickletools.genops(file):
        if operation.name in OTHER_CALLS or (operation.name == "GLOBAL" and argument not in GLOBALS):
            name = str(argument or operation.name).replace(" ", ".")
            if re.match(r"torch\._utils\._rebuild_|torch\.\w+Storage$", name):
                raise ValueError(f"it holds tensors of a type that is not read, {name}; save dense ones of float32")
            raise ValueError(f"it holds {name}; save the state dict alone: torch.save(model.state_dict(), FILE)")


def as_state_dict(content: Any, path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in `content`, read from `path`, unwrapped and without prefixes; no tensors share memory.

    Raises `InputError` if it holds none.
    """
    if isinstance(content, dict):
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not all(isinstance(key, str) and _is_whole(content[key]) for key in content):
        raise InputError(f"{path} holds no state dict; save it alone: torch.save(model.state_dict(), FILE).")
    if sum(value.nbytes for value in content.values()) > 2 * os.path.getsize(path):  # tied weights are there twice
        raise InputError(f"{path} holds no state dict: its tensors are larger than the file.")
    state: dict[str, Tensor] = {}
    storages: set[int] = set()
    for key, value in content.items():
        storage = value.untyped_storage().data_ptr()
        state[key] = value.detach().clone() if storage in storages else value.detach()
        storages.add(storage)
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_whole(value: object) -> bool:
    """Return whether this is a dense tensor that owns all its elements, so that a copy is no larger."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.nbytes <= value.untyped_storage().nbytes()


def hash_weights(digest: Any, module: nn.Module) -> None:
    """Add the names and values of a module's state dict to a hash of hashlib's."""
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def load_weights(
    module: nn.Module, state: dict[str, Tensor], path: str | Path, optional_prefixes: tuple[str, ...] = ()
) -> None:
    """Load `state`, read from `path`, into a module, which may be on the meta device.

    Keys that begin with one of `optional_prefixes` may be absent, and so may `num_batches_tracked`, which old files
    lack. Raises `InputError` naming a key that is missing, unknown, of another size, or not finite.
    """
    expected = module.state_dict()
    loaded: dict[str, Tensor] = {}
    for key in [*expected, *(key for key in state if key not in expected)]:
        if key not in expected:
            raise InputError(
                f"{path} has the weight {key}, which this model does not have; it belongs to another model."
            )
        if key not in state:
            if key.endswith("num_batches_tracked"):
                loaded[key] = torch.zeros((), dtype=expected[key].dtype)
            elif not key.startswith(optional_prefixes):
                raise InputError(f"{path} lacks the weight {key}; it belongs to another model.")
            continue
        if expected[key].is_floating_point() and not state[key].is_floating_point():
            raise InputError(f"{path} has {key} as {state[key].dtype}, where the model needs floating-point numbers.")
        if expected[key].shape != state[key].shape:
            raise InputError(
                f"{path} has {key} of size {tuple(state[key].shape)} where the model needs "
                f"{tuple(expected[key].shape)}; weights, vocabulary and captioner.json must come from the same run."
            )
        loaded[key] = state[key].to(expected[key].dtype).contiguous()
        if (wrong := _unusable_number(loaded[key])) is not None:
            raise InputError(
                f"{path} has {wrong:g} in {key}, with which no caption can be computed; use the weights of an earlier "
                f"epoch or retrain."
            )
    module.load_state_dict(loaded, strict=False, assign=True)


def _unusable_number(weight: Tensor) -> float | None:
    """Find a number in a weight that is not finite, or so large that products overflow; None if there is none."""
    if not weight.is_floating_point() or not weight.numel():
        return None
    extremes = torch.stack((weight.amin(), weight.amax())).tolist()  # both are nan where any number is; aminmax is slow
    return next((x for x in extremes if not abs(x) <= MAX_WEIGHT), None)
