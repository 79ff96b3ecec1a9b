"""Transforms that resize images: torchvision's with faster kernels, and `Reduce`."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from captioning.lazy_compiler import compiler_left_out

with compiler_left_out():
    from torchvision import transforms as T

JPEG_QUALITY = 75  # of reduced images; the default of most programs
FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")  # elsewhere, the kernels take twice Pillow's time
MAX_PIXELS = 16_000_000  # of an image that is copied into a tensor; a larger one is resized by Pillow


class Resize(T.Resize):
    """torchvision's `Resize` for PIL images, by `resize_image`."""

    size: Any
    interpolation: Any

    def forward(self, img: Image.Image) -> Image.Image:
        """Return the resized image."""
        if not isinstance(self.size, int):
            height, width = self.size
        else:
            shorter = min(img.size)
            width, height = (self.size if side == shorter else int(self.size * side / shorter) for side in img.size)
        return resize_image(img, (width, height), self.interpolation)


class RandomResizedCrop(T.RandomResizedCrop):
    """torchvision's `RandomResizedCrop` for PIL images, by `resize_image`."""

    size: Any
    interpolation: Any
    scale: Any
    ratio: Any
    get_params: Any  # its annotations are of tensors, though it takes PIL images

    def forward(self, img: Image.Image) -> Image.Image:
        """Return a random part of the image, resized."""
        top, left, height, width = self.get_params(img, self.scale, self.ratio)
        part = img.crop((left, top, left + width, top + height))
        return resize_image(part, (self.size[1], self.size[0]), self.interpolation)


class Reduce:
    """A transform that makes a larger RGB image look like the small JPEG files that many data sets consist of.

    An image whose longer side has more than `longer_side` pixels is resized to it, and compressed and decompressed as a
    JPEG. A model that was trained on such files captions sharper images worse: their fine detail is new to it.
    """

    def __init__(self, longer_side: int):
        self.longer_side = longer_side

    def __call__(self, image: Image.Image) -> Image.Image:
        """Return the reduced image, or the image itself if it is small already."""
        scale = self.longer_side / max(image.size)
        if scale >= 1:
            return image
        width, height = (max(1, round(side * scale)) for side in image.size)
        with io.BytesIO() as file:
            resized = resize_image(image, (width, height), T.InterpolationMode.BICUBIC)
            resized.save(file, "JPEG", quality=JPEG_QUALITY)
            return Image.open(file, formats=["JPEG"]).convert("RGB")


def resize_image(image: Image.Image, size: tuple[int, int], interpolation: T.InterpolationMode) -> Image.Image:
    """Resize an image to (width, height), with antialiasing, as Pillow does.

    With AVX2, PyTorch's kernels take a third to a fifth of Pillow's time for RGB images; a few levels in a thousand
    differ, and those by one, save in images that are far longer than wide.
    """
    mode = interpolation.value
    is_small = image.width * image.height <= MAX_PIXELS
    if not (FAST and is_small and image.mode == "RGB" and mode in ("bilinear", "bicubic")):
        return T.Resize([*reversed(size)], interpolation)(image)
    pixels = torch.from_numpy(np.array(image))[None].permute(0, 3, 1, 2)  # (1, 3, height, width), channels last
    resized = F.interpolate(pixels, tuple(reversed(size)), mode=mode, antialias=True)
    return Image.fromarray(resized.permute(0, 2, 3, 1)[0].numpy())
