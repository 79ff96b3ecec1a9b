"""The training loop."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import filelock
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm.auto import tqdm

from captioning import checkpoint
from captioning.backbones import count_stages, preprocessing_of
from captioning.checkpoint import Architecture, Description
from captioning.decoding import greedy
from captioning.distributed import fast_dtype, on_cpus, this_process
from captioning.errors import InputError, shown
from captioning.features import BATCH, encode, stored_features
from captioning.files import CACHE, hash_file, require_writable
from captioning.images import Photos, build_transform, find_unreadable, read_batches
from captioning.metrics import score
from captioning.self_critical import DRAWS, Critic, reinforce
from captioning.weights import load_weights, read_state_dict
from data_loader import CaptionDataset, LengthBatches, PhotoBatches
from model import DECODERS, AttentionDecoder, EncoderCNN, pack
from vocabulary import Vocabulary

# A step of Adam moves every weight alike, and `embed` sums 2048 features that are never negative: at the full
# rate what it says of every photo would swing from step to step, and the decoder could not learn to read it.
EMBED_RATE = 0.05

Objective = Literal["cross-entropy", "cider"]


@dataclass
class TrainingConfig:
    """What a training is made of; every field is an option of `python train.py`."""

    resume: ClassVar[Path | None] = None  # only what `resumed_config` gives goes on with a training

    data: Path = Path("data/scenes")  # the data set's folder, laid out as COCO is
    name: str = ""  # of the model; by default the data folder's
    models: Path = Path("models")  # where the model's folder is made
    # What is learned: the true captions, or to write captions that CIDEr-D rates highly. Resumed with another
    # objective or fine_tune, a training goes on from its best epoch for num_epochs more, with their own schedule.
    objective: Objective = "cross-entropy"

    backbone: str = "resnet50"  # torchvision's, or the name of a timm model
    weights: str = "pretrained"  # of the backbone: "pretrained", "random", a model's folder or a state dict's file
    fine_tune: int | None = None  # how many of the backbone's stages learn; by default 0, or all if random
    backbone_learning_rate: float | None = None  # of those parts; by default 1e-3, or 1e-5 for cider
    image_size: int | None = None  # input resolution in pixels; by default the backbone's own
    crop: Literal["center", "squash"] | None = None  # how an image becomes square; by default the backbone's own
    views: int = 1  # of a photo that a frozen backbone's features are kept of; more than 1 augments

    decoder: Literal["lstm", "attention", "transformer"] = "lstm"  # the decoder's class
    embed_size: int = 256  # of the photo's embedding and the words'
    hidden_size: int = 512  # of the LSTM
    num_layers: int = 1  # of the LSTM
    dropout: float = 0.0  # on the decoder's inputs and outputs; for cider there is none
    tie_weights: bool = False  # one matrix embeds the words and predicts them (arXiv 1608.05859); sizes alike
    attention_penalty: float = 1.0  # weight of the doubly stochastic regularisation, where the decoder attends

    vocab_threshold: int = 5  # how often a word must occur to be in the vocabulary
    vocab_from_file: bool = False  # take the vocabulary from vocab_file rather than from the captions
    vocab_file: Path = Path("vocab.json")  # a JSON list of words

    batch_size: int = 128  # captions a step, over all processes; for cider those drawn, 5 a photo
    num_epochs: int = 3  # passes over all captions, or for cider over all photos
    learning_rate: float | None = None  # Adam's, at its highest; by default 1e-3, or 5e-4 for cider
    warmup_steps: int = 100  # over which it rises; then it falls to zero along a cosine
    clip_norm: float = 5.0  # the largest norm of the gradient
    patience: int = 3  # epochs without a better CIDEr after which training ends
    val_photos: int = 5000  # validation photos, the first ones, that each epoch is judged by
    skip_unreadable: bool = False  # train without the photos that cannot be read rather than stop with their list

    save_every: int = 1  # epochs; the best epoch is always kept
    save_minutes: float = 10.0  # between saves within an epoch
    print_every: int = 100  # steps between lines on the terminal
    log_file: str = "training_log.txt"  # in the model's folder: loss and perplexity of every step

    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto is bf16 where it is faster
    workers: int = min(4, os.cpu_count() or 1)  # processes that read photos
    seed: int = 0  # of the weights, the order and the augmentation
    cache: Path = CACHE  # where tokenized captions and features are kept

    def __post_init__(self) -> None:
        if self.fine_tune is None:
            self.fine_tune = count_stages(self.backbone) if self.weights == "random" else 0
        if self.learning_rate is None:
            self.learning_rate = 5e-4 if self.objective == "cider" else 1e-3
        if self.backbone_learning_rate is None:
            self.backbone_learning_rate = 1e-5 if self.objective == "cider" else 1e-3
        if self.objective == "cider" and self.resume is None:
            raise InputError("objective cider goes on from a trained model; add --resume models/NAME.")
        self.name = self.name or self.data.resolve().name
        least = {
            "warmup_steps": 0,
            "workers": 0,
            "seed": 0,
            "save_minutes": 0,
            "dropout": 0,
        }
        least |= dict.fromkeys(("views", "batch_size", "num_epochs", "save_every", "print_every", "val_photos"), 1)
        least |= dict.fromkeys(("embed_size", "hidden_size", "num_layers", "patience", "vocab_threshold"), 1)
        for field, value in least.items():
            if not getattr(self, field) >= value:
                raise InputError(f"{field} must be at least {value}, not {getattr(self, field)}.")
        most = {
            "embed_size": 1 << 14,
            "hidden_size": 1 << 14,
            "num_layers": 16,
            "dropout": 0.99,
        }
        for field, value in most.items():
            if getattr(self, field) > value:
                raise InputError(f"{field} must be at most {value}, not {getattr(self, field)}.")
        for field in ("learning_rate", "backbone_learning_rate", "clip_norm"):
            if not 0 < getattr(self, field) < math.inf:
                raise InputError(f"{field} must be above 0, not {getattr(self, field)}.")
        if self.tie_weights and self.embed_size != self.hidden_size and self.decoder != "transformer":
            raise InputError(
                f"tie_weights needs embed_size and hidden_size alike, not {self.embed_size} and {self.hidden_size}."
            )
        self.preprocessing = preprocessing_of(self.backbone, self.image_size, self.crop)
        for field in ("name", "log_file"):
            if Path(getattr(self, field)).name != getattr(self, field):
                raise InputError(f"{field} must be a name without folders, not {getattr(self, field)}.")


class Training(nn.Module):
    """Encoder and decoder as one module, from a batch to its loss."""

    def __init__(self, encoder: EncoderCNN, decoder: nn.Module, critic: Critic | None = None):
        super().__init__()
        self.encoder, self.decoder, self.critic = encoder, decoder, critic

    def forward(
        self, photos: Tensor, row: Tensor, captions: Tensor, lengths: Tensor, ids: np.ndarray | None = None
    ) -> tuple[Tensor, Tensor]:
        """The summed cross-entropy of the captions' tokens, and the summed attention penalty, of a batch.

        With `ids`, minus the summed CIDEr-D of captions that the critic draws, instead of these captions.

        Args:
            photos: uint8 pixels (P, 3, H, W), or features (P, 2048) or (P, cells, 2048).
            row: (B,) each caption's row in `photos`.
            captions: (B, T) padded; lengths: (B,).
            ids: (P,) each photo's row in the data set.
        """
        features = self.encoder.features(photos) if photos.dtype == torch.uint8 else photos
        embedded = self.encoder.embed(features.to(self.encoder.embed.weight.dtype))  # each photo once
        if ids is not None:
            row, captions, lengths, rewards = self.critic.draw(self.decoder, embedded, ids)
        embedded = embedded.index_select(0, row)  # unlike [row], its gradient adds up in one order on any threads
        decoder = self.decoder
        penalty = embedded.new_zeros(())
        ragged = ids is not None or bool((lengths != lengths[0]).any())
        if isinstance(decoder, AttentionDecoder):
            logits, looked = decoder.unroll(embedded, captions, lengths)
            targets = pack(captions, lengths, skip=1)
            penalty = (1 - looked).square().mean(1).sum()
        elif decoder.attends:
            logits, targets = decoder(embedded, captions, lengths), pack(captions, lengths, skip=1)
        elif ragged:
            logits, targets = decoder(embedded, captions, lengths), pack(captions, lengths)
        else:
            logits, targets = decoder(embedded, captions).flatten(0, 1), captions.flatten()
        if ids is not None:
            return reinforce(logits, captions, lengths, rewards), penalty
        return F.cross_entropy(logits.float(), targets, reduction="sum"), penalty


def loss_tokens(lengths: Tensor | np.ndarray, decoder: nn.Module) -> int:
    """How many tokens of captions of these lengths enter the loss: `<start>` only where the photo predicts it."""
    return int(lengths.sum()) - (len(lengths) if decoder.attends else 0)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context that a forward pass runs in: bfloat16 where `precision` asks for it, "auto" where it is faster."""
    dtype = fast_dtype(device) if precision == "auto" else torch.bfloat16
    return torch.autocast(device.type, torch.bfloat16, enabled=precision != "fp32" and dtype == torch.bfloat16)


