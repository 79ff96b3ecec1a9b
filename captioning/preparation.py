"""Preparation of a training run: networks, a check of the images, the description, the initial state."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from tqdm.auto import tqdm

from captioning import checkpoint
from captioning.checkpoint import Architecture, Description
from captioning.coco_layout import find_shared_images
from captioning.config import TrainingConfig, settings_of
from captioning.distributed import autocast, this_process
from captioning.errors import InputError, printable, quoted, summarize_errors, warn_once
from captioning.files import hash_file
from captioning.images import ImageDataset, build_pixel_transform, find_unreadable, read_batches
from captioning.weights import read_state_dict
from data_loader import CaptionDataset
from model import DecoderModule, EncoderCNN
from vocabulary import Vocabulary

# Adam moves every weight by a similar amount, and `embed` sums thousands of non-negative features: at the full
# rate, an image's embedding would oscillate between steps, and the decoder could not learn to use it.
EMBED_LR_FACTOR = 0.05
FIRST_IMAGES = 256  # number of images on which the encoder's `embed` is standardized
FIXED = (  # options that are fixed for a resumed run
    *("backbone", "weights", "grid_size", "decoder", "embed_size", "hidden_size", "num_layers", "tie_weights"),
    *("vocab_threshold", "vocab_from_file", "vocab_file", "val_images", "start_from"),
)


def require_unchanged(config: TrainingConfig, resumed: Description) -> None:
    """Raise `InputError` if a resumed run has a fixed option changed, no data set, or another file as its log."""
    assert config.resume is not None
    if not any(os.path.lexists(config.resume / name) for name in ("resume.pt", "resume-previous.pt")):
        raise InputError(
            f"{config.resume} holds weights, but no training to resume; start a new run from them with --start-from "
            f"{quoted(config.resume)}."
        )
    if not os.path.exists(config.data):
        raise InputError(f"{config.data}, the data set of {config.resume}, does not exist here; name it with --data.")
    previous, now = resumed.training | vars(resumed.preprocessing), settings_of(config) | vars(config.preprocessing)
    for name in (*FIXED, *vars(config.preprocessing)):
        if name in previous and previous[name] != now[name]:
            raise InputError(
                f"{config.resume} is trained with {name} {previous[name]}, which cannot change; start a new run."
            )
    log_file = config.resume / config.log_file
    if previous.get("log_file", config.log_file) != config.log_file and os.path.lexists(log_file):
        raise InputError(f"{log_file} exists and is not the log of this run; name another --log-file.")


def find_earlier(config: TrainingConfig) -> str:
    """Name what a new run would delete in its folder: "a model", another file or folder, or "" for nothing."""
    folder = config.models / config.name
    if os.path.exists(folder / checkpoint.DESCRIPTION) or checkpoint.epochs_saved(folder):
        return "a model"
    others = [*checkpoint.run_files(folder), folder / "tensorboard", folder / config.log_file]
    return next((path.name for path in others if os.path.isdir(path) or _size(path) > 0), "")


def _size(path: Path) -> int:
    return os.path.getsize(path) if os.path.isfile(path) else 0


def require_new(config: TrainingConfig) -> None:
    """Raise `InputError` if a new run would delete an earlier one; a resumed run deletes nothing."""
    folder = config.models / config.name
    if config.resume is None and (earlier := find_earlier(config)):
        states = [folder / name for name in ("resume.pt", "resume-previous.pt")]
        can_resume = os.path.exists(folder / checkpoint.DESCRIPTION) and any(map(os.path.exists, states))
        resume = f"resume its training with --resume {quoted(folder)}, " if can_resume else ""
        raise InputError(
            f"{folder} holds {earlier} already; {resume}choose another --name, or delete it with --overwrite."
        )


@contextmanager
def lock_run(folder: Path, config: TrainingConfig, overwrite: bool) -> Iterator[None]:
    """Create the folder and hold its lock, so that no other run writes to it.

    Raises `InputError` if another run does, and for an earlier run's files there without `overwrite`.
    """
    lock, problem = filelock.FileLock(folder / ".lock", timeout=0), None
    try:
        if this_process().is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                lock.acquire()
                if not overwrite:
                    require_new(config)
            except filelock.Timeout:
                other = "copy the folder" if config.resume else "choose another --name"
                problem = f"another run is writing to {folder}; wait for it or {other}."
            except OSError as error:
                other = "use a copy of it elsewhere" if config.resume else "choose another --models or --name"
                problem = f"{folder} cannot be written ({error.strerror or error}); make it writable, or {other}."
            except InputError as error:
                problem = str(error)
        problem = broadcast_object_list([problem])[0]
        if problem:
            raise InputError(problem)
        yield
    finally:
        lock.release()


def given_vocabulary(config: TrainingConfig, resumed: Description | None) -> Vocabulary | None:
    """Return the vocabulary of the run that is resumed, of the model to start from, or of a file; else None."""
    trained = checkpoint.read_description(config.initial_model) if config.initial_model else resumed
    if trained is not None:
        return Vocabulary(trained.vocabulary)
    return Vocabulary.load(config.vocab_file) if config.vocab_from_file else None


def describe_architecture(config: TrainingConfig, resumed: Description | None) -> tuple[Architecture, str]:
    """Describe a run's networks; `resumed` describes the run that is resumed, if any.

    Also returns the backbone's first weights, as `EncoderCNN` takes them.
    """
    if resumed is None:
        weights = checkpoint.resolve_weights(config.weights, config.backbone)
        where = "published" if weights == "pretrained" else "shared"
    else:
        where = resumed.architecture.backbone_weights
        weights = "pretrained" if where == "published" else "random"  # resume.pt holds the real ones
    assert config.dropout is not None
    architecture = Architecture(
        decoder=config.decoder,
        embed_size=config.embed_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        dropout=config.dropout,
        backbone=config.backbone,
        grid_size=config.grid_size,
        backbone_weights="epoch" if config.fine_tune else where,
    )
    return architecture, weights


def build_networks(
    architecture: Architecture, weights: str, config: TrainingConfig, words: int
) -> tuple[EncoderCNN, DecoderModule]:
    """Build the encoder and the decoder of a run, with the weights of the model that it starts from, if any."""
    if config.objective == "cider":
        architecture = architecture.model_copy(update={"dropout": 0.0})
    encoder, decoder = architecture.build_encoder(weights, config.fine_tune or 0), architecture.build_decoder(words)
    if config.initial_model is not None:
        for network, trained in zip((encoder, decoder), checkpoint.load_model(config.initial_model)[:2], strict=True):
            network.load_state_dict(trained.state_dict())
    return encoder, decoder


def synchronize_batch_norms(encoder: EncoderCNN, accelerator: Accelerator) -> None:
    """Synchronize trained batch norms across processes.

    Raises `InputError` on CPUs, for which torch cannot.
    """
    from timm.layers.norm_act import convert_sync_batchnorm  # torch's own drops the activations that timm's norms hold

    encoder.train()
    trained = any(isinstance(module, BatchNorm) and module.training for module in encoder.modules())
    if accelerator.num_processes == 1 or not trained:
        return
    if accelerator.device.type != "cuda":
        raise InputError(
            f"--fine-tune {encoder.fine_tune} trains batch norms, whose statistics several processes share on GPUs "
            f"only; use one process or a smaller --fine-tune."
        )
    convert_sync_batchnorm(encoder)  # in place, unless the module itself is a batch norm


def check_images(splits: list[CaptionDataset], config: TrainingConfig) -> None:
    """Read every image once, so that unreadable ones are reported before the first epoch.

    With `skip_unreadable` they are left out of the data sets, otherwise `InputError` lists them.
    """
    process = this_process()
    rank, processes = process.process_index, process.num_processes
    failed: list[InputError] = []
    for split in splits:
        local = find_unreadable(split.paths[rank::processes], config.workers, config.cache)
        unreadable = dict(sorted(gather_object([(rank + i * processes, error) for i, error in local.items()])))
        split.drop(unreadable)
        failed += unreadable.values()
        if not len(split.image_rows):
            raise InputError(
                f"no image of {split.annotation_file} can be read; the first: {next(iter(unreadable.values()))}"
            )
    if failed and not config.skip_unreadable:
        raise InputError(
            f"{len(failed)} images cannot be read (--skip-unreadable trains without them): {summarize_errors(failed)}"
        )
    for error in failed if process.is_main_process else ():
        tqdm.write(printable(f"left out: {error}"))


def warn_of_shared_images(data: CaptionDataset, val: CaptionDataset) -> None:
    """Warn of validation images that are trained on, as in a mix of COCO 2014 and 2017."""
    if this_process().is_main_process and (shared := next(find_shared_images(data.paths, val.paths), None)):
        warn_once(f"validation images such as {shared} are also training images, which inflates the validation scores.")


def describe(
    config: TrainingConfig,
    architecture: Architecture,
    data: CaptionDataset,
    val: CaptionDataset,
    resumed: Description | None,
) -> Description:
    """Build the description of a run before its first epoch; `resumed` describes the run that is resumed, if any."""
    settings = settings_of(config)
    if resumed is not None:
        previous = {"objective": "cross-entropy", **resumed.training}
        if (previous["objective"], previous.get("fine_tune")) != (config.objective, config.fine_tune):
            settings["before"] = resumed.training  # of the epochs with another objective or other trained stages
        elif "before" in resumed.training:
            settings["before"] = resumed.training["before"]
    return Description(
        architecture=architecture,
        preprocessing=config.preprocessing,
        vocabulary=data.vocab.words,
        data={
            "folder": checkpoint.name_of_data(config.data),
            "train_photos": len(data.paths),
            "train_captions": len(data.image_rows),
            "train_sha256": hash_file(data.annotation_file),
            "val_photos": min(len(val.paths), config.val_images),
            "val_sha256": hash_file(val.annotation_file),
        },
        training=settings,
        environment=checkpoint.environment(),
    )


def restart_from_best(
    folder: Path, state: dict[str, Any], objective: str, log: Callable[[str], object]
) -> dict[str, Any]:
    """Build the state to continue with another objective or other stages: the best epoch's weights, no optimizer.

    `log` is told, as runs of an older version, which trained other layers of a stage, start again unasked.
    """
    best, first = state["best_epoch"], len(state["epochs"]) + 1
    if best is None:
        raise InputError(
            f"{folder} has no completed epoch; train it for one with its own options first: "
            f"python train.py --resume {quoted(folder)}"
        )
    description = checkpoint.read_description(folder)
    checkpoint.choose_epoch(folder, description, best)  # raises if its weights are missing
    encoder, decoder = (read_state_dict(path) for path in checkpoint.weight_files(folder, best))
    if description.architecture.backbone_weights == "shared":
        encoder |= read_state_dict(checkpoint.weight_file(folder, "backbone"))
    other = "another objective" if state["objective"] != objective else "other trained layers"
    log(f"{folder}/resume.pt has {other}; starting from the best epoch, {best}")
    return {
        **state,
        **{"epoch": first, "step": 0, "first_epoch": first, "epoch_loss": 0.0, "epoch_tokens": 0},
        "objective": objective,
        "encoder": encoder,
        "decoder": decoder,
        "optimizer": None,
    }


def build_optimizer(
    encoder: EncoderCNN, decoder: DecoderModule, backbone: list[nn.Parameter], config: TrainingConfig
) -> torch.optim.Optimizer:
    """Build Adam for the decoder, the encoder's `embed` and the parameters of the backbone that are trained."""
    assert config.learning_rate is not None
    embed_rate = config.learning_rate * EMBED_LR_FACTOR
    groups = [
        {"params": list(decoder.parameters()), "lr": config.learning_rate},
        {"params": list(encoder.embed.parameters()), "lr": embed_rate, "weight_decay": config.embed_weight_decay},
    ]
    if backbone:
        groups.append({"params": backbone, "lr": config.backbone_learning_rate})
    return torch.optim.AdamW(groups, weight_decay=0, fused=True)  # without weight decay, it is Adam


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any], path: Path) -> None:
    """Load Adam's moments, read from `path`; raises `InputError` if they belong to other parameters.

    The options of the groups stay the optimizer's own. torch itself does not compare the sizes of the moments with the
    parameters', and would read beyond their ends.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        if [group["params"] for group in state["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("its parameters are different ones")
        for index, moments in state["state"].items():
            shape = parameters[index].shape
            sizes = {"step": torch.Size(()), "exp_avg": shape, "exp_avg_sq": shape}
            if {name: value.shape for name, value in moments.items()} != sizes:
                raise ValueError("its moments have other sizes")
            if not all(value.isfinite().all() for value in moments.values()):
                raise ValueError("its moments are not finite")
        optimizer.load_state_dict({"state": state["state"], "param_groups": own})
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} belongs to another run ({error}).") from None


@contextmanager
def memory_for_features(config: TrainingConfig) -> Iterator[None]:
    """Turn a lack of GPU memory into an `InputError` that says what makes the backbone's pass smaller."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        fixed = config.resume is not None or config.initial_model is not None
        smaller = "" if fixed else "use a smaller --image-size or another --backbone, or "
        raise InputError(
            f"the GPU has too little memory to compute features with {config.backbone}; {smaller}end what else uses "
            f"the GPU."
        ) from error


