"""Captioner: an image in, a caption out."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from PIL import Image
from torch import Tensor

from captioning import decoding
from captioning.checkpoint import Description, choose_epoch, load_model
from captioning.distributed import choose_dtype, fast_dtype, this_process
from captioning.errors import InputError
from captioning.features import BATCH, encode
from captioning.hub import find_model, push
from captioning.image_files import Source, is_content, read_image
from captioning.images import ImageDataset, build_pixel_transform, split_batches
from captioning.packing import pack_weights
from model import EncoderCNN
from vocabulary import DEFAULT_LENGTH, UNK, UNK_WORD, Vocabulary

Precision = Literal["auto", "fp32", "bf16", "int8"]

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "seed")
BEAM_OPTIONS = ("beam_size", "length_penalty", "groups", "diversity", "block_trigrams")
MAX_BEAM = 100  # limit of beam_size and alternatives, as memory grows with both
MAX_LENGTH = 1000  # limit of max_length, in tokens


@dataclass
class Decoding:
    """The decoding options: greedy by default, beam search with `beam_size`, sampling with `temperature`.

    None means that an option was not given. `check` refuses an option that has no effect because it belongs to another
    decoding method.
    """

    beam_size: int | None = None  # hypotheses per step; 1 is greedy; default 3 in caption.py, 1 in evaluate.py
    temperature: float | None = None  # sample words at this temperature instead of choosing the best
    top_k: int | None = None  # sample from the k most probable words only; 0: from all
    top_p: float | None = None  # sample from the fewest words that have this probability in total
    seed: int | None = None  # random seed of sampling
    alternatives: int = 0  # maximum number of further captions per image
    max_length: int = DEFAULT_LENGTH  # maximum number of tokens
    min_length: int = 0  # minimum number of tokens, punctuation included
    length_penalty: float | None = None  # rank by log p / length ** penalty; default 1; 0 favours short captions
    block_trigrams: bool | None = None  # a beam never repeats a trigram in a caption; default only in caption.py
    groups: int | None = None  # number of groups of diverse beam search (arXiv 1610.02424); default 1
    diversity: float | None = None  # penalty on words that earlier groups chose at this step; default 0.5

    def __post_init__(self) -> None:
        for option in fields(self):
            if getattr(self, option.name) is None:
                setattr(self, option.name, option.default)

    def with_defaults(self) -> Decoding:
        """Fill the options that were not given from `DEFAULT_DECODING`.

        Greedy decoding (beam_size=1) and sampling stay as they are.
        """
        if self.temperature is not None or self.beam_size == 1:
            return self
        return replace(DEFAULT_DECODING, **self._given(vars(self)))

    def check(self) -> None:
        """Raise `InputError` if an option is out of range or has no effect."""
        for name in ("max_length", "min_length", "alternatives", "beam_size", "groups", "top_k", "seed"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Integral):
                raise InputError(f"{name} is {value!r}, but it has to be a whole number.")
        for name in ("temperature", "top_p", "length_penalty", "diversity"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise InputError(f"{name} is {value!r}, but it has to be a number.")
        if not isinstance(self.block_trigrams, bool | None):
            raise InputError(f"block_trigrams is {self.block_trigrams!r}, but it has to be True or False.")
        decoding.check_lengths(self.max_length, self.min_length)
        _check_at_most("max_length", self.max_length, MAX_LENGTH)
        _check_at_most("alternatives", self.alternatives, MAX_BEAM)
        if self.alternatives < 0:
            raise InputError(f"alternatives is {self.alternatives}, but it has to be at least 0.")
        if self.temperature is not None:
            self._refuse(BEAM_OPTIONS, "with --temperature, which samples instead of searching with a beam")
            decoding.check_sampling(**self._given(SAMPLING_OPTIONS), n=1 + self.alternatives)
            return
        self._refuse(SAMPLING_OPTIONS, "without --temperature, as nothing is sampled")
        beam_size = 1 if self.beam_size is None else self.beam_size
        _check_at_most("beam_size", beam_size, MAX_BEAM)
        if beam_size == 1:
            self._refuse(BEAM_OPTIONS[1:], "without a beam; add --beam-size 3, for example")
        if (self.groups or 1) == 1:
            self._refuse(("diversity",), "without --groups")
        decoding.check_beam(beam_size, **self._given(("length_penalty", "groups", "diversity")))
        if self.alternatives >= beam_size:
            raise InputError(
                f"{self.alternatives} alternatives need a beam of {self.alternatives + 1} or more: add "
                f"--beam-size {self.alternatives + 1}, or --temperature to sample them."
            )

    def __call__(
        self, decoder: decoding.Decoder, features: Any, indices: Sequence[int] | None = None
    ) -> list[list[decoding.Hypothesis]]:
        """Decode embedded features (B, ...); returns for each image at most 1 + `alternatives` hypotheses.

        Those of a beam come best first, samples in the order in which they were drawn.
        indices: (B,) indices of the images, 0 to B - 1 by default; with a `seed`, samples depend on them.
        """
        self.check()
        lengths: dict[str, Any] = {"max_length": self.max_length, "min_length": self.min_length}
        wanted = 1 + self.alternatives
        if self.temperature is not None:
            options = self._given(SAMPLING_OPTIONS)
            drawn = decoding.sample(decoder, features, **options, **lengths, n=wanted, indices=indices)
            return [drawn[i : i + wanted] for i in range(0, len(drawn), wanted)]
        if self.beam_size in (None, 1):
            return [[hypothesis] for hypothesis in decoding.greedy(decoder, features, **lengths)]
        return decoding.beam_search(decoder, features, **self._given(BEAM_OPTIONS), **lengths, n_best=wanted)

    def _given(self, names: Iterable[str]) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _refuse(self, names: Iterable[str], reason: str) -> None:
        """Raise `InputError` if one of the options was given; False counts as not given."""
        for name, value in self._given(names).items():
            if value is not False:
                raise InputError(f"--{name.replace('_', '-')} has no effect {reason}.")


# The default decoding of `caption.py`, the web page and `Captioner`.
DEFAULT_DECODING = Decoding(beam_size=3, block_trigrams=True)


@dataclass
class Caption:
    """An image's caption.

    text: the sentence. tokens: its words, without `<end>`.
    log_probability: natural logarithm of the sentence's probability under the model, `<end>` included.
    attention: (len(tokens), cells), where the decoder looked for each token; None if it does not attend.
    alternatives: further captions of the image; from a beam, the next ones in rank. `other_captions` leaves out those
        that read the same.
    score: mean log-probability per token, `<end>` included, by which captions are ranked. With a length penalty
        other than 1, log_probability / tokens ** length_penalty.
    """

    text: str
    tokens: list[str]
    log_probability: float
    attention: Tensor | None = None
    alternatives: list[Caption] = field(default_factory=list)
    score: float = math.nan

    def without_attention(self) -> Caption:
        """Return the caption and its alternatives without the attention, which holds the memory of its whole batch."""
        others = [other.without_attention() for other in self.alternatives]
        return replace(self, attention=None, alternatives=others)


def other_captions(caption: Caption) -> list[Caption]:
    """Return a caption's alternatives that differ from it, and from one another, in more than case and full stop."""
    distinct = {_normalize(caption): caption}
    for other in caption.alternatives:
        distinct.setdefault(_normalize(other), other)
    return list(distinct.values())[1:]