def learning_rate_factor(step: int, steps: int, warmup: int) -> float:
    """The schedule, 0 to 1: a linear warm-up, then a cosine down to zero at `steps`."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


class _Stop:
    """Remembers a SIGINT or SIGTERM until the step is done; nothing but the main thread can catch one."""

    def __init__(self) -> None:
        self.signal = 0
        self.waits = True

    def __enter__(self) -> _Stop:
        try:
            self.before = {s: signal.signal(s, self._remember) for s in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:
            self.before = {}
        return self

    def _remember(self, number: int, _: object) -> None:
        self.signal = number
        if not self.waits:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Long work that a signal ends where it is, with a KeyboardInterrupt."""
        self.waits = False
        try:
            if self.signal:
                raise KeyboardInterrupt
            yield
        finally:
            self.waits = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def share(captions: np.ndarray, photo: np.ndarray, rank: int, processes: int, whole_photos: bool) -> np.ndarray:
    """The captions of a batch that one of several processes learns from; each caption is one process's.

    captions: (B,) their indices. photo: (captions,) each one's photo. whole_photos: keep those of a photo together,
        so that the backbone sees it in one process only.
    """
    if not whole_photos:
        return captions[rank::processes]
    return captions[np.unique(photo[captions], return_inverse=True)[1] % processes == rank]


