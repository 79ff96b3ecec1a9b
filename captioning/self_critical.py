"""Self-critical sequence training (arXiv 1612.00563): a decoder learns to write what CIDEr-D rates highly.

Cross-entropy teaches the next word of a true caption after true words; in use a decoder goes on from words of
its own, and its caption is judged as a whole. So captions of each photo are drawn from the decoder, CIDEr-D
rates them against the photo's true ones, and those that beat the other draws of the photo are made more
probable, the others less: REINFORCE whose baseline is the mean reward of the other draws (arXiv 2003.09971),
which costs no decoding beside the draws.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from captioning.cider import CiderD
from captioning.decoding import sample
from data_loader import CaptionDataset
from model import pack
from vocabulary import END, START, UNK

DRAWS = 5  # captions of a photo in a step, as many as COCO's photos have


class Critic:
    """Draws captions of training photos and rates them by CIDEr-D.

    Document frequencies are those of all training captions. `<end>` counts as a word of references and draws:
    a caption that breaks off ("a dog on a") would lose nothing by it otherwise.
    """

    def __init__(self, data: CaptionDataset):
        tokens, starts, ends = data.tokens.tolist(), data.offsets[:-1].tolist(), data.offsets[1:].tolist()
        references: dict[int, list[list[int]]] = {}
        for photo, start, end in zip(data.photo.tolist(), starts, ends, strict=True):
            references.setdefault(photo, []).append(tokens[start + 1 : end])
        self.cider = CiderD(references)

    def draw(self, decoder: nn.Module, features: Tensor, photos: np.ndarray) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`DRAWS` captions for each of the features (P, ...) of the data set's photos of these rows (P,).

        Returns each caption's row in `features` (P * DRAWS,), the captions from `<start>` on, padded, and
        their lengths (on the CPU), as `Training.forward` takes them, and the rewards (P, DRAWS), 0 to 10.
        The draws come from torch's global generator, and from the decoder as it is: without dropout, or the
        captions would not be those of the model that then learns from them.
        """
        found = [hypothesis.tokens for hypothesis in sample(decoder, features, n=DRAWS)]
        # Older versions of torch would use the weights that autocast converted without a gradient once more.
        torch.clear_autocast_cache()
        rewards = self.cider(np.repeat(photos, DRAWS).tolist(), found)
        captions = pad_sequence([torch.tensor([START, *words]) for words in found], True, END).to(features.device)
        lengths = torch.tensor([1 + len(words) for words in found])
        row = torch.arange(len(photos), device=features.device).repeat_interleave(DRAWS)
        return row, captions, lengths, torch.from_numpy(rewards).to(features.device).float().view(-1, DRAWS)


def advantages(rewards: Tensor) -> Tensor:
    """How much better each draw of a photo is than the mean of its other draws: (P, draws) -> (P, draws).

    A photo's sum is zero, and since a draw has no part in its own baseline, the gradient has no bias.
    """
    return rewards - (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)


def reinforce(logits: Tensor, captions: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    """Minus the summed rewards of drawn captions, with the gradient that REINFORCE estimates for it.

    logits: (tokens, V) of the captions' tokens after `<start>`, as `pack` orders them, after those of
        `<start>` where the decoder has any.
    captions, lengths, rewards: what `Critic.draw` returns.
    """
    words = pack(captions, lengths, skip=1)  # (tokens,)
    advantage = pack(advantages(rewards).view(-1, 1).expand(captions.shape), lengths, skip=1)
    never = torch.tensor([START, UNK], device=logits.device)  # drawn, so the others share their probability
    logits = logits[-len(words) :].float().index_fill(1, never, -torch.inf)
    surrogate = (advantage * F.cross_entropy(logits, words, reduction="none")).sum()
    return surrogate - surrogate.detach() - rewards.sum()
