"""Weight files: those of other programs, those with unusable numbers, and those that mean harm."""

from __future__ import annotations

import io
import json
import pickle
import struct
import sys
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from conftest import PEAK, run_code
from safetensors.torch import save_file
from torch import Tensor

from captioning.errors import InputError
from captioning.weights import load_weights, read_state_dict

ROOT = Path(__file__).parents[1]
HUGE = 3_000_000_000


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(embed=nn.Linear(4, 3), norm=nn.BatchNorm1d(3)))


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def as_float(dtype: torch.dtype, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}


# What another program saved, by what it is called

SAVED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "a state dict": dict,
    "DistributedDataParallel": lambda state: with_prefix("module.", state),
    "torch.compile": lambda state: with_prefix("_orig_mod.", state),
    "DistributedDataParallel, compiled": lambda state: with_prefix("module._orig_mod.", state),
    "wrapped as state_dict": lambda state: {"epoch": 3, "state_dict": state, "loss": [0.5, None, True]},
    "wrapped as model": lambda state: {"model": state, "args": None},
    "wrapped as model_state_dict": lambda state: {"model_state_dict": with_prefix("module.", state)},
    "without counts of batches": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
    "parameters": lambda state: {**state, "embed.weight": nn.Parameter(state["embed.weight"])},
    "float16": lambda state: as_float(torch.float16, state),
    "bfloat16": lambda state: as_float(torch.bfloat16, state),
    "float64": lambda state: as_float(torch.float64, state),
    "transposed in memory": lambda state: {**state, "embed.weight": state["embed.weight"].t().contiguous().t()},
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("saved", SAVED)
def test_what_other_programs_save_is_loaded(saved: str, form: str, device: str, tmp_path: Path):
    module = small_module()
    content = SAVED[saved](module.state_dict())
    path = tmp_path / ("weights.safetensors" if form == "safetensors" else "weights.pkl")
    if form == "safetensors":
        if not all(isinstance(value, Tensor) for value in content.values()):
            pytest.skip("safetensors holds tensors only")
        save_file({key: value.contiguous() for key, value in content.items()}, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with torch.device(device):
        loaded = small_module()
    load_weights(loaded, read_state_dict(path), path)
    tolerance = {"float16": 1e-3, "bfloat16": 1e-2}.get(saved, 0)
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), atol=tolerance, rtol=0)


def test_weights_that_share_memory_in_the_file_do_not_share_it_in_the_model(tmp_path: Path):
    weight = torch.randn(5, 4)
    torch.save({"embed.weight": weight, "linear.weight": weight}, tmp_path / "tied.pkl")
    state = read_state_dict(tmp_path / "tied.pkl")
    assert torch.equal(state["embed.weight"], weight)
    assert torch.equal(state["linear.weight"], weight)
    assert state["embed.weight"].data_ptr() != state["linear.weight"].data_ptr()


# Numbers that no caption can be computed with


@pytest.mark.parametrize("key", ["embed.bias", "norm.running_var"])
@pytest.mark.parametrize(
    ("number", "dtype", "named"),
    [
        (float("nan"), torch.float32, "nan"),
        (float("inf"), torch.float32, "inf"),
        (float("-inf"), torch.bfloat16, "-inf"),
        (1e38, torch.float32, r"1e\+38"),
        (-1e38, torch.float32, r"-1e\+38"),
        (1e300, torch.float64, "inf"),
    ],
)
def test_unusable_numbers_are_refused_with_their_key(
    number: float, dtype: torch.dtype, named: str, key: str, tmp_path: Path
):
    state = small_module().state_dict()
    state[key] = state[key].to(dtype)
    state[key][1] = number
    torch.save(state, tmp_path / "decoder-1.pkl")
    with pytest.raises(InputError, match=rf"decoder-1\.pkl has {named} in {key}, .*; use "):
        load_weights(small_module(), read_state_dict(tmp_path / "decoder-1.pkl"), tmp_path / "decoder-1.pkl")


