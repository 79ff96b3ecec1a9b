"""Captioning, from image files to sentences: the recipe, and the project with each of two backbones."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import recipe
from benchmarks.material import Material
from benchmarks.timing import DEVICE, GPU, best_rates, log, seconds_of
from captioning import checkpoint
from captioning.backbones import preprocessing_of
from captioning.captioner import Captioner, Decoding
from captioning.distributed import fast_dtype
from captioning.features import BATCH
from captioning.images import ImageDataset, build_pixel_transform, read_batches, split_batches
from model import EncoderCNN

RESNET, LITE = "resnet50", "tf_efficientnet_lite2"
STANDARDIZED_ON = 64  # images
CAN_QUANTIZE = not GPU and all(map(find_spec, ("onnx", "onnxruntime", "onnxscript")))


@dataclass
class Model:
    """A captioner and the encoder that it was built from, in float32 with its batch norms unfolded."""

    captioner: Captioner
    encoder: EncoderCNN
    quantized: Captioner | None  # the captioner in 8-bit integers, on a CPU with onnxruntime

    @property
    def image_size(self) -> int:
        """Side of the backbone's input in pixels."""
        return self.captioner.description.preprocessing.image_size


def measure_captioning(material: Material, model: Path) -> dict[str, Any]:
    """Measure images/s from file to caption of the recipe and the project, and the limits that the backbones set."""
    settings, some = material.settings, material.paths[: material.settings.recipe_images]
    models = load_models(material, model)
    caption_plainly = build_recipe(material, models[RESNET])
    turns: dict[str, Callable[[], int]] = {"recipe": lambda: len([caption_plainly(path) for path in some])}
    for name, one in models.items():
        turns |= {f"{name}/{key}": work for key, work in backbone_turns(one, material).items()}
    rates = best_rates(turns, settings.repeats)
    recipe_one = statistics.median(seconds_of(lambda path=path: caption_plainly(path)) for path in some)
    backbones: dict[str, dict[str, float]] = {}
    for name, one in models.items():
        measured = {key.split("/")[1]: rate for key, rate in rates.items() if key.startswith(f"{name}/")}
        seconds = statistics.median(
            seconds_of(lambda path=path, one=one: one.captioner(path, Decoding())) for path in some
        )
        backbones[name] = {
            "image_size": one.image_size,
            **measured,
            "ratio": measured["photos_per_second"] / rates["recipe"],
            "share_of_bare_forward": measured["photos_per_second"] / measured["bare_forward_photos_per_second"],
            "seconds_for_one": seconds,
            "ratio_for_one": recipe_one / seconds,
        }
        if one.quantized:
            backbones[name]["int8_ratio"] = measured["int8_photos_per_second"] / rates["recipe"]
    return {
        "recipe_photos_per_second": rates["recipe"],
        "recipe_seconds_for_one": recipe_one,
        "batch": BATCH,
        "precision": models[RESNET].captioner.precision,
        "backbones": backbones,
    }


def load_models(material: Material, folder: Path) -> dict[str, Model]:
    """Load the trained model with its ResNet-50, and its decoder with an EfficientNet-Lite2."""
    if not CAN_QUANTIZE:
        log("captioning in 8-bit integers is not measured, as it needs a CPU, onnx, onnxruntime and onnxscript")
    encoder, decoder, vocab, description = checkpoint.load_model(folder)
    preprocessing = preprocessing_of(LITE, material.settings.lite_image_size)
    lite = EncoderCNN(encoder.embed.out_features, LITE).eval()
    images = ImageDataset(material.paths, build_pixel_transform(preprocessing))
    with torch.no_grad():  # so that the decoder's inputs have the scale that it was trained with
        lite.standardize(lite.features(torch.stack([images[i] for i in range(min(STANDARDIZED_ON, len(images)))])))
    other = description.model_copy(update={"preprocessing": preprocessing})
    return {RESNET: build_model(encoder, decoder, vocab, description), LITE: build_model(lite, decoder, vocab, other)}


def build_model(encoder: EncoderCNN, *rest: Any) -> Model:
    """Build the captioner of an encoder with the precision "auto" and, if possible, in 8-bit integers."""
    quantized = Captioner(encoder, *rest, precision="int8") if CAN_QUANTIZE else None
    return Model(Captioner(encoder, *rest), encoder, quantized)


def build_recipe(material: Material, model: Model) -> Callable[[Path], str]:
    """Build the recipe's function that captions one image, with the model's weights."""
    annotations, images = material.data / "annotations" / "captions_val.json", material.data / "images" / "val"
    words, decoder = material.vocab.words, model.captioner.decoder
    plain = recipe.Captions(annotations, images, words=words, image_size=model.image_size)
    embed_size = model.encoder.embed.out_features
    plain_encoder = recipe.Encoder(embed_size).to(DEVICE).eval()
    plain_encoder.load_state_dict(model.encoder.state_dict())
    plain_decoder = recipe.Decoder(embed_size, decoder.lstm.hidden_size, len(words)).to(DEVICE).eval()
    plain_decoder.load_state_dict(decoder.state_dict())
    return lambda path: recipe.caption(path, plain, plain_encoder, plain_decoder, DEVICE)


def backbone_turns(model: Model, material: Material) -> dict[str, Callable[[], int]]:
    """Return the functions to time for a backbone, by the rate's name: captioning, and its parts alone."""
    captioner, paths, workers = model.captioner, material.paths, material.settings.workers
    dtype, times = fast_dtype(DEVICE), 20 if GPU else 5
    backbone = copy.deepcopy(model.encoder.network).to(DEVICE, dtype, memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, model.image_size, model.image_size, device=DEVICE)
    images = images.to(dtype, memory_format=torch.channels_last)
    pixels = (images.float() * 40 + 128).clamp(0, 255).byte().cpu()
    pixels = pixels.pin_memory() if GPU else pixels
    batches = split_batches(len(paths), BATCH)

    @torch.inference_mode()
    def forward() -> int:
        for _ in range(times):
            backbone(images)
        return times * BATCH

    @torch.inference_mode()
    def encode() -> int:
        for _ in range(times):
            captioner.encoder.features(pixels.to(DEVICE, non_blocking=True))
        return times * BATCH

    def read() -> int:
        return sum(len(keys) for keys, _ in read_batches(ImageDataset(paths, captioner.transform), batches, workers))

    turns = {
        "photos_per_second": lambda: len(list(captioner.stream(paths, Decoding(), workers))),
        "bare_forward_photos_per_second": forward,
        "encoder_from_memory_photos_per_second": encode,
        "reading_photos_per_second": read,
    }
    if quantized := model.quantized:
        turns["int8_photos_per_second"] = lambda: len(list(quantized.stream(paths, Decoding(), workers)))
    return turns
