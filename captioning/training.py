"""The training loop: a `Run` is prepared, restored, trained for an epoch, validated and saved."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor
from tqdm.auto import tqdm

from captioning import checkpoint
from captioning.batches import EpochBatches, place_features
from captioning.config import OptimizationOptions, TrainingConfig, resumed_config
from captioning.distributed import autocast, fast_dtype, on_cpus, require_data_parallel, this_process
from captioning.errors import CLOSED_PIPE, InputError, printable, quoted
from captioning.features import stored_features
from captioning.files import require_writable
from captioning.interruption import Interruption
from captioning.losses import Batch, CaptioningModel, CrossEntropy
from captioning.preparation import (
    build_networks,
    build_optimizer,
    check_images,
    describe,
    describe_architecture,
    first_features,
    given_vocabulary,
    learning_rate_factor,
    load_optimizer,
    lock_run,
    memory_for_features,
    require_unchanged,
    restart_from_best,
    synchronize_batch_norms,
    warn_of_shared_images,
)
from captioning.self_critical import SelfCritical
from captioning.training_log import Scalars, format_line, open_log, read_log
from captioning.validation import validate
from captioning.weights import load_weights
from data_loader import CaptionDataset

__all__ = ["Run", "TrainingConfig", "learning_rate_factor", "read_log", "train"]

SHARED_STEPS = 10  # steps between exchanges of losses and signals by several processes


def train(config: TrainingConfig, overwrite: bool = True) -> Path:
    """Train a model and return its folder; a model that is there under this name is deleted, if `overwrite`.

    `train(resumed_config(folder))` resumes a run. Raises `InputError` for errors that the user can fix, such as a model
    that may not be deleted, and `KeyboardInterrupt` after a signal, once the run is saved.
    """
    config = dataclasses.replace(config)  # checks the fields again, as they may have been changed
    folder = config.resume or config.models / config.name
    require_writable(next(parent for parent in (folder, *folder.parents) if os.path.isdir(parent)))
    try:
        run = Run(config, folder)
        with lock_run(folder, config, overwrite), Interruption() as run.interruption:
            run.execute()
    except torch.cuda.OutOfMemoryError as error:
        others = ["--fine-tune"] * bool(config.fine_tune)
        others += ["--image-size"] * (bool(config.fine_tune) and not config.resume and config.initial_model is None)
        raise InputError(
            f"the GPU has too little memory for a batch of {config.batch_size} captions; use a smaller "
            f"{' or '.join(['--batch-size', *others])}."
        ) from error
    except OSError as error:  # of the log or the cache; images and checkpoints raise `InputError`
        if error.filename is None and error.errno in CLOSED_PIPE:  # of standard output
            raise
        problem = f"{error.filename or folder} cannot be read or written ({error.strerror or error})"
        if os.path.exists(folder / "resume.pt"):
            resume = f"python train.py --resume {quoted(folder)}"
            problem = f"{problem}; what was saved before is intact; fix this, then resume with `{resume}`"
        raise InputError(f"{problem}.") from error
    return folder


@dataclass
class TrainingProgress:
    """The progress of a run: `step` steps of `epoch` are done."""

    epoch: int = 1
    step: int = 0
    first_epoch: int = 1  # with this objective and these trained stages
    epoch_loss: float = 0.0  # summed over the epoch's steps
    epoch_tokens: int = 0
    total_steps: int = 0  # over all epochs


@dataclass
class StepLoss:
    """The loss of a step before it is read from the device."""

    step: int
    loss: Tensor  # summed over this process's captions
    terms: int  # over all processes
    learning_rate: float


class Run:
    """A training run: data, networks, optimizer and progress."""

    interruption: Interruption

    def __init__(self, config: TrainingConfig, folder: Path):
        self.config, self.folder = config, folder
        require_data_parallel()
        this_process()  # before accelerate connects the processes, whose timeout it sets
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False)
        self.accelerator = Accelerator(cpu=on_cpus(), mixed_precision="no", kwargs_handlers=[ddp])
        self.device, self.is_main = self.accelerator.device, self.accelerator.is_main_process
        self.log = (lambda text: tqdm.write(printable(text))) if self.is_main else lambda _: None
        if config.precision == "bf16" and fast_dtype(self.device) != torch.bfloat16:
            raise InputError(
                f"the device ({self.device.type}) does not compute in bfloat16 natively; use --precision auto."
            )
        torch.manual_seed(config.seed)
        self.resumed = checkpoint.read_description(folder) if config.resume else None
        if self.resumed is not None:
            require_unchanged(config, self.resumed)
        vocab = given_vocabulary(config, self.resumed)
        with this_process().local_main_process_first():  # the others find what it downloads and tokenizes
            files: Any = {"cache": config.cache, "must_exist": not config.skip_unreadable}
            self.data = CaptionDataset(config.data, "train", None, vocab, config.vocab_threshold, **files)
            self.val = CaptionDataset(config.data, "val", None, self.data.vocab, **files)
            architecture, weights = describe_architecture(config, self.resumed)
            self.encoder, self.decoder = build_networks(architecture, weights, config, len(self.data.vocab))
        synchronize_batch_norms(self.encoder, self.accelerator)
        if config.skip_unreadable or config.fine_tune:  # else a frozen backbone's pass lists them
            check_images([self.data, self.val], config)
        warn_of_shared_images(self.data, self.val)
        self.description = describe(config, architecture, self.data, self.val, self.resumed)
        self.progress = TrainingProgress()
        self.scalars = Scalars(folder, config.tensorboard and self.is_main)

    def execute(self) -> None:
        """Train to the end, or until a signal."""
        state = self.restore() if self.resumed is not None else None
        self.extract_features()
        self.prepare(state)
        log = self.folder / self.config.log_file if self.is_main else Path(os.devnull)
        with open_log(log, None if state is None else state["log_bytes"]) as self.log_file, closing(self.scalars):
            self.begin(state)
            self.last_save = time.monotonic()
            while not self.is_done():
                self.train_epoch()
                self.finish_epoch(self.validate_epoch())
            if self.progress.epoch <= self.last_epoch:
                waited, best = self.config.patience, self.description.best_epoch
                self.log(f"no better CIDEr for {waited} epochs; the best is epoch {best}; raise --patience to train on")

    def restore(self) -> dict[str, Any]:
        """Restore the networks' weights and the progress from resume.pt; returns what it holds."""
        resumed, folder = self.resumed, self.folder
        assert resumed is not None
        for split, key in ((self.data, "train_sha256"), (self.val, "val_sha256")):
            now = self.description.data[key]
            if resumed.data.get(key, None if split is self.data else now) != now:
                raise InputError(
                    f"{split.annotation_file} is not the one that {folder} was begun with; start a new run."
                )
        state = checkpoint.load_resume(folder, self.log)
        state["batch_size"] = state["batch_size"] or resumed_config(folder).batch_size  # 0 from an older version
        trained_before = sum(len(group["params"]) for group in state["optimizer"].get("param_groups", ())[2:])
        if (state["objective"], trained_before) != (self.config.objective, len(self.backbone_parameters())):
            state = restart_from_best(folder, state, self.config.objective, self.log)
        self.description.epochs, self.description.best_epoch = state["epochs"], state["best_epoch"]
        self.progress = TrainingProgress(**{name: state[name] for name in vars(self.progress)})
        checkpoint.load_encoder(self.encoder, state["encoder"], folder / "resume.pt", resumed.architecture)
        load_weights(self.decoder, state["decoder"], folder / "resume.pt")
        return state

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the backbone that are trained."""
        return [p for p in self.encoder.network.parameters() if p.requires_grad]

    def extract_features(self) -> None:
        """Compute the features of all images with a frozen backbone, or load the cached ones."""
        config = self.config
        self.features = self.val_features = None
        with memory_for_features(config):
            self.encoder.to(self.device)
        if config.fine_tune == 0:
            stored: Any = {"cache": config.cache, "workers": config.workers, "precision": config.precision}
            val_paths = self.val.paths[: config.val_images]
            with self.interruption.immediate(), memory_for_features(config):
                features = stored_features(self.encoder, self.data.paths, config.preprocessing, config.views, **stored)
                self.val_features = stored_features(self.encoder, val_paths, config.preprocessing, **stored)[:, 0]
            self.features = place_features(features, self.device)

    def prepare(self, state: dict[str, Any] | None) -> None:
        """Build the optimizer and the batches, and initialize the networks of a new run (`state` None)."""
        config, encoder, decoder = self.config, self.encoder, self.decoder
        is_new = state is None and config.initial_model is None
        if is_new:
            encoder.standardize(first_features(self.data, encoder, self.features, config))
        if config.tie_weights:
            if decoder.linear.weight.shape != decoder.embed.weight.shape:
                raise InputError(f"the weights of the decoder {config.decoder} cannot be tied: their shapes differ.")
            if is_new:
                decoder.embed.weight.data /= config.embed_size**0.5  # as small as an output layer's
            decoder.linear.weight = decoder.embed.weight
        optimizer = build_optimizer(encoder, decoder, self.backbone_parameters(), config)
        self.peak_rates = [group["lr"] for group in optimizer.param_groups]
        self.trained_parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.objective = SelfCritical(self.data) if config.objective == "cider" else CrossEntropy()
        model = CaptioningModel(encoder, decoder, self.objective)
        with warnings.catch_warnings():  # torch 2.14 renames `broadcast_buffers`
            warnings.simplefilter("ignore", FutureWarning)
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        if state is not None and state["optimizer"] is not None:
            load_optimizer(self.optimizer, state["optimizer"], self.folder / "resume.pt")
        sampler = self.objective.build_sampler(self.data, config.batch_size, config.seed, self.features is not None)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        self.batches = EpochBatches(self.data, sampler, self.features, config, rank, processes)
        if state is not None and self.resumed is not None and (step := self.progress.step):
            captions = len(self.data.image_rows)  # without those of unreadable images, which may change
            seed = self.resumed.training.get("seed", config.seed)
            order = state["batch_size"], seed, state["captions"] or captions
            if order != (config.batch_size, config.seed, captions):
                self.progress.step = min(step * state["batch_size"] // config.batch_size, len(self.batches))
                self.log("the rest of this epoch is drawn anew; some captions occur twice in it, others not at all")
        if self.progress.step > len(self.batches):
            raise InputError(f"{self.folder}/resume.pt belongs to another run; start a new one.")
        if self.progress.total_steps == 0:  # in the state of an older version
            self.progress.total_steps = (self.progress.epoch - 1) * len(self.batches) + self.progress.step
        self.scalars.first = self.progress.total_steps + 1
        self.last_epoch = self.progress.first_epoch - 1 + config.num_epochs
        tenth = len(self.batches) * config.num_epochs // 10
        if config.warmup_steps > max(tenth, OptimizationOptions.warmup_steps):
            self.log(f"the warm-up takes a tenth of the run's steps, {tenth}, and not {config.warmup_steps}")

    def begin(self, state: dict[str, Any] | None) -> None:
        """Save a new run, or one with a new objective or new trained stages, before its first step."""
        if self.is_main and state is None:
            checkpoint.remove_run(self.folder)
            self.scalars.remove()
            self.save()
        elif self.is_main and state and self.resumed:
            if self.is_done():  # no step is made with new options
                self.description.training = self.resumed.training
            if self.description.architecture.backbone_weights != self.resumed.architecture.backbone_weights:
                checkpoint.store_backbone(self.folder, self.encoder)
            has_new_options = self.resumed.training != self.description.training
            if state["optimizer"] is None or has_new_options or self.description.epochs != self.resumed.epochs:
                # Before resume.pt, so that a run that is killed in between restarts with the new options.
                checkpoint.write_description(self.folder, self.description)
                self.save()
        self.log(
            f"training on {len(self.data.image_rows)} captions of {len(self.data.paths)} images, "
            f"{len(self.data.vocab)} words, {self.accelerator.num_processes} process(es), {self.device.type}"
        )
        if (progress := self.progress).epoch > self.last_epoch:
            epochs = progress.epoch - progress.first_epoch + 1
            self.log(f"all epochs are done; use --num-epochs {epochs} to train one more")

    def is_done(self) -> bool:
        """Return whether all epochs are done, or none of the last `patience` has a better CIDEr than those before."""
        progress, start = self.progress, max((self.description.best_epoch or 0) + 1, self.progress.first_epoch)
        return progress.epoch > self.last_epoch or progress.epoch - start >= self.config.patience

    def train_epoch(self) -> None:
        """Train for the rest of an epoch; losses stay on the device until `read_losses`."""
        progress, steps = self.progress, len(self.batches)
        self.model.train()
        unread: list[StepLoss] = []
        batches = self.batches.epoch(progress.epoch, progress.step, self.device)
        with tqdm(
            total=steps,
            initial=progress.step,
            desc=f"epoch {progress.epoch}/{self.last_epoch}",
            unit="step",
            disable=None if self.is_main else True,
        ) as bar:
            for step, (global_batch, has_share, batch) in enumerate(batches, progress.step + 1):
                unread.append(self.train_step(step, global_batch, has_share, batch))
                bar.update()
                if self.must_read(step):
                    line, loss, stopped = self.read_losses(unread)
                    unread = []
                    bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
                    if stopped or self.is_save_due():
                        self.save()  # before the log, which a closed terminal does not take
                    if step % self.config.print_every == 0 or step == steps:
                        self.log(line)
                    if stopped:
                        self.accelerator.wait_for_everyone()  # the launcher stops the rest once one exits
                        self.stop()

    def train_step(self, step: int, global_batch: np.ndarray, has_share: bool, batch: Batch) -> StepLoss:
        """Run one step of the optimizer.

        global_batch: caption indices of all processes. has_share: False if this process's batch is a placeholder.
        """
        config, processes = self.config, self.accelerator.num_processes
        done = (self.progress.epoch - self.progress.first_epoch) * len(self.batches) + step - 1
        # Dropout and sampling are reseeded at each step, so that the generator's state need not be saved.
        seed = (config.seed * 1_000_003 + done) * processes + self.accelerator.process_index
        torch.manual_seed(seed % 2**64)
        factor = learning_rate_factor(done, len(self.batches) * config.num_epochs, config.warmup_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peak_rates, strict=True):
            group["lr"] = peak * factor
        try:
            with autocast(self.device, config.precision):
                loss, penalty = self.model(batch)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise InputError(
                f"step {step} of epoch {self.progress.epoch} has a single image, which leaves the backbone's batch "
                f"norms a single value; use another --batch-size, a larger --image-size, or a smaller --fine-tune."
            ) from None
        terms, captions = self.objective.count(self.data.lengths[global_batch], self.decoder)
        step_loss = loss / terms + config.attention_penalty * penalty / captions
        self.accelerator.backward(has_share * step_loss * processes)  # the processes' gradients are averaged
        self.accelerator.clip_grad_norm_(self.trained_parameters, config.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepLoss(step, loss.detach() * has_share, terms, self.peak_rates[0] * factor)

    def must_read(self, step: int) -> bool:
        """Return whether to read the losses after this step; the same in all processes."""
        if step % self.config.print_every == 0 or step == len(self.batches):
            return True
        if self.accelerator.num_processes > 1:
            is_slow = self.device.type == "cpu" and bool(self.config.fine_tune)  # and would not save within seconds
            return is_slow or step % SHARED_STEPS == 0
        return self.interruption.signal != 0 or self.is_save_due()

    def is_save_due(self) -> bool:
        """Return whether the last save is `save_minutes` old."""
        return time.monotonic() - self.last_save > 60 * self.config.save_minutes

    def read_losses(self, unread: list[StepLoss]) -> tuple[str, float, bool]:
        """Read losses from the device into the log and the progress.

        Returns the last step's line and loss, and whether a process has been told to stop. Raises `InputError` if a
        loss or a weight is not a finite number, so that none is ever saved.
        """
        progress, resume = self.progress, f"`python train.py --resume {quoted(self.folder)}`"
        hint = f"resume from the last good state with {resume} and half the --learning-rate or a smaller --clip-norm."
        signal = unread[0].loss.new_tensor(self.interruption.signal)
        *losses, signals = self.accelerator.reduce(torch.stack([*(x.loss for x in unread), signal]), "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]
        for x, loss in zip(unread, losses, strict=True):
            value = loss / x.terms
            if not math.isfinite(value):
                raise InputError(
                    f"the loss is {value} at step {x.step} of epoch {progress.epoch} with a learning rate of "
                    f"{x.learning_rate:.2g}; {hint}"
                )
            place = (progress.epoch, self.last_epoch, x.step, len(self.batches))
            line = format_line(*place, value, self.objective.format(value))
            if self.is_main:
                self.log_file.write(f"{line}\n".encode())
            progress.step = x.step
            progress.epoch_loss += value * x.terms
            progress.epoch_tokens += x.terms
            progress.total_steps += 1
            self.scalars.add({"train/loss": value, "train/learning_rate": x.learning_rate}, progress.total_steps)
        if not bool(torch.stack([p.isfinite().all() for p in self.trained_parameters]).all()):
            raise InputError(
                f"a weight is not a finite number after step {progress.step} of epoch {progress.epoch}; {hint}"
            )
        return line, value, signals > 0

    def stop(self) -> None:
        """End the run after a signal; it is saved."""
        self.log(f"stopped; resume with `python train.py --resume {quoted(self.folder)}`")
        raise KeyboardInterrupt

    def validate_epoch(self) -> dict[str, Any]:
        """Return the epoch's training loss, validation loss and metrics; a signal ends the run and loses no step."""
        model, progress = self.accelerator.unwrap_model(self.model), self.progress
        try:
            with self.interruption.immediate():
                result = validate(self.accelerator, model, self.val, self.val_features, self.config)
        except BaseException as error:
            self.save()
            if isinstance(error, KeyboardInterrupt):
                self.stop()
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise InputError(
                    f"the GPU has too little memory to validate; end what else uses it, then resume with "
                    f"`python train.py --resume {quoted(self.folder)}`."
                ) from error
            raise
        return {"epoch": progress.epoch, "train_loss": progress.epoch_loss / max(1, progress.epoch_tokens), **result}

    def finish_epoch(self, result: dict[str, Any]) -> None:
        """Record the epoch's result, save its weights, and go to the next epoch."""
        description, epoch, best = self.description, self.progress.epoch, self.description.best_epoch
        description.epochs.append(result)
        better = best is None or _rank(result) > _rank(description.epochs[best - 1])
        description.best_epoch = epoch if better else best
        self.progress = TrainingProgress(epoch + 1, 0, self.progress.first_epoch, total_steps=self.progress.total_steps)
        if self.is_main:
            if better or epoch % self.config.save_every == 0 or epoch == self.last_epoch:
                checkpoint.save_epoch(self.folder, epoch, self.encoder, self.decoder, description)
            self.save()
            # The epoch that this objective or these trained stages started from is kept.
            if better and best is not None and best >= self.progress.first_epoch and best % self.config.save_every:
                checkpoint.remove_epoch(self.folder, best)
        self.scalars.add({f"epoch/{k}": value for k, value in result.items() if isinstance(value, float)}, epoch)
        self.last_save = time.monotonic()
        self.log(
            f"epoch {epoch}: train loss {result['train_loss']:.3f}, validation loss {result['val_loss']:.3f}, "
            f"Bleu_4 {result['Bleu_4']:.3f}, CIDEr {result['CIDEr']:.3f}" + (" (best)" if better else "")
        )

    def save(self) -> None:
        """Write resume.pt, with all that is needed to resume from here."""
        self.last_save = time.monotonic()
        if not self.is_main:
            return
        self.log_file.flush()
        os.fsync(self.log_file.fileno())
        published = self.description.architecture.backbone_weights == "published"
        encoder = self.encoder.embed.state_dict(prefix="embed.") if published else self.encoder.state_dict()
        state = {
            "format": 2,
            "objective": self.config.objective,
            **vars(self.progress),
            "batch_size": self.config.batch_size,
            "captions": len(self.data.image_rows),
            "encoder": encoder,
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epochs": self.description.epochs,
            "best_epoch": self.description.best_epoch,
            "log_bytes": self.log_file.tell(),
        }
        checkpoint.save_resume(self.folder, state)
        checkpoint.write_description(self.folder, self.description)


def _rank(epoch: dict[str, Any]) -> tuple[float, float]:
    """Return an epoch's sort key: CIDEr, then lower validation loss, as CIDEr is 0 if only one image is scored."""
    return epoch["CIDEr"], -epoch.get("val_loss", math.inf)
