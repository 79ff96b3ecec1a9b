"""Backbones in 8-bit integers on a CPU, by ONNX Runtime's static quantization (arXiv 1712.05877).

Weights have a scale per channel, and 7 bits where the processor's sums of 8-bit products would overflow. The range
of each activation is measured on the photos in images/. The quantized backbone is cached under a hash of all that it
depends on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from captioning.backbones import Preprocessing
from captioning.errors import InputError
from captioning.files import CACHE, read_bytes, write_cache
from captioning.images import ImageDataset, build_transform
from captioning.weights import hash_weights
from model import EncoderCNN

VERSION = "1"  # of the files; backbones of another version are quantized again
IMAGES = Path(__file__).parents[1] / "images"
CROPS = 4  # random crops of each image for calibration, in addition to the whole image


class QuantizedBackbone(nn.Module):
    """A backbone as an ONNX graph, which ONNX Runtime computes.

    Its output has the layout of the original `backbone`, whose `output_fmt` and `num_prefix_tokens` it takes.
    """

    def __init__(self, graph: bytes, backbone: nn.Module):
        super().__init__()
        onnxruntime = import_onnxruntime()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin while they wait for the next graph would take the processor from the decoder.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self.output_fmt = getattr(backbone, "output_fmt", "NCHW")
        if hasattr(backbone, "num_prefix_tokens"):
            self.num_prefix_tokens = backbone.num_prefix_tokens

    def forward_features(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) in float32 -> the backbone's last features, in float32."""
        return torch.from_numpy(self.session.run(None, {"images": images.contiguous().numpy()})[0])


class FeatureMap(nn.Module):
    """Wraps an encoder's backbone into a module whose output is its last feature map."""

    def __init__(self, encoder: EncoderCNN):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) in float32 -> the backbone's last features."""
        return self.encoder.run_backbone(images)


def import_onnxruntime() -> Any:
    """Import ONNX Runtime without its telemetry; raises `InputError` if a package is missing."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # otherwise, it writes an id to the temporary folder and sends it
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"--precision int8 needs {error.name}, which is missing: pip install onnx onnxruntime onnxscript"
        ) from None
    return onnxruntime


def quantize(encoder: EncoderCNN, preprocessing: Preprocessing, cache: Path = CACHE) -> EncoderCNN:
    """Replace the backbone of an encoder, which is `for_inference(torch.float32)` on a CPU, with a quantized one.

    Raises `InputError` if the backbone cannot be exported to ONNX or onnxruntime is missing.
    """
    version = import_onnxruntime().__version__
    name = f"int8/{_key(encoder, preprocessing, version)}.onnx"
    try:
        quantized = QuantizedBackbone(read_bytes(cache / name), encoder.network)
    except Exception:  # the file is missing or damaged, for which onnxruntime raises many types
        graph = _quantize(encoder, preprocessing)
        write_cache(cache, name, lambda file: file.write(graph))
        quantized = QuantizedBackbone(graph, encoder.network)
    encoder.set_submodule(encoder.module_name, quantized)
    return encoder


def sums_overflow() -> bool:
    """Return whether the processor adds two products of 8-bit integers in 16 bits, as x86 without VNNI does."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx2")) and not (can.get("avx512_vnni") or can.get("avx_vnni"))


def _key(encoder: EncoderCNN, preprocessing: Preprocessing, version: str) -> str:
    about = VERSION, version, sums_overflow(), encoder.backbone_name, preprocessing.as_key()
    digest = hashlib.sha256(json.dumps(about).encode())
    hash_weights(digest, encoder.network)
    for path in calibration_files():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _quantize(encoder: EncoderCNN, preprocessing: Preprocessing) -> bytes:
    from google.protobuf.message import DecodeError
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = calibration_images(preprocessing)

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            image = next(self.images, None)
            return None if image is None else {"images": image[None].numpy()}

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)  # onnxruntime recommends the preprocessing that follows
        whole, prepared, small = (os.path.join(folder, f"{stage}.onnx") for stage in ("whole", "prepared", "small"))
        try:
            _export(encoder, preprocessing.image_size, whole)
            quant_pre_process(whole, prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                small,
                Images(),
                per_channel=True,
                reduce_range=sums_overflow(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return Path(small).read_bytes()
        except (OSError, DecodeError, InputError) as error:
            if isinstance(error, InputError) and not isinstance(error.__cause__, OSError):
                raise
            place = f"the temporary folder {tempfile.gettempdir()} does not hold the files of --precision int8"
            raise InputError(f"{place}; set TMPDIR to one with 500 MB, or use --precision fp32.") from error
        finally:
            logging.disable(logging.NOTSET)


def calibration_files() -> list[Path]:
    """List the images that the ranges are measured on; raises `InputError` if there are none."""
    paths = sorted(IMAGES.glob("*.jpg"))
    if not paths:
        raise InputError(f"--precision int8 needs the photos of {IMAGES}; restore that folder from the repository.")
    return paths


def calibration_images(preprocessing: Preprocessing) -> Iterator[Tensor]:
    """Yield each image of `calibration_files` and `CROPS` crops of it, normalized, (3, H, W)."""
    paths = calibration_files()
    whole, crops = (
        ImageDataset(paths, build_transform(train, **asdict(preprocessing), normalize=True)) for train in (False, True)
    )
    for i in range(len(paths)):
        yield whole[i]
        yield from (crops[i, seed] for seed in range(CROPS))


@torch.inference_mode()
def _export(encoder: EncoderCNN, size: int, path: str) -> None:
    from captioning.export import run_exporter  # here, as a cached backbone does not need it

    run_exporter(
        FeatureMap(encoder),
        torch.zeros(2, 3, size, size),  # a batch size of 1 would become a constant
        f"{encoder.backbone_name} cannot be exported to ONNX, which --precision int8 needs",
        "use --precision fp32",
        f=path,
        external_data=False,
    )
