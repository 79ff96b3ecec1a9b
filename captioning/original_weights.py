"""Conversion of the original recipe's vocabulary and weights into a model's folder."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from captioning import checkpoint
from captioning.backbones import Preprocessing
from captioning.errors import InputError, printable
from captioning.files import read_bytes, require_new_folder
from captioning.lazy_compiler import meta_device
from captioning.weights import load_weights, read_state_dict

MAX_PICKLE_BYTES = 8 << 20  # the published vocabulary has 273,174; unpickled, a hostile one may take 70 times its size


class _OriginalVocabulary:
    """Holds the attributes of the original's pickled `vocabulary.Vocabulary`, without its code."""


class _VocabularyUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) == ("vocabulary", "Vocabulary"):
            return _OriginalVocabulary
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_vocab_pickle(path: Path) -> list[str]:
    """Return the words of the original's `vocab.pkl`, in the order of their indices: `<start>`, `<end>`, `<unk>` first.

    Nothing that the pickle asks for is imported or called: one that names any class but the original's `Vocabulary` is
    refused, and that class is replaced by an empty one. Raises `InputError` where the file cannot be read, asks for
    more than a vocabulary, or lacks a part of one.
    """
    data = read_bytes(path, MAX_PICKLE_BYTES)
    try:
        # Unpickling reserves memory for the largest memo number, which a hostile file makes enormous.
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name.endswith("PUT") and int(argument or 0) > len(data):
                raise pickle.UnpicklingError("a memo index is out of range")
        vocabulary = _VocabularyUnpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path} is not a vocabulary of the original recipe: {error}.") from None

    indices = getattr(vocabulary, "word2idx", None)
    if not isinstance(vocabulary, _OriginalVocabulary) or not isinstance(indices, dict):
        raise InputError(f"{path} holds no vocabulary of the original recipe.")
    words = {index: word for word, index in indices.items() if type(word) is str and type(index) is int}
    if sorted(words) != list(range(len(indices))):
        raise InputError(f"{path} is not a complete vocabulary: its indices are not 0 to {len(indices) - 1}.")
    ordered = [words[index] for index in range(len(words))]
    if ordered[:3] != ["<start>", "<end>", "<unk>"]:
        raise InputError(f"{path} begins with {ordered[:3]} where <start>, <end>, <unk> should be.")
    if "" in ordered:
        raise InputError(f"{path} is not a complete vocabulary: word {ordered.index('')} is empty.")
    return ordered


def convert_weights(encoder: Path, decoder: Path, vocab: Path, folder: Path) -> None:
    """Write a model's folder from encoder-<i>.pkl, decoder-<i>.pkl and vocab.pkl of the original recipe's code.

    Raises `InputError` where a file is not from the original recipe, they are from different runs, or `folder` holds
    something already or cannot be written.
    """
    require_new_folder(folder)
    words = read_vocab_pickle(vocab)
    states = {path: read_state_dict(path) for path in (encoder, decoder)}
    parts = _read_architecture(encoder, decoder, states)
    vocabulary_size = len(states[decoder]["embed.weight"])
    if vocabulary_size != len(words):
        raise InputError(
            f"{decoder} was trained with {vocabulary_size:,} words and {vocab} has {len(words):,}; "
            "take the vocab.pkl of the same run."
        )
    with meta_device():
        modules = parts.build_encoder("random"), parts.build_decoder(vocabulary_size)
    for module, path in zip(modules, (encoder, decoder), strict=True):
        load_weights(module, states[path], path)

    number = re.search(r"-([0-9]+)$", encoder.stem)
    epoch = max(1, int(number[1])) if number else 1
    description = checkpoint.Description(
        architecture=parts,
        preprocessing=Preprocessing(image_size=224),
        vocabulary=words,
        environment=checkpoint.environment(),
    )
    checkpoint.write_model(folder, epoch, *modules, description)
    print(printable(f"{folder}: {len(words):,} words, {parts.embed_size} to {parts.hidden_size}, epoch {epoch}"))


def _read_architecture(encoder: Path, decoder: Path, states: dict[Path, dict[str, Tensor]]) -> checkpoint.Architecture:
    """Read the sizes from the two state dicts; raises `InputError` if they do not match."""

    def size(path: Path, key: str, dimension: int) -> int:
        tensor = states[path].get(key)
        if tensor is None or tensor.ndim != 2 or not tensor.numel():
            raise InputError(f"{path} is not from the original recipe: it has no matrix {key}.")
        return tensor.shape[dimension]

    feature_size, embed_size = size(encoder, "embed.weight", 0), size(decoder, "embed.weight", 1)
    if feature_size != embed_size:
        raise InputError(
            f"{encoder} gives {feature_size} numbers an image and {decoder} takes {embed_size}; "
            "take two files of the same run."
        )
    try:
        return checkpoint.Architecture(
            decoder="lstm",
            embed_size=embed_size,
            hidden_size=size(decoder, "linear.weight", 1),
            num_layers=max(1, sum(key.startswith("lstm.weight_ih_l") for key in states[decoder])),
            dropout=0.0,
            backbone="resnet50",
            backbone_weights="epoch",
        )
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"{decoder} is too large for a model here: {first['loc'][0]}: {first['msg']}.") from None