# Files that hold something else


class Whole(nn.Module):
    pass


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (Whole(), r"it holds test_weights\.Whole; save the state dict alone: torch\.save\(model\.state_dict"),
        ({"model": {}, "args": Path("a")}, r"it holds pathlib\."),
        ({"w": torch.zeros(1, dtype=torch.uint16)}, r"of a type that is not read, \S+; save dense ones of float32"),
        ([torch.zeros(1)], "holds no state dict"),
        ({"embed.weight": 1.0}, "holds no state dict"),
        ({1: torch.zeros(1)}, "holds no state dict"),
        ({"embed.weight": torch.zeros(1).expand(9)}, "holds no state dict"),
        ({"other.weight": torch.zeros(1)}, "lacks the weight"),
    ],
    ids=[
        "a module",
        "a path",
        "a type",
        "a list",
        "a number",
        "a number as a name",
        "an expanded tensor",
        "other names",
    ],
)
def test_what_is_no_state_dict_is_one_sentence(content: object, problem: str, tmp_path: Path):
    torch.save(content, tmp_path / "weights.pkl")
    with pytest.raises(InputError, match=rf"weights\.pkl .*{problem}|weights\.pkl {problem}"):
        load_weights(small_module(), read_state_dict(tmp_path / "weights.pkl"), tmp_path / "weights.pkl")


def test_a_long_header_of_safetensors_is_not_read(tmp_path: Path):
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({str(i): empty for i in range(100_000)}).encode()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="its header is too long"):
        read_state_dict(tmp_path / "w.safetensors")


@pytest.mark.parametrize("name", ["none.pkl", "none.safetensors", "a" * 999, "zero\0byte"])
def test_a_file_that_is_not_there_is_named(name: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"{name} does not exist; check the path"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("name", ["model.bin", "w.pth", "w.SAFETENSORS", "w.safetensors"])
def test_the_format_is_told_by_the_content(name: str, tmp_path: Path):
    state = small_module().state_dict()
    for save in (torch.save, save_file):
        save(state, tmp_path / name)
        torch.testing.assert_close(read_state_dict(tmp_path / name), state)
    (tmp_path / name).write_text("Not Found")
    with pytest.raises(InputError, match=r"read safely \(it is neither of torch\.save nor of safetensors\)"):
        read_state_dict(tmp_path / name)


def test_what_is_not_a_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="is not a file; check the path"):
        read_state_dict(tmp_path)


# Files that ask for more memory than they hold


def tensor_pickle(numel: int, size: int, names: int = 1, storage_tail: bytes = b"") -> bytes:
    """The pickle of tensors of `size` bytes over storages "0", "1", ... said to hold `numel` bytes each."""
    number = struct.Struct("<BI").pack
    items = b""
    for i in range(names):
        name = str(i).encode()
        storage = b"(X\x07\0\0\0storagectorch\nByteStorage\nX%bX\x03\0\0\0cpu" % (struct.pack("<I", len(name)) + name)
        items += b"X" + struct.pack("<I", len(name)) + name + b"ctorch._utils\n_rebuild_tensor_v2\n("
        items += storage + number(0x4A, numel) + storage_tail + b"tQK\0" + number(0x4A, size)
        items += b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtRs"
    return b"\x80\x02}" + items + b"."


def call_pickle(module: str, name: str, operation: bytes = b"R") -> bytes:
    return (
        f"\x80\x02c{module}\n{name}\n".encode("latin1")
        + b"\x8a\x08"
        + struct.pack("<q", HUGE)
        + b"\x85"
        + operation
        + b"."
    )


def zip_file(pickled: bytes, entries: dict[str, bytes] | None = None, compressed: tuple[str, ...] = ()) -> bytes:
    file = io.BytesIO()
    records = {"a/data.pkl": pickled, "a/byteorder": b"little", "a/version": b"3\n", **(entries or {})}
    with zipfile.ZipFile(file, "w") as target:
        for name, content in records.items():
            target.writestr(name, content, zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED)
    return file.getvalue()


