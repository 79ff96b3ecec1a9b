"""Resizing by PyTorch's kernels gives what Pillow's and torchvision's give."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import draw_noise
from PIL import Image
from torchvision import transforms as T

from captioning import resizing
from captioning.resizing import RandomResizedCrop, Resize, resize_image


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(resizing, "FAST", True)


HOW = [T.InterpolationMode.BILINEAR, T.InterpolationMode.BICUBIC]
SIZES = [(640, 480), (480, 640), (500, 333), (260, 260), (61, 47), (1, 1)]


def difference(one: Image.Image, other: Image.Image) -> tuple[int, float]:
    """The largest and the mean difference between the levels of two images of one size."""
    assert one.size == other.size
    assert one.mode == other.mode
    levels = np.abs(np.asarray(one, np.int16) - np.asarray(other, np.int16))
    return int(levels.max()), float(levels.mean())


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", SIZES)
def test_levels_differ_from_pillow_s_by_one_at_most(size: tuple[int, int], how: T.InterpolationMode):
    image = draw_noise(3, size)
    for new in ((260, 260), (64, 48), (1, 5)):
        largest, mean = difference(resize_image(image, new, how), T.functional.resize(image, [*reversed(new)], how))
        assert largest <= 1
        assert mean < 0.01


@pytest.mark.parametrize("size", [(3, 900), (900, 3)])
def test_a_very_long_image_is_resized_much_as_by_pillow(size: tuple[int, int]):
    image = draw_noise(3, size)
    for how in HOW:
        assert difference(resize_image(image, (260, 260), how), T.functional.resize(image, [260, 260], how))[1] < 0.05


@pytest.mark.parametrize(
    ("image", "how"),
    [
        (draw_noise(3, (64, 48)), T.InterpolationMode.LANCZOS),
        (draw_noise(3, (64, 48)), T.InterpolationMode.NEAREST),
        *((draw_noise(3, (64, 48)).convert(mode), T.InterpolationMode.BICUBIC) for mode in ("L", "RGBA", "CMYK", "F")),
    ],
)
def test_what_the_kernels_do_not_take_is_resized_by_pillow(image: Image.Image, how: T.InterpolationMode):
    assert resize_image(image, (32, 20), how) == T.functional.resize(image, [20, 32], how)


def test_a_large_image_is_resized_by_pillow(monkeypatch: pytest.MonkeyPatch):
    image, how = draw_noise(3, (640, 480)), T.InterpolationMode.BICUBIC
    assert resize_image(image, (260, 260), how) != T.functional.resize(image, [260, 260], how)
    expected = T.functional.resize(image, [260, 260], how)
    with monkeypatch.context() as patch:
        patch.setattr(resizing, "MAX_PIXELS", 640 * 480 - 1)
        assert resize_image(image, (260, 260), how) == expected
    monkeypatch.setattr(resizing, "FAST", False)
    assert resize_image(image, (260, 260), how) == expected


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("size", SIZES)
def test_the_transforms_are_torchvision_s(size: tuple[int, int], how: T.InterpolationMode):
    image = draw_noise(3, size)
    for new in (40, (40, 56)):
        assert difference(Resize(new, how)(image), T.Resize(new, how)(image))[0] <= 1
    arguments = ((30, 50), (0.6, 1.0), (0.8, 1.25), how)
    for seed in range(5):
        cut = []
        for transform in (RandomResizedCrop(*arguments), T.RandomResizedCrop(*arguments)):
            torch.manual_seed(seed)
            cut.append(transform(image))
        assert difference(*cut)[0] <= 1