def _batches(
    data: CaptionDataset, order: list[np.ndarray], features: Tensor | None, config: TrainingConfig, epoch: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, np.ndarray]]:
    """Turn lists of captions into `Training.forward`'s arguments, from stored features or from pixels."""
    if features is None:
        keys = ([(int(i), config.seed + epoch) for i in np.unique(data.photo[batch])] for batch in order)
        reader = Photos(data.paths, build_transform(True, **asdict(config.preprocessing), normalise=False))
        pixels = (images for _, images in read_batches(reader, keys, config.workers))
    else:  # a view for each caption, the same whichever process draws it
        views = features.shape[1]
        view = np.random.default_rng((config.seed, epoch)).integers(views, size=len(data.photo), dtype=np.int32)
    for batch in order:
        captions, lengths = data.captions(batch)
        if features is None:
            photos, row = np.unique(data.photo[batch], return_inverse=True)
            inputs = next(pixels)
        else:  # gathered from the memory map in one call
            seen = data.photo[batch].astype(np.int64) * views + view[batch]
            unique, row = np.unique(seen, return_inverse=True)
            inputs, photos = features.flatten(0, 1)[torch.from_numpy(unique)], unique // views
        yield inputs, torch.from_numpy(row), captions, lengths, photos


@torch.no_grad()
def _first_features(
    data: CaptionDataset,
    encoder: EncoderCNN,
    features: Tensor | None,
    config: TrainingConfig,
    photos: int = 256,
) -> Tensor:
    """What the encoder sees of some training photos before it has learned anything."""
    device = encoder.embed.weight.device
    some = np.random.default_rng(config.seed).permutation(len(data.paths))[:photos]
    if features is not None:
        return features[torch.from_numpy(some), 0].to(device).float()
    reader = Photos(data.paths, build_transform(False, **asdict(config.preprocessing), normalise=False))
    pixels = next(read_batches(reader, [some.tolist()]))[1].to(device)
    state = {key: value.clone() for key, value in encoder.network.state_dict().items()}
    with autocast(device, config.precision):
        seen = encoder.features(pixels).float()
    encoder.network.load_state_dict(state)  # the batch norms' statistics are as they were
    return seen