def legacy_file(pickled: bytes, rest: bytes = b"") -> bytes:
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    head = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, system)
    return b"".join(pickle.dumps(part, 2) for part in head) + pickled + rest


def overlapping_file(names: int, size: int) -> bytes:
    """A zip whose stored entries all point at the same `size` bytes."""
    file, directory = bytearray(), bytearray()

    def add(name: str, content: bytes, offset: int | None = None) -> int:
        at = len(file) if offset is None else offset
        shape = struct.pack("<3I", zlib.crc32(content), len(content), len(content))
        if offset is None:
            local = struct.pack("<I5H12sHH", 0x04034B50, 20, 0, 0, 0, 0, shape, len(name), 0)
            file.extend(local + name.encode() + content)
        if offset is not None or not name.startswith("a/data/"):
            central = struct.pack("<I6H12s5HII", 0x02014B50, 20, 20, 0, 0, 0, 0, shape, len(name), 0, 0, 0, 0, 0, at)
            directory.extend(central + name.encode())
        return at

    for name, content in (
        ("a/data.pkl", tensor_pickle(size, size, names)),
        ("a/byteorder", b"little"),
        ("a/version", b"3"),
    ):
        add(name, content)
    block = bytes(size)
    at = add("a/data/0", block)
    for i in range(names):
        add(f"a/data/{i}", block, at)
    end = struct.pack("<I4HIIH", 0x06054B50, 0, 0, names + 3, names + 3, len(directory), len(file), 0)
    return bytes(file + directory + end)


def many_entries() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as target:
        for i in range(60_000):
            target.writestr(str(i), b"")
    return file.getvalue()


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def shared_tensors() -> bytes:
    weight = torch.zeros(10_000_000)
    return saved({str(i): weight for i in range(100)})


@cache
def compressed_zeros() -> bytes:
    zeros = bytes(500_000_000)
    return zip_file(tensor_pickle(len(zeros), len(zeros)), {"a/data/0": zeros}, ("a/data/0",))