@torch.no_grad()
def first_features(
    data: CaptionDataset, encoder: EncoderCNN, features: Tensor | None, config: TrainingConfig
) -> Tensor:
    """Compute the features of some training images before training, or take them from the stored ones.

    Returns at most `FIRST_IMAGES` of them, (images, C) or (images, cells, C) float32, on the encoder's device.
    """
    device = encoder.embed.weight.device
    some = np.random.default_rng(config.seed).permutation(len(data.paths))[:FIRST_IMAGES]
    if features is not None:
        return features[torch.from_numpy(some).to(features.device), 0].to(device).float()
    dataset = ImageDataset(data.paths, build_pixel_transform(config.preprocessing))
    pixels = next(read_batches(dataset, [some.tolist()]))[1].to(device)
    statistics = {key: value.clone() for key, value in encoder.network.state_dict().items()}
    with autocast(device, config.precision), memory_for_features(config):
        result = encoder.features(pixels).float()
    encoder.network.load_state_dict(statistics)  # restores the batch norms' statistics
    return result


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """Return the factor of the learning rate, 0 to 1: a linear warm-up, then a cosine decay to zero at `steps`.

    The warm-up takes at most a tenth of the steps, so that a short run has more than that. The decay is that of SGDR
    (arXiv 1608.03983, equation 5) without restarts.
    """
    warmup = min(warmup, steps // 10)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))