def train(config: TrainingConfig) -> Path:
    """Train as `config` says and return the model's folder; a model that was there under this name is deleted.

    `train(resumed_config(folder))` goes on with a training. Raises `InputError` for what the user can mend, and
    `KeyboardInterrupt` after saving where it was interrupted.
    """
    # Data, vocabulary, model
    resumed = config.resume is not None
    folder = config.resume if resumed else config.models / config.name
    process = this_process()
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
    accelerator = Accelerator(cpu=on_cpus(), kwargs_handlers=[ddp])
    main = process.is_main_process
    torch.manual_seed(config.seed)
    if config.precision == "bf16" and fast_dtype(accelerator.device) != torch.bfloat16:
        raise InputError(f"this {accelerator.device.type.upper()} is not made for bfloat16; use --precision auto.")
    old = checkpoint.read_description(folder) if resumed else None
    if resumed:
        require_writable(folder)
    vocab = None
    if old is not None:
        vocab = Vocabulary(old.vocabulary)
    elif config.vocab_from_file:
        vocab = Vocabulary.load(config.vocab_file)
    weights = checkpoint.resolve_weights(config.weights)
    if old is not None and old.architecture.backbone_weights != "published":
        weights = "random"  # resume.pt holds the real ones
    decoder_class = DECODERS[config.decoder]
    with process.local_main_process_first():  # what it downloads and tokenizes the others find
        data = CaptionDataset(config.data, "train", None, vocab, config.vocab_threshold, config.cache)
        val = CaptionDataset(config.data, "val", None, data.vocab, cache=config.cache)
        encoder = EncoderCNN(config.embed_size, config.backbone, weights, config.fine_tune, grid=decoder_class.attends)
    dropout = 0.0 if config.objective == "cider" else config.dropout
    decoder = decoder_class(config.embed_size, config.hidden_size, len(data.vocab), config.num_layers, dropout)
    if config.skip_unreadable or config.fine_tune:  # a pass of the frozen backbone lists them itself
        _check_photos([data, val], config)

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made ({error.strerror}); choose another --models or --name.") from None
    lock, taken = filelock.FileLock(folder / ".lock", timeout=0), False
    if main:
        try:
            lock.acquire()
        except filelock.Timeout:
            taken = True
    if broadcast_object_list([taken])[0]:
        raise InputError(f"another training is writing to {folder}; wait for it or choose another --name.")
    try:
        with _Stop() as stop:
            return _train(config, folder, accelerator, data, val, encoder, decoder, old, stop)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(
            f"the GPU has too little memory for a batch of {config.batch_size} captions; use a smaller --batch-size"
            f"{', --image-size or --fine-tune' if config.fine_tune else ''}."
        ) from error
    except OSError as error:  # of the log or the cache; photos and checkpoints have sentences of their own
        raise InputError(
            f"{error.filename or folder} cannot be written ({error.strerror or error}); what was saved before is "
            f"intact: make room and go on with `python train.py --resume {folder}`."
        ) from error
    finally:
        lock.release()


def _check_photos(splits: list[CaptionDataset], config: TrainingConfig) -> None:
    """Read every photo once, so that one that cannot be read is known before the first epoch and not within it."""
    process = this_process()
    rank, processes = process.process_index, process.num_processes
    failed: list[InputError] = []
    for split in splits:
        mine = find_unreadable(split.paths[rank::processes], config.workers, config.cache)
        found = dict(sorted(gather_object([(rank + i * processes, error) for i, error in mine.items()])))
        split.drop(found)
        failed += found.values()
        if not len(split.photo):
            raise InputError(f"no photo of {split.annotation_file} can be read; the first: {failed[0]}")
    if failed and not config.skip_unreadable:
        raise InputError(
            f"{len(failed)} photos cannot be read (--skip-unreadable trains without them): {shown(failed)}"
        )
    for error in failed if process.is_main_process else ():
        tqdm.write(f"left out: {error}")


