"""The plain recipe, reimplemented from its description: the baseline that this project is measured against.

A frozen ResNet-50 runs in float32 for every caption of every epoch. Each step draws a caption length at random, then
captions of that length; their images are opened, resized, cropped and normalized one by one in the main process. The
vocabulary is counted by tokenizing every caption with NLTK, one at a time, and all captions are tokenized a second
time for their lengths. Images are captioned one by one.

Two differences make it slightly faster than the original: batch norms use their stored statistics in training instead
of computing them, and NLTK does not split captions into sentences, which needs a download.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from nltk.tokenize import word_tokenize
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, SubsetRandomSampler
from torchvision import transforms as T
from torchvision.models import resnet50

from benchmarks.timing import DEVICE

SPECIAL_WORDS = ["<start>", "<end>", "<unk>"]


def words_of(caption: str) -> list[str]:
    """Split a caption into NLTK's tokens."""
    return word_tokenize(str(caption).lower(), preserve_line=True)


class Captions(Dataset):
    """Images and captions; an item is (image (3, size, size), caption (length,)).

    `threshold` is the minimum count of a word in the vocabulary; with `words`, that list is the vocabulary instead.
    `mean` and `std` normalize the images.
    """

    def __init__(
        self,
        annotations: Path,
        image_folder: Path,
        threshold: int = 5,
        words: list[str] | None = None,
        image_size: int = 224,
        mean: tuple[float, ...] = (0.485, 0.456, 0.406),
        std: tuple[float, ...] = (0.229, 0.224, 0.225),
    ):
        with open(os.devnull, "w") as quiet, redirect_stdout(quiet):
            self.coco = COCO(str(annotations))
        self.annotations: dict[int, Any] = self.coco.anns  # its stub has the fields of detection only
        self.image_folder, self.ids = image_folder, list(self.annotations)
        if words is None:
            counts: Counter[str] = Counter()
            for i in self.ids:
                counts.update(words_of(self.annotations[i]["caption"]))
            words = SPECIAL_WORDS + [word for word, count in counts.items() if count >= threshold]
        self.index = {word: index for index, word in enumerate(words)}
        self.lengths = [len(words_of(self.annotations[i]["caption"])) for i in self.ids]
        resize = T.Resize(round(image_size * 256 / 224))
        normalize = [T.ToTensor(), T.Normalize(mean, std)]
        crop = [T.RandomCrop(image_size), T.RandomHorizontalFlip()]
        self.transform: Callable[[Image.Image], Tensor] = T.Compose([resize, *crop, *normalize])
        self.test_transform: Callable[[Image.Image], Tensor] = T.Compose([resize, T.CenterCrop(image_size), *normalize])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        annotation = self.annotations[self.ids[i]]
        name = self.coco.loadImgs(annotation["image_id"])[0]["file_name"]
        image = self.transform(Image.open(self.image_folder / name).convert("RGB"))
        tokens = [self.index.get(word, 2) for word in words_of(annotation["caption"])]
        return image, torch.tensor([0, *tokens, 1])

    def draw(self, batch_size: int) -> list[int]:
        """Draw the captions for one step: a random length, then captions of that length."""
        length = np.random.choice(self.lengths)
        return list(np.random.choice(np.where([n == length for n in self.lengths])[0], size=batch_size))


class Encoder(nn.Module):
    """A frozen ResNet-50, or another backbone with `feature_size` features, and a linear layer on its features."""

    def __init__(self, embed_size: int, backbone: nn.Module | None = None, feature_size: int = 2048):
        super().__init__()
        self.resnet = nn.Sequential(*list(resnet50(weights=None).children())[:-1]) if backbone is None else backbone
        self.resnet.requires_grad_(False)
        self.embed = nn.Linear(feature_size, embed_size)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, embed_size)."""
        with torch.no_grad():
            features = self.resnet(images)
        return self.embed(features.flatten(1))


class Decoder(nn.Module):
    """An LSTM whose first input is the image, followed by the words of the caption."""

    def __init__(self, embed_size: int, hidden_size: int, vocab_size: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, embed_size)
        self.lstm = nn.LSTM(embed_size, hidden_size, batch_first=True)
        self.linear = nn.Linear(hidden_size, vocab_size)

    def forward(self, features: Tensor, captions: Tensor) -> Tensor:
        """(B, embed_size), (B, T) -> logits (B, T, vocab_size)."""
        inputs = torch.cat([features[:, None], self.embed(captions[:, :-1])], 1)
        return self.linear(self.lstm(inputs)[0])

    def sample(self, inputs: Tensor, max_len: int = 20) -> list[int]:
        """Decode one image's features, (1, 1, embed_size), greedily; returns tokens."""
        state, tokens = None, []
        for _ in range(max_len):
            hidden, state = self.lstm(inputs, state)
            token = self.linear(hidden[:, 0]).argmax(1)
            tokens.append(token.item())
            if tokens[-1] == 1:
                break
            inputs = self.embed(token)[:, None]
        return tokens


def train(data: Captions, encoder: Encoder, decoder: Decoder, batch_size: int, device: torch.device) -> Iterator[float]:
    """Train endlessly; yields the loss of each step."""
    encoder.eval().to(device)
    decoder.train().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam([*decoder.parameters(), *encoder.embed.parameters()], lr=1e-3)
    while True:
        sampler = SubsetRandomSampler(data.draw(batch_size))
        images, captions = next(iter(DataLoader(data, batch_size, sampler=sampler, num_workers=0)))
        images, captions = images.to(device), captions.to(device)
        optimizer.zero_grad()
        outputs = decoder(encoder(images), captions)
        loss = criterion(outputs.flatten(0, 1), captions.flatten())
        loss.backward()
        optimizer.step()
        yield loss.item()


@torch.no_grad()
def caption(path: Path, data: Captions, encoder: Encoder, decoder: Decoder, device: torch.device) -> str:
    """Caption one image."""
    image = data.test_transform(Image.open(path).convert("RGB"))[None].to(device)
    tokens = decoder.sample(encoder(image)[:, None])
    words = list(data.index)
    return " ".join(words[token] for token in tokens if token > 2)


def main(image: Path, annotations: Path) -> None:
    """Caption one image with random weights, as a program of its own does."""
    data = Captions(annotations, image.parent, threshold=1)
    encoder, decoder = Encoder(256).to(DEVICE).eval(), Decoder(256, 512, len(data.index)).to(DEVICE).eval()
    print(caption(image, data, encoder, decoder, DEVICE))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
