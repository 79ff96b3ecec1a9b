"""Average the weights of several epochs, or of several models, into one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from captioning.checkpoint import Description, choose_epoch, load_model, read_description, write_model
from captioning.errors import InputError, printable
from captioning.files import require_new_folder


def average_weights(models: Sequence[Path], epochs: Sequence[int], folder: Path) -> None:
    """Average the weights of these epochs of a model, or of the best epochs of several, into a new model.

    A mean of runs that started from the same weights is often better than each of them (arXiv 2203.05482). The last
    one's captioner.json is saved with the mean, under its epoch's number; the scores there stay those of its epochs.
    Raises `InputError` if an epoch was not saved, if the models differ in more than their weights, or if `folder` holds
    something already or cannot be written.
    """
    require_new_folder(folder)
    if len(models) > 1 and epochs:
        raise InputError("--epochs has no effect on several models, of which the best epochs are averaged.")
    if len(models) > 1:
        chosen = [(model, choose_epoch(model, read_description(model))) for model in models]
    else:
        chosen = [(model, epoch) for model in models for epoch in sorted(set(epochs))]
    if len({model.resolve() for model in models}) < len(models):
        raise InputError("a model is named twice; name each once.")
    if len(chosen) < 2:
        raise InputError("an average takes two epochs or more, named with --epochs, or two models or more.")
    loaded = [load_model(model, epoch) for model, epoch in chosen]
    encoder, decoder, _, description = loaded[-1]
    for (model, _), (*_, other) in zip(chosen, loaded, strict=True):
        if _kind(other) != _kind(description):
            raise InputError(
                f"{model} and {chosen[-1][0]} differ in architecture, preprocessing or vocabulary, or in whether "
                "weights are tied, so that their weights have no mean."
            )
    for states in ([m[0].state_dict() for m in loaded], [m[1].state_dict() for m in loaded]):
        for key, weight in states[-1].items():
            if weight.is_floating_point():
                weight.copy_(torch.stack([state[key] for state in states]).mean(0))
    if description.training.get("tie_weights"):
        decoder.linear.weight = decoder.embed.weight  # loading untied them
    if len({other.architecture.backbone_weights for *_, other in loaded}) > 1:  # one of the backbones was fine-tuned
        description.architecture.backbone_weights = "epoch"
    names = [f"{model.name}-{epoch}" if len(models) > 1 else epoch for model, epoch in chosen]
    training = {**description.training, "averaged_epochs": names}
    last = chosen[-1][1]
    write_model(
        folder, last, encoder, decoder, description.model_copy(update={"best_epoch": last, "training": training})
    )
    print(printable(f"{folder}: the mean of epochs {', '.join(map(str, names))}; evaluate.py scores it"))


def _kind(description: Description) -> tuple[Any, ...]:
    """Return what two models must share for their weights to have a mean."""
    architecture = description.architecture.model_dump(exclude={"dropout", "backbone_weights"})
    is_tied = description.training.get("tie_weights") is True
    return architecture, is_tied, description.preprocessing, description.vocabulary