def _describe(
    config: TrainingConfig, data: CaptionDataset, val: CaptionDataset, old: Description | None
) -> Description:
    settings = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainingConfig)}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
    was = {"objective": "cross-entropy", **old.training} if old is not None else settings
    if (was["objective"], was.get("fine_tune")) != (config.objective, config.fine_tune):
        settings["before"] = old.training  # the settings of the epochs before it learned something else
    elif old is not None and "before" in old.training:
        settings["before"] = old.training["before"]
    published = checkpoint.resolve_weights(config.weights) == "pretrained" and config.fine_tune == 0
    if old is not None and old.architecture.backbone_weights != "published":
        published = False
    return Description(
        architecture=Architecture(
            decoder=config.decoder,
            embed_size=config.embed_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            dropout=config.dropout,
            backbone=config.backbone,
            backbone_weights="published" if published else "shared" if config.fine_tune == 0 else "epoch",
        ),
        preprocessing=config.preprocessing,
        vocabulary=data.vocab.words,
        data={
            "folder": config.data.name,
            "train_photos": len(data.paths),
            "train_captions": len(data.photo),
            "train_sha256": hash_file(data.annotation_file),
            "val_photos": min(len(val.paths), config.val_photos),
        },
        training=settings,
        environment=checkpoint.environment(),
    )


def _begin_anew(folder: Path, state: dict[str, Any], objective: str) -> dict[str, Any]:
    """The state of a training that goes on to learn something else: from its best epoch, the optimizer anew."""
    best, first = state["best_epoch"], len(state["epochs"]) + 1
    if best is None:
        raise InputError(
            f"{folder} has no epoch that has ended; train it for one with --objective {state['objective']}."
        )
    encoder, decoder = (read_state_dict(path) for path in checkpoint.weight_files(folder, best))
    position = {"epoch": first, "step": 0, "epoch_loss": 0.0, "epoch_tokens": 0}
    return {
        **state,
        **position,
        "objective": objective,
        "first_epoch": first,
        "encoder": encoder,
        "decoder": decoder,
        "optimizer": None,
    }