def _normalize(caption: Caption) -> str:
    return caption.text.rstrip(" .").lower()


class Captioner:
    """A trained model that captions images: `Captioner.load(folder)(images)`.

    It computes with copies of the weights, so that later changes to them have no effect.

    precision: of the backbone, "fp32", "bf16" or, on a CPU, "int8" (`quantization`). "auto" is bfloat16 if the
        device computes in it natively, else float32; the attribute `precision` says which.

    Raises `InputError` for another precision, for "int8" on a GPU or without onnxruntime, and if copying fails.
    """

    def __init__(
        self,
        encoder: EncoderCNN,
        decoder: torch.nn.Module,
        vocab: Vocabulary,
        description: Description,
        precision: Precision = "auto",
    ):
        device = this_process().device
        assert device is not None
        self.device = device
        self.precision = _choose_precision(precision, self.device)
        if self.precision == "int8":
            from captioning.quantization import quantize  # imports onnxruntime

            self.encoder = quantize(encoder.for_inference(torch.float32), description.preprocessing)
        else:
            self.encoder = encoder.for_inference(choose_dtype(self.device, self.precision)).to(self.device)
        try:
            self.decoder: Any = copy.deepcopy(decoder).eval()
        except RuntimeError:
            raise InputError("the decoder has an attribute that holds a computed tensor; detach it.") from None
        self.decoder.to(self.device)
        self.fast_embed, self.fast_decoder = pack_weights(self.encoder.embed), pack_weights(self.decoder)
        self.vocab, self.description = vocab, description
        self.transform = build_pixel_transform(description.preprocessing)
        self.folder: Path | None = None  # the folder and the epoch that were loaded, if any
        self.epoch: int | None = None

    @classmethod
    def load(
        cls,
        folder: str | os.PathLike | Iterable[str | os.PathLike],
        epoch: int | None = None,
        precision: Precision = "auto",
    ) -> Captioner:
        """Load a model from a folder that `train.py` wrote: its best epoch unless `epoch` is given.

        `folder` may also be the name of a model on the Hugging Face Hub, user/name, which is downloaded once. Several
        folders or names make an `Ensemble`.
        Raises `InputError` if a folder is incomplete, its files do not belong together, the Hub has no such model, or
        several models differ in their vocabularies.
        """
        if not isinstance(folder, (str, os.PathLike)):
            if isinstance(folder, bytes) or not isinstance(folder, Iterable):
                raise InputError(f"a model is the path of a folder or user/name, not a {type(folder).__name__}.")
            members = [Captioner.load(one, epoch, precision) for one in folder]
            return members[0] if len(members) == 1 else Ensemble(members)
        path = find_model(os.fspath(folder))
        captioner = cls(*load_model(path, epoch), precision)
        captioner.folder, captioner.epoch = path, choose_epoch(path, captioner.description, epoch)
        return captioner

    def push_to_hub(self, name: str, licence: str, private: bool = False) -> str:
        """Share the loaded epoch as user/name on the Hugging Face Hub; returns its address.

        A model card, README.md, is added, which states the licence, the data, the metrics and how to use the model.
        `licence` is one of the Hub's identifiers, such as mit or cc-by-4.0, that the training data allows. Sharing
        again replaces the earlier files. Raises `InputError` if you are not logged in, may not write there, or the
        Hub does not know the licence.
        """
        if self.folder is None:
            raise InputError("only a single model that was loaded from a folder can be shared; use Captioner.load.")
        return push(self.folder, name, licence, private, self.epoch)

    def __call__(
        self, images: Source | Iterable[Source], decode: Decoding | None = None, **options: Any
    ) -> list[Caption]:
        """Caption one or many images, PIL images or paths; returns one `Caption` per image, in their order.

        Decodes with `DEFAULT_DECODING` by default. Its fields can be given by name, as in
        `captioner(image, beam_size=5)`, or all of them as a `Decoding`. Raises `InputError` that names the first image
        that cannot be read, or an option that has no effect.
        """
        names = [option.name for option in fields(Decoding)]
        if unknown := options.keys() - names:
            raise InputError(f"there is no option {min(unknown)}; the options are {', '.join(names)}.")
        if decode is not None and options:
            raise InputError(f"{next(iter(options))} has no effect if a Decoding is given; set it there.")
        decode = Decoding(**options).with_defaults() if decode is None else decode
        return [caption for _, caption in self.stream(images, decode)]

    def stream(
        self,
        sources: Source | Iterable[Source],
        decode: Decoding,
        workers: int = 0,
        unreadable: Callable[[int, InputError], object] | None = None,
        shared: bool = False,
        positions: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Caption]]:
        """Caption images batch by batch: yields each one's index in `sources` and its caption, in order.

        `workers` processes read ahead, unless there are PIL images. The index and the `InputError` of an image that
        cannot be read are passed to `unreadable`; without it, the error is raised. If `shared`, each of several
        processes captions its share of the batches; batches and captions do not depend on the number of processes.
        `positions` are the positions of the sources in a longer list of which they are a part: samples depend on the
        seed and on an image's position.
        """
        if not isinstance(decode, Decoding):
            raise InputError(f"decode has to be a Decoding, not a {type(decode).__name__}.")
        decode.check()
        sources = _as_list(sources)
        if any(isinstance(source, Image.Image) for source in sources):
            workers = 0  # processes would share the position in an opened file
        batches = split_batches(len(sources), BATCH)
        if shared:
            batches = batches[this_process().process_index :: this_process().num_processes]
        for indices, features in self._embed(sources, batches, workers, unreadable):
            decoded = decode(self.fast_decoder, features, [positions[i] if positions else i for i in indices])
            for index, hypotheses in zip(indices, decoded, strict=True):
                first, *others = [self._caption(hypothesis) for hypothesis in hypotheses]
                first.alternatives = others
                yield index, first

    def _embed(
        self,
        sources: Sequence[Source],
        batches: Sequence[Sequence[int]],
        workers: int,
        unreadable: Callable[[int, InputError], object] | None,
    ) -> Iterator[tuple[list[int], Any]]:
        """Read and encode batches of images: yields their indices and what the decoder takes."""
        dataset = ImageDataset(sources, self.transform)
        for indices, features in encode(self.encoder, dataset, batches, workers, unreadable):
            embedded = self.fast_embed(features)
            if not embedded.isfinite().all():
                raise InputError(
                    f"the weights of {self.folder or 'the model'} are so large that they overflow; retrain the model."
                )
            yield indices, embedded

    def _caption(self, hypothesis: decoding.Hypothesis) -> Caption:
        words = [i for i in hypothesis.tokens if i >= UNK]
        tokens = [UNK_WORD if i == UNK else self.vocab.words[i] for i in words]
        attention = None if hypothesis.attention is None else hypothesis.attention[: len(tokens)]
        text = self.vocab.decode(hypothesis.tokens)
        return Caption(text, tokens, hypothesis.log_probability, attention, score=hypothesis.score)


