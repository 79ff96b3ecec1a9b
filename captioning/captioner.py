"""Captioner: an image in, a caption out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from captioning import decoding
from captioning.checkpoint import Description, load_model
from captioning.distributed import fast_dtype, this_process
from captioning.errors import InputError
from captioning.features import BATCH, encode
from captioning.hub import find_model, push
from captioning.images import Photos, build_transform
from captioning.shards import Member
from model import EncoderCNN
from vocabulary import UNK, UNK_WORD, Vocabulary

Source = str | Path | Member | Image.Image


@dataclass
class Decoding:
    """How words are chosen: greedy by default, a beam with `beam_size`, drawn with `temperature`."""

    beam_size: int = 1  # hypotheses kept at every step; 1 is greedy
    temperature: float | None = None  # draw words at random at this temperature rather than choose the best
    top_k: int = 0  # draw from the k most probable words only; 0 is all
    top_p: float = 1.0  # draw from the most probable words that hold this share of the probability
    seed: int | None = None  # of the draw
    alternatives: int = 0  # further captions of each photo, after the first
    max_length: int = 20  # tokens at most
    min_length: int = 0  # words at least
    length_penalty: float = 1.0  # a beam ranks by log p / length ** this; 0 prefers short captions
    block_trigrams: bool = False  # a beam never repeats three words
    groups: int = 1  # of the beam, kept different from one another
    diversity: float = 0.5  # how different

    def __call__(self, decoder: torch.nn.Module, features: Tensor) -> list[list[decoding.Hypothesis]]:
        """Decode embedded features: for each photo its hypotheses, best first, 1 + `alternatives` at most."""
        lengths = {"max_length": self.max_length, "min_length": self.min_length}
        wanted = 1 + self.alternatives
        if self.temperature is not None:
            drawn = decoding.sample(
                decoder, features, self.temperature, self.top_k, self.top_p, self.seed, n=wanted, **lengths
            )
            return [drawn[i : i + wanted] for i in range(0, len(drawn), wanted)]
        if self.beam_size == 1 and wanted == 1:
            return [[hypothesis] for hypothesis in decoding.greedy(decoder, features, **lengths)]
        return decoding.beam_search(
            decoder,
            features,
            self.beam_size,
            length_penalty=self.length_penalty,
            n_best=wanted,
            block_trigrams=self.block_trigrams,
            groups=self.groups,
            diversity=self.diversity,
            **lengths,
        )


@dataclass
class Caption:
    """A photo's caption.

    text: the sentence. tokens: its words, `<end>` left out.
    log_probability: the natural logarithm of the sentence's probability under the model, `<end>` included.
    attention: (len(tokens), cells) where the decoder looked for each token, or None where it does not attend.
    alternatives: further captions of the photo, the next ones in rank where they come from a beam.
    """

    text: str
    tokens: list[str]
    log_probability: float
    attention: Tensor | None = None
    alternatives: list[Caption] = field(default_factory=list)


class Captioner:
    """A trained model that captions photos: `Captioner.load(folder)(images)`."""

    def __init__(self, encoder: EncoderCNN, decoder: torch.nn.Module, vocab: Vocabulary, description: Description):
        self.device = this_process().device
        dtype = fast_dtype(self.device)
        if self.device.type == "cpu" and dtype == torch.float32 and encoder.ranges is not None:
            dtype = torch.int8
        self.encoder = encoder.for_inference(dtype).to(self.device)
        self.decoder = decoder.to(self.device).eval()
        self.vocab, self.description = vocab, description
        self.transform = build_transform(False, description.preprocessing.image_size, normalise=False)
        self.folder: Path | None = None  # and its epoch, where it comes from one
        self.epoch: int | None = None

    @classmethod
    def load(cls, folder: str | Path, epoch: int | None = None) -> Captioner:
        """The model in a folder as `train.py` writes it, its best epoch unless `epoch` is given.

        `folder` may be a model's name on the Hugging Face Hub instead, user/name: it is downloaded once.
        Raises `InputError` where the folder is incomplete, its files do not go together, or the Hub has no
        such model.
        """
        folder = find_model(folder)
        captioner = cls(*load_model(folder, epoch))
        captioner.folder, captioner.epoch = folder, epoch
        return captioner

    def push_to_hub(self, name: str, licence: str, private: bool = False) -> str:
        """Share the epoch that was loaded as user/name on the Hugging Face Hub; returns its address.

        With it goes a model card, README.md, that gives the licence, the data, the metrics and how to use it.
        `licence` is one of the Hub's identifiers, like mit or cc-by-4.0, that the training data allows. Sharing
        again replaces what was there. Raises `InputError` where you are not logged in, may not write there, or the
        Hub knows no such licence.
        """
        if self.folder is None:
            raise InputError("only a model that was loaded from a folder can be shared; use Captioner.load.")
        return push(self.folder, name, licence, private, self.epoch)

    def __call__(self, images: Source | Iterable[Source], how: Decoding | None = None, **options: Any) -> list[Caption]:
        """One `Caption` an image, in their order; images are PIL images or paths, one or many.

        `how`, or its fields by name, choose the decoding: `captioner(image, beam_size=3)`. Raises `InputError`
        naming the first image that cannot be read.
        """
        sources = [images] if isinstance(images, Source) else list(images)
        return [caption for _, caption in self.stream(sources, how or Decoding(**options))]

    def stream(
        self,
        sources: Sequence[Source],
        how: Decoding,
        workers: int = 0,
        unreadable: Callable[[int, InputError], object] | None = None,
        shared: bool = False,
    ) -> Iterator[tuple[int, Caption]]:
        """Caption photos batch by batch: yields each one's index in `sources` and its caption, in order.

        `workers` processes read ahead. A photo that cannot be read is passed to `unreadable` and left out;
        without that, its `InputError` is raised. If `shared`, each of several processes captions its share of the
        batches, which are the same for any number of processes, and so are the captions.
        """
        batches = [range(i, min(i + BATCH, len(sources))) for i in range(0, len(sources), BATCH)]
        if shared:
            batches = batches[this_process().process_index :: this_process().num_processes]
        for indices, seen in encode(self.encoder, Photos(sources, self.transform), batches, workers, unreadable):
            embedded = self.encoder.embed(seen)
            if not embedded.isfinite().all():
                raise InputError(
                    f"the weights of {self.folder or 'the model'} are so large that they overflow; train anew."
                )
            found = how(self.decoder, embedded)
            for index, hypotheses in zip(indices, found, strict=True):
                first, *others = [self._caption(hypothesis) for hypothesis in hypotheses]
                first.alternatives = others
                yield index, first

    def _caption(self, hypothesis: decoding.Hypothesis) -> Caption:
        words = [i for i in hypothesis.tokens if i > UNK or i == UNK]
        tokens = [UNK_WORD if i == UNK else self.vocab.words[i] for i in words]
        attention = None if hypothesis.attention is None else hypothesis.attention[: len(tokens)]
        return Caption(self.vocab.decode(hypothesis.tokens), tokens, hypothesis.log_probability, attention)