def _train(
    config: TrainingConfig,
    folder: Path,
    accelerator: Accelerator,
    data: CaptionDataset,
    val: CaptionDataset,
    encoder: EncoderCNN,
    decoder: nn.Module,
    old: Description | None,
    stop: _Stop,
) -> Path:
    main, say = accelerator.is_main_process, tqdm.write if accelerator.is_main_process else lambda _: None
    description = _describe(config, data, val, old)
    start_epoch, start_step, first_epoch = 1, 0, 1
    state: dict[str, Any] | None = None
    if old is not None:
        if old.data.get("train_sha256") != description.data["train_sha256"]:
            raise InputError(f"{data.annotation_file} is not what {folder} was trained on; start a new training.")
        if old.preprocessing != description.preprocessing:
            was = old.preprocessing.image_size
            raise InputError(f"{folder} is trained with --image-size {was}, which cannot change; start a new training.")
        state = checkpoint.load_resume(folder, say)
        learned_before = sum(len(group["params"]) for group in state["optimizer"].get("param_groups", ())[2:])
        learns = sum(p.requires_grad for p in encoder.network.parameters())
        if (state["objective"], learned_before) != (config.objective, learns):
            state = _begin_anew(folder, state, config.objective)
        description.epochs, description.best_epoch = state["epochs"], state["best_epoch"]

        start_epoch, start_step, first_epoch = state["epoch"], state["step"], state["first_epoch"]
        named = old.architecture.backbone_weights == "published"
        optional = (f"{encoder.module_name}.",) if named else ()
        load_weights(encoder, state["encoder"], folder / "resume.pt", optional_prefixes=optional)
        load_weights(decoder, state["decoder"], folder / "resume.pt")
        encoder.network.to(memory_format=torch.channels_last)

    # What the frozen backbone sees, once
    encoder.to(accelerator.device)
    features = val_features = None
    if config.fine_tune == 0:
        stored = {"cache": config.cache, "workers": config.workers}
        with stop.at_once():
            features = stored_features(encoder, data.paths, config.preprocessing, config.views, **stored)
            val_features = stored_features(encoder, val.paths[: config.val_photos], config.preprocessing, **stored)[
                :, 0
            ]

    if state is None:
        encoder.standardise(_first_features(data, encoder, features, config))
    if config.tie_weights:
        if state is None:
            decoder.embed.weight.data /= config.embed_size**0.5  # as small as an output layer's
        decoder.linear.weight = decoder.embed.weight

    backbone = [p for p in encoder.network.parameters() if p.requires_grad]
    groups = [
        {"params": list(decoder.parameters()), "lr": config.learning_rate},
        {"params": list(encoder.embed.parameters()), "lr": config.learning_rate * EMBED_RATE},
    ]
    if backbone:
        groups.append({"params": backbone, "lr": config.backbone_learning_rate})
    optimizer = torch.optim.Adam(groups, fused=True)
    critic = Critic(data) if config.objective == "cider" else None
    model = Training(encoder, decoder, critic)
    with warnings.catch_warnings():  # torch 2.14 gives `broadcast_buffers` another name
        warnings.simplefilter("ignore", FutureWarning)
        model, optimizer = accelerator.prepare(model, optimizer)
    if state is not None and state["optimizer"] is not None:
        try:
            optimizer.load_state_dict(state["optimizer"])
        except (ValueError, KeyError) as error:
            raise InputError(f"{folder}/resume.pt belongs to another training ({error}).") from None
    peaks = [group["lr"] for group in groups]
    learned = [parameter for group in groups for parameter in group["params"]]

    if critic is not None:
        sampler = PhotoBatches(np.arange(len(data.paths)), max(1, config.batch_size // DRAWS), config.seed)
        a_caption = np.unique(data.photo, return_index=True)[1]  # of each photo, which stands for it in a batch
    elif features is not None:
        sampler = LengthBatches(data.lengths, config.batch_size, config.seed)
    else:
        sampler = PhotoBatches(data.photo, config.batch_size, config.seed)
    total, last_epoch = len(sampler) * config.num_epochs, first_epoch - 1 + config.num_epochs
    log = open(folder / config.log_file if main else os.devnull, "ab" if state is not None else "wb")
    if state is not None and main:
        log.truncate(min(state["log_bytes"], log.tell()))
    epoch_loss, epoch_tokens = (0.0, 0) if state is None else (state["epoch_loss"], state["epoch_tokens"])

    def save(epoch: int, step: int) -> None:
        if not main:
            return
        log.flush()
        os.fsync(log.fileno())
        encoder_state = encoder.state_dict()
        if description.architecture.backbone != "stored":
            encoder_state = {k: v for k, v in encoder_state.items() if k.startswith("embed.")}
        checkpoint.save_resume(
            folder,
            {
                "format": 2,
                "objective": config.objective,
                "first_epoch": first_epoch,
                "epoch": epoch,
                "step": step,
                "encoder": encoder_state,
                "decoder": decoder.state_dict(),
                "optimizer": optimizer.state_dict(),
                "epochs": description.epochs,
                "best_epoch": description.best_epoch,
                "epoch_loss": epoch_loss,
                "epoch_tokens": epoch_tokens,
                "log_bytes": log.tell(),
            },
        )
        checkpoint.write_description(folder, description)

    if main and state is None:
        checkpoint.remove_training(folder)
        save(1, 0)
    elif main and state["optimizer"] is None:
        if description.architecture.backbone_weights != old.architecture.backbone_weights:
            checkpoint.store_backbone(folder, encoder)
        checkpoint.write_description(folder, description)  # first, so that whatever comes next, it goes on so
        save(start_epoch, 0)
    say(
        f"training on {len(data.photo)} captions of {len(data.paths)} photos, {len(data.vocab)} words, "
        f"{accelerator.num_processes} process(es), {accelerator.device.type}"
    )
    last_save = time.monotonic()
    stopped_sentence = f"stopped; go on with `python train.py --resume {folder}`"
    with log:
        for epoch in range(start_epoch, last_epoch + 1):
            best = description.best_epoch
            if best is not None and epoch - max(best + 1, first_epoch) >= config.patience:
                say(f"no better CIDEr for {config.patience} epochs; the best is epoch {best}")
                break
            sampler.set_epoch(epoch)
            order = list(sampler) if critic is None else [a_caption[photos] for photos in sampler]
            n, rank = accelerator.num_processes, accelerator.process_index
            shares = [share(batch, data.photo, rank, n, features is None) for batch in order[start_step:]]
            taught = [mine if len(mine) else whole[:1] for mine, whole in zip(shares, order[start_step:], strict=True)]
            bar = tqdm(
                total=len(order),
                initial=start_step,
                desc=f"epoch {epoch}/{last_epoch}",
                unit="step",
                disable=None if main else True,
            )
            model.train()
            for step, batch in enumerate(_batches(data, taught, features, config, epoch), start_step + 1):
                whole = order[step - 1]
                done = (epoch - first_epoch) * len(order) + step - 1
                torch.manual_seed((config.seed * 1_000_003 + done) * n + rank)  # dropout's and draws', resumed for free
                factor = learning_rate_factor(done, total, config.warmup_steps)
                for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                    group["lr"] = peak * factor
                inputs = [x.to(accelerator.device, non_blocking=True) for x in batch[:3]]
                with autocast(accelerator.device, config.precision):
                    loss, penalty = model(*inputs, batch[3], None if critic is None else batch[4])
                mine = float(len(shares[step - 1 - start_step]) > 0)
                captions = len(whole) if critic is None else DRAWS * len(whole)
                tokens = loss_tokens(data.lengths[whole], decoder) if critic is None else captions
                objective = mine * (loss / tokens + config.attention_penalty * penalty / captions)
                accelerator.backward(objective * n)  # several processes' gradients are averaged
                shared = accelerator.reduce(torch.stack([loss.detach() * mine, loss.new_tensor(stop.signal)]), "sum")
                value, stopped = shared[0].item() / tokens, int(shared[1].item())
                if not math.isfinite(value):
                    if all(bool(p.isfinite().all()) for p in model.parameters()):  # else the last save is better
                        save(epoch, step - 1)
                    raise InputError(
                        f"the loss is {value} at step {step} of epoch {epoch} with a learning rate of "
                        f"{config.learning_rate * factor:.2g}; go on from the last good state with `python train.py "
                        f"--resume {folder}` and half the --learning-rate or a smaller --clip-norm."
                    )
                accelerator.clip_grad_norm_(learned, config.clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

                epoch_loss, epoch_tokens = epoch_loss + value * tokens, epoch_tokens + tokens
                means = f"Perplexity: {math.exp(min(value, 700)):.4f}" if critic is None else f"CIDEr-D: {-value:.4f}"
                line = f"Epoch [{epoch}/{last_epoch}], Step [{step}/{len(order)}], Loss: {value:.4f}, {means}"
                if main:
                    log.write(f"{line}\n".encode())
                bar.update()
                bar.set_postfix(loss=f"{value:.3f}", refresh=False)
                if step % config.print_every == 0 or step == len(order):
                    say(line)
                if stopped or time.monotonic() - last_save > 60 * config.save_minutes:
                    save(epoch, step)
                    last_save = time.monotonic()
                if stopped:
                    accelerator.wait_for_everyone()  # the first to leave has its launcher stop the others
                    bar.close()
                    say(stopped_sentence)
                    raise KeyboardInterrupt
            bar.close()
            start_step = 0

            try:
                with stop.at_once():
                    result = validate(accelerator, model, val, val_features, config)
            except KeyboardInterrupt:
                save(epoch, len(order))
                say(stopped_sentence)
                raise
            result = {"epoch": epoch, "train_loss": epoch_loss / max(1, epoch_tokens), **result}
            epoch_loss, epoch_tokens = 0.0, 0
            description.epochs.append(result)
            best = description.best_epoch
            better = best is None or result["CIDEr"] > description.epochs[best - 1]["CIDEr"]
            if main:
                if better or epoch % config.save_every == 0 or epoch == last_epoch:
                    checkpoint.save_epoch(folder, epoch, encoder, decoder, description)
                if better:
                    description.best_epoch = epoch
                save(epoch + 1, 0)
                if better and best is not None and best % config.save_every:
                    checkpoint.remove_epoch(folder, best)
            description.best_epoch = epoch if better else best
            last_save = time.monotonic()
            say(
                f"epoch {epoch}: train loss {result['train_loss']:.3f}, validation loss {result['val_loss']:.3f}, "
                f"Bleu_4 {result['Bleu_4']:.3f}, CIDEr {result['CIDEr']:.3f}" + (" (best)" if better else "")
            )
    return folder


@torch.inference_mode()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    val: CaptionDataset,
    features: Tensor | None,
    config: TrainingConfig,
) -> dict[str, Any]:
    """Validation loss and perplexity a token, and the metrics and captions of greedy decoding.

    Each process takes its share of the batches, which are the same for any number of processes.
    """
    training = accelerator.unwrap_model(model).eval()
    encoder, decoder = training.encoder, training.decoder
    photos = min(len(val.paths), config.val_photos)
    size = BATCH if features is None else 64
    batches = [list(range(i, min(i + size, photos))) for i in range(0, photos, size)]
    mine = batches[accelerator.process_index :: accelerator.num_processes]
    if (
        encoder.fine_tune == encoder.stages and accelerator.num_processes > 1
    ):  # each has seen its own photos' statistics
        for buffer in filter(Tensor.is_floating_point, encoder.network.buffers()):
            buffer.copy_(accelerator.reduce(buffer, "mean"))
    fast = None if features is not None else encoder.for_inference(fast_dtype(accelerator.device))
    captions_of: list[list[int]] = [[] for _ in range(photos)]
    for caption, photo in enumerate(val.photo.tolist()):
        if photo < photos:
            captions_of[photo].append(caption)
    loss, tokens, hypotheses = 0.0, 0, {}
    if features is not None:
        chunks = ((rows, features[rows]) for rows in mine)
    else:
        reader = Photos(val.paths, build_transform(False, **asdict(config.preprocessing), normalise=False))
        chunks = encode(fast, reader, mine, config.workers)
    for rows, seen in chunks:
        seen = seen.to(accelerator.device).float()
        which = np.array([caption for row in rows for caption in captions_of[row]])
        captions, lengths = val.captions(which)
        row = torch.tensor([i for i, photo in enumerate(rows) for _ in captions_of[photo]])
        with autocast(accelerator.device, config.precision):
            summed, _ = training(seen, row.to(seen.device), captions.to(seen.device), lengths)
            found = greedy(decoder, encoder.embed(seen))
        loss, tokens = loss + summed.item(), tokens + loss_tokens(lengths, decoder)
        for photo, hypothesis in zip(rows, found, strict=True):
            hypotheses[int(val.image_ids[photo])] = val.vocab.decode(hypothesis.tokens)
    totals = accelerator.reduce(torch.tensor([loss, tokens], dtype=torch.float64, device=accelerator.device), "sum")
    val_loss = (totals[0] / totals[1]).item()
    hypotheses = dict(gather_object([*hypotheses.items()]))
    result: dict[str, Any] = {}
    if accelerator.is_main_process:
        ids = [int(i) for i in val.image_ids[:photos]]
        written = val.references()
        metrics = score({i: hypotheses[i] for i in ids}, {i: written[i] for i in ids}, java=False).metrics
        result = {
            "val_loss": val_loss,
            "val_perplexity": math.exp(min(val_loss, 700)),
            **{name: value for name, value in metrics.items() if value is not None},
            "captions": {str(i): hypotheses[i] for i in ids[:3]},
        }
    return broadcast_object_list([result])[0]


def read_log(path: Path) -> np.ndarray:
    """The training log as an array (steps, 3): epoch, step in the epoch, loss."""
    rows = []
    for line in Path(path).read_text().splitlines():
        epoch, step, loss, _ = line.split(", ")
        rows.append((int(epoch[7:].split("/")[0]), int(step[6:].split("/")[0]), float(loss[6:])))
    return np.array(rows)