class EnsembleDecoder:
    """Decoders that share a vocabulary, decoded as one: their probabilities are averaged at every step.

    Its features are a tuple, one element for each decoder; its state is the concatenation of theirs and, where any
    of them attends, the attention of the first that does.
    """

    def __init__(self, decoders: Sequence[decoding.Decoder]):
        self.decoders = list(decoders)
        self.attending = next((i for i, decoder in enumerate(self.decoders) if decoder.attends), None)
        self.attends = self.attending is not None
        self.state_sizes: list[int] = []  # tensors in the state of each decoder

    def init_state(self, features: Sequence[Any]) -> decoding.State:
        """Return the state after reading the features of B images, one element (B, ...) for each decoder."""
        states = [decoder.init_state(x) for decoder, x in zip(self.decoders, features, strict=True)]
        self.state_sizes = [len(state) for state in states]
        return self._join(states)

    def step(self, tokens: Tensor, state: decoding.State) -> tuple[Tensor, decoding.State]:
        """Decode one token: the log of the mean of the decoders' probabilities (B, V), and the next state."""
        log_p, states, start = [], [], 0
        for decoder, size in zip(self.decoders, self.state_sizes, strict=True):
            logits, after = decoder.step(tokens, state[start : start + size])
            log_p.append(logits.float().log_softmax(1))
            states.append(after)
            start += size
        return torch.stack(log_p).logsumexp(0) - math.log(len(log_p)), self._join(states)

    def _join(self, states: list[decoding.State]) -> decoding.State:
        attention = () if self.attending is None else (states[self.attending][-1],)
        return (*(x for state in states for x in state), *attention)


