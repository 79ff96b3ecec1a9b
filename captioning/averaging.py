"""Average the weights of several epochs of a model into one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from captioning.checkpoint import load_model, write_model
from captioning.errors import InputError, printable
from captioning.files import require_new_folder


def average_epochs(model: Path, epochs: Sequence[int], folder: Path) -> None:
    """Average these epochs' weights (arXiv 2203.05482) into a new model, saved under the last epoch's number.

    The scores in captioner.json stay those of the single epochs. Raises `InputError` if an epoch was not saved, or if
    `folder` holds something already or cannot be written.
    """
    require_new_folder(folder)
    chosen = sorted(set(epochs))
    if len(chosen) < 2:
        raise InputError("an average takes two epochs or more; name them with --epochs.")
    models = [load_model(model, epoch) for epoch in chosen]
    encoder, decoder, _, description = models[-1]
    for states in ([m[0].state_dict() for m in models], [m[1].state_dict() for m in models]):
        for key, weight in states[-1].items():
            if weight.is_floating_point():
                weight.copy_(torch.stack([state[key] for state in states]).mean(0))
    if description.training.get("tie_weights"):
        decoder.linear.weight = decoder.embed.weight  # loading untied them
    training = {**description.training, "averaged_epochs": chosen}
    changed = description.model_copy(update={"best_epoch": chosen[-1], "training": training})
    write_model(folder, chosen[-1], encoder, decoder, changed)
    print(printable(f"{folder}: the mean of epochs {', '.join(map(str, chosen))}; evaluate.py scores it"))