def huge_header() -> bytes:
    header = json.dumps({"embed.weight": {"dtype": "F32", "shape": [HUGE // 4], "data_offsets": [0, HUGE]}}).encode()
    return struct.pack("<Q", len(header)) + header


KEYS = pickle.dumps(["0"], 2)
DICTIONARIES = b"\x80\x02(" + b"}" * 30_000_000 + b"t."
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a bytearray": (lambda: zip_file(call_pickle("builtins", "bytearray")), "it holds builtins.bytearray"),
    "a bytearray of Python 2": (lambda: zip_file(call_pickle("__builtin__", "bytearray")), "it holds __builtin__"),
    "a tensor by its size": (lambda: zip_file(call_pickle("torch", "Tensor")), "it holds torch.Tensor"),
    "a storage by its size": (
        lambda: zip_file(call_pickle("torch.storage", "UntypedStorage")),
        "it holds torch.storage",
    ),
    "a storage's type called": (lambda: zip_file(call_pickle("torch", "FloatStorage")), ""),
    "a new object": (lambda: zip_file(call_pickle("torch", "FloatStorage", b"\x81")), ""),
    "a bytearray, legacy": (lambda: legacy_file(call_pickle("builtins", "bytearray")), "it holds builtins.bytearray"),
    "a bytearray in place of the magic number": (lambda: call_pickle("builtins", "bytearray"), "it holds builtins"),
    "a bytearray in place of the names": (
        lambda: legacy_file(b"\x80\x02}.", call_pickle("builtins", "bytearray")),
        "it holds builtins.bytearray",
    ),
    "a name from the stack": (
        lambda: zip_file(
            b"\x80\x04\x8c\x08builtins\x8c\x09bytearray\x93\x8a\x08" + struct.pack("<q", HUGE) + b"\x85R."
        ),
        "it holds STACK_GLOBAL",
    ),
    "a pickle of dictionaries": (lambda: zip_file(DICTIONARIES), "MB besides tensors; save the state dict"),
    "a pickle of dictionaries, legacy": (lambda: legacy_file(DICTIONARIES), "exhausted"),
    "a storage larger than its entry": (lambda: zip_file(tensor_pickle(1 << 30, 4), {"a/data/0": b"abcd"}), "size"),
    "a tensor larger than its storage": (lambda: zip_file(tensor_pickle(4, 1 << 30), {"a/data/0": b"abcd"}), "resiz"),
    "a storage larger than the file, legacy": (
        lambda: legacy_file(tensor_pickle(1 << 30, 4, storage_tail=b"N"), KEYS + struct.pack("<q", 1 << 30) + b"abcd"),
        "",
    ),
    "a tensor larger than its storage, legacy": (
        lambda: legacy_file(tensor_pickle(4, 1 << 30, storage_tail=b"N"), KEYS + struct.pack("<q", 4) + b"abcd"),
        "",
    ),
    "entries that share their bytes": (lambda: overlapping_file(300, 10 << 20), "larger than the file"),
    "compressed entries": (compressed_zeros, "it is compressed"),
    "compressed entries behind junk": (lambda: compressed_zeros() + bytes(66_000), "it is damaged or not complete"),
    "compressed entries after junk": (lambda: b"PK\x03\x04" + compressed_zeros(), "it is compressed|zip"),
    "a compressed version": (
        lambda: zip_file(b"\x80\x02}.", {"a/version": bytes(500_000_000)}, ("a/version",)),
        "it is compressed",
    ),
    "a TorchScript model": (
        lambda: zip_file(b"\x80\x02}.", {"a/code/__torch__.py": b"class A: ..."}),
        "it is a TorchScript model; save its state_dict",
    ),
    "a TorchScript model's constants": (
        lambda: zip_file(b"\x80\x02}.", {"a/constants.pkl": b"\x80\x02}."}),
        "it is a TorchScript model",
    ),
    "two pickles": (lambda: zip_file(b"\x80\x02}.", {"a/DATA.PKL": b"\x80\x02}."}), "two entries of one name"),
    "a pickle in each of two folders": (
        lambda: zip_file(b"\x80\x02}.", {"b/data.pkl": b"\x80\x02}."}),
        "not a file of",
    ),
    "many entries": (many_entries, "too many entries"),
    "a tensor under many names": (shared_tensors, "tensors are larger than the file"),
    "a safetensors header": (huge_header, ""),
}

CHILD = (
    PEAK
    + """
import json
from captioning.errors import InputError
from captioning.weights import read_state_dict

virtual = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (virtual + (5 << 30),) * 2)
before = peak()
for path in sys.argv[1:]:
    try:
        result = repr(read_state_dict(path))[:200]
    except InputError as error:
        result = f"InputError: {error}"
    print(json.dumps([result, (peak() - before) / 1e6]), flush=True)
"""
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_file_takes_no_more_memory_than_its_size_and_300_mb(tmp_path: Path):
    paths = []
    for i, (build, _) in enumerate(BOMBS.values()):
        suffix = "safetensors" if build is huge_header else "pkl"
        paths.append(tmp_path / f"{i}.{suffix}")
        paths[-1].write_bytes(build())
    child = run_code(CHILD, *paths)
    results = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(results) == len(BOMBS), child.stderr[-2000:]
    for (name, (_, reason)), path, (result, memory) in zip(BOMBS.items(), paths, results, strict=True):
        assert result.startswith(f"InputError: {path} "), (name, result)
        assert "\n" not in result, name
        assert not reason or any(part in result for part in reason.split("|")), (name, result)
        assert memory < 300, (name, memory)


@pytest.mark.parametrize("name", ["encoder-1.pkl", "encoder-1.safetensors"])
def test_a_pointer_of_git_lfs_is_named(tmp_path: Path, name: str):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="it is a Git LFS pointer; `git lfs pull` fetches the file itself"):
        read_state_dict(tmp_path / name)
