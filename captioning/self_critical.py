"""Self-critical sequence training (arXiv 1612.00563): train a decoder to write what CIDEr-D rates highly.

Cross-entropy trains on ground-truth prefixes, but at inference the decoder continues its own tokens (exposure bias),
and its caption is judged as a whole. So several captions of each image are sampled, CIDEr-D compares them with the
references, and those with a higher reward than the image's other samples become more probable, the rest less:
REINFORCE with the mean reward of the other samples as its baseline (arXiv 2003.09971), which needs no further
decoding.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioning.cider import CiderD
from captioning.decoding import sample
from captioning.errors import InputError
from captioning.losses import Batch, attention_penalty, embed_images, linear_cross_entropy
from captioning.sequences import pack_tokens
from data_loader import CaptionDataset, EpochSampler
from model import DecoderModule, EncoderCNN
from vocabulary import END, START, UNK

SAMPLES_PER_IMAGE = 5  # captions sampled per image and step, as many as COCO's images have


class CiderReward:
    """CIDEr-D of captions of training images, given as token indices.

    Document frequencies are those of all training captions. `<end>` counts as a word of references and hypotheses;
    otherwise a caption that breaks off ("a dog on a") would lose nothing by it.
    """

    def __init__(self, data: CaptionDataset):
        tokens, starts, ends = data.tokens.tolist(), data.offsets[:-1].tolist(), data.offsets[1:].tolist()
        references: dict[Hashable, list[list[int]]] = {}
        for image, start, end in zip(data.image_rows.tolist(), starts, ends, strict=True):
            references.setdefault(image, []).append(tokens[start + 1 : end])
        if len(references) < 2:
            raise InputError("--objective cider needs at least two training images: of one, every CIDEr-D is 0.")
        self.cider = CiderD(references)

    def __call__(self, image_index: np.ndarray, captions: list[list[int]]) -> np.ndarray:
        """Return the reward of each caption, 0 to 10, given its image's index in the data set and its tokens."""
        return self.cider(image_index.tolist(), captions)


class RepeatingBatches(EpochSampler):
    """Batches of images, each represented by its first caption, some of them several times an epoch.

    The occurrences of an image are spread evenly over the epoch. An image that falls twice into a batch counts once.

    first: (images,) the index of each one's first caption. times: (images,) how often it occurs.
    """

    def __init__(self, first: np.ndarray, times: np.ndarray, images_per_batch: int, seed: int = 0):
        super().__init__(seed)
        self.first, self.times, self.images_per_batch = first, times, images_per_batch
        self.offset = np.concatenate([np.arange(n) / n for n in times])  # from the first occurrence, in epochs

    def __len__(self) -> int:
        return -(-int(self.times.sum()) // self.images_per_batch)

    def draw(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        """Yield the batches of an epoch."""
        start = rng.random(len(self.first))
        order = np.repeat(self.first, self.times)[np.argsort((np.repeat(start, self.times) + self.offset) % 1)]
        for i in range(0, len(order), self.images_per_batch):
            yield np.unique(order[i : i + self.images_per_batch])


class SelfCritical:
    """Minus the expected reward of captions that the decoder samples, as a loss."""

    def __init__(self, data: CaptionDataset):
        self.reward = CiderReward(data)

    def build_sampler(self, data: CaptionDataset, batch_size: int, seed: int, frozen: bool) -> EpochSampler:
        """Build batches of images, each represented by its first caption, for `batch_size` sampled captions in all.

        An image with twice the median number of captions is drawn twice per epoch, and so on, so that merged data
        sets keep the shares that they have in cross-entropy training.
        """
        _, first, captions = np.unique(data.image_rows, return_index=True, return_counts=True)
        times = np.maximum(1, captions // int(np.median(captions)))
        return RepeatingBatches(first, times, max(1, batch_size // SAMPLES_PER_IMAGE), seed)

    def count(self, lengths: np.ndarray, decoder: DecoderModule) -> tuple[int, int]:
        """Count the sampled captions, each a term of the loss."""
        return SAMPLES_PER_IMAGE * len(lengths), SAMPLES_PER_IMAGE * len(lengths)

    def __call__(self, encoder: EncoderCNN, decoder: DecoderModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return minus the summed rewards of captions sampled for the images, and the summed attention penalty."""
        assert batch.image_index is not None
        embedded = embed_images(encoder, batch.images)
        image_of_caption, captions, lengths, rewards = self.sample_with_rewards(decoder, embedded, batch.image_index)
        hidden, attention = decoder.unroll(embedded, captions, lengths, image_of_caption)
        loss = reinforce(hidden, decoder.linear, captions, lengths, rewards)
        return loss, attention_penalty(attention, hidden)

    def format(self, loss: float) -> str:
        """Format the mean reward."""
        return f"CIDEr-D: {-loss:.4f}"

    def sample_with_rewards(
        self, decoder: DecoderModule, embedded: Tensor, image_index: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sample S = `SAMPLES_PER_IMAGE` captions for each embedded image (P, ...) and compute their rewards.

        image_index: (P,) each image's index in the data set.

        Returns the index into `embedded` of each caption's image (P * S,), the captions from `<start>` on (padded),
        their lengths (on the CPU), and their rewards (P, S), 0 to 10. The samples come from torch's global generator.
        The decoder must have no dropout, so that it is trained on samples of its own distribution.
        """
        hypotheses = [hypothesis.tokens for hypothesis in sample(decoder, embedded, n=SAMPLES_PER_IMAGE)]
        # Older versions of torch would reuse the weights that autocast converted without a gradient.
        torch.clear_autocast_cache()
        rewards = self.reward(np.repeat(image_index, SAMPLES_PER_IMAGE), hypotheses)
        captions = pad_sequence([torch.tensor([START, *words]) for words in hypotheses], True, END)
        lengths = torch.tensor([1 + len(words) for words in hypotheses])
        images = torch.arange(len(image_index), device=embedded.device)
        rewards = torch.from_numpy(rewards).to(embedded.device, torch.float32).view(-1, SAMPLES_PER_IMAGE)
        return images.repeat_interleave(SAMPLES_PER_IMAGE), captions.to(embedded.device), lengths, rewards


def advantages(rewards: Tensor) -> Tensor:
    """Return each sample's reward minus the mean reward of its image's other samples: (P, S) -> (P, S).

    They sum to zero for each image. A sample has no part in its own baseline, so the gradient is unbiased.
    """
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def reinforce(hidden: Tensor, linear: nn.Linear, captions: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    """Return minus the summed rewards of sampled captions, with the gradient that REINFORCE estimates for it.

    hidden: (tokens, H) the input of the output layer `linear` for the captions' tokens after `<start>`, in the order
        of `pack_tokens`, preceded by those of `<start>` where the decoder predicts it.
    captions, lengths, rewards: as `SelfCritical.sample_with_rewards` returns them.
    """
    words = pack_tokens(captions, lengths, skip=1)  # (tokens,)
    advantage = pack_tokens(advantages(rewards).view(-1, 1).expand(captions.shape), lengths, skip=1)
    banned = (START, UNK)  # never sampled: the other words share their probability
    surrogate = linear_cross_entropy(hidden[-len(words) :], linear, words, advantage, banned)
    return surrogate - surrogate.detach() - rewards.sum()