class Ensemble(Captioner):
    """An ensemble of models that share a vocabulary; their probabilities are averaged at every step.

    Each model has its own encoder and preprocessing. Attention and description are those of the first model that
    attends, else of the first. Raises `InputError` for no models and for different vocabularies.
    """

    def __init__(self, members: Sequence[Captioner]):
        if not members:
            raise InputError("an ensemble needs at least one model; name its folder.")
        for other in members[1:]:
            if other.vocab.words != members[0].vocab.words:
                raise InputError(
                    f"{members[0].folder} and {other.folder} have different vocabularies, so that their words cannot "
                    "be averaged; name models that were trained with one vocabulary."
                )
        described = next((member for member in members if member.decoder.attends), members[0])
        self.device, self.precision = described.device, described.precision
        self.vocab, self.description = described.vocab, described.description
        self.encoder, self.transform = described.encoder, described.transform
        self.decoder = self.fast_decoder = EnsembleDecoder([member.fast_decoder for member in members])
        self.folder = self.epoch = None
        self.members = list(members)

    def _embed(
        self,
        sources: Sequence[Source],
        batches: Sequence[Sequence[int]],
        workers: int,
        unreadable: Callable[[int, InputError], object] | None,
    ) -> Iterator[tuple[list[int], Any]]:
        """Read and encode batches with each member in turn; the features are a tuple, one element per member."""
        ignore = None if unreadable is None else lambda *_: None  # reported once, by the first member
        workers = -(-workers // len(self.members))  # each member reads the images
        streams = [
            member._embed(sources, batches, workers, ignore if i else unreadable)
            for i, member in enumerate(self.members)
        ]
        for batch in zip(*streams, strict=True):
            indices, features = zip(*batch, strict=True)
            if any(others != indices[0] for others in indices):
                raise InputError("an image changed while the models read it; run the command again.")
            yield indices[0], features


def _as_list(images: Source | Iterable[Source]) -> list[Source]:
    """List one or many images; an entry of `os.scandir`, which no other process can read, becomes its path.

    The frames of an animation are one object at different times: what an iterator yields is read at once, and a later
    frame that occurs twice in a list raises `InputError`. An MPO is a photo with further images, such as a phone's
    depth map.
    """
    one = isinstance(images, Source) or is_content(images) or not isinstance(images, Iterable)
    each: Any = [images] if one else images
    listed, frames = [], set()
    for image in each:
        if getattr(image, "is_animated", False) and image.format != "MPO":
            if not isinstance(each, list | tuple):
                image = read_image(image)
            elif image.tell() > getattr(image, "_min_frame", 0):
                if id(image) in frames:
                    raise InputError(
                        "a list holds an image of several frames twice; put a copy() of each frame into it."
                    )
                frames.add(id(image))
        listed.append(os.fspath(image) if isinstance(image, os.DirEntry) else image)
    return listed


def _choose_precision(precision: Precision, device: torch.device) -> str:
    if precision not in get_args(Precision):
        raise InputError(f"precision is {precision!r}, but it has to be one of {', '.join(get_args(Precision))}.")
    if precision == "int8" and device.type != "cpu":
        raise InputError("int8 is computed on CPUs only; use --precision auto.")
    if precision == "auto":
        return "bf16" if fast_dtype(device) == torch.bfloat16 else "fp32"
    return precision


def choose_workers(workers: int, images: int) -> int:
    """Return the number of processes to read images with: `workers`, or 0 for two batches or fewer."""
    return workers if images > 2 * BATCH else 0


def _check_at_most(name: str, value: int, most: int) -> None:
    if value > most:
        raise InputError(f"{name} is {value}, but it has to be at most {most}.")
