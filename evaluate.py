"""Caption a split of a data set with a trained model and score the captions.

python evaluate.py --model models/scenes --data data/scenes --split test --beam-size 3
torchrun --nproc_per_node 2 evaluate.py --model models/scenes --data data/scenes
python evaluate.py --references data/coco/annotations/captions_val2017.json --results results.json
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the imports, which take seconds, without a traceback

import tyro
from accelerate.utils import gather_object
from tqdm.auto import tqdm

from captioning.captioner import Caption, Captioner, Decoding, Ensemble, Precision
from captioning.checkpoint import default_model, name_of_data, name_weights, read_description
from captioning.distributed import this_process
from captioning.errors import InputError, log, run_command
from captioning.files import check_output, hash_file, read_bytes, write_file
from captioning.images import WORKERS
from captioning.metrics import Scores, diversity, format_table, read_references, score, score_results
from captioning.scenes import checking
from data_loader import CaptionDataset, find_split


@dataclass
class Evaluation:
    """The captions of a split and their scores.

    captions: image id -> its `Caption`. seconds: for captioning all of them, from file to sentence.
    scores: against the references, or None if the split has none.
    attribute_accuracy: on the sample data set, each attribute that `checking.check` examines -> the share of correct
        captions among those to which it applies; empty on other data sets.
    unreadable: one sentence for each image that was skipped because it cannot be read.
    """

    captions: dict[int, Caption]
    seconds: float
    scores: Scores | None
    attribute_accuracy: dict[str, float]
    unreadable: list[str] = field(default_factory=list)

    def hypotheses(self) -> dict[int, str]:
        """Return the captions as text, by image id."""
        return {i: caption.text for i, caption in self.captions.items()}

    def results(self) -> list[dict[str, Any]]:
        """Return the captions in COCO's results format."""
        return [{"image_id": i, "caption": text} for i, text in self.hypotheses().items()]


def evaluate(
    captioner: Captioner,
    dataset: CaptionDataset,
    decode: Decoding | None = None,
    limit: int | None = None,
    workers: int = 0,
    java: bool | None = None,
    skip_unreadable: bool = False,
    results: Path | None = None,
) -> Evaluation | None:
    """Caption the first `limit` images of a split, and score the captions if the split has references.

    Several processes share the images; the captions do not depend on their number. The main process returns the
    evaluation, the others None.

    workers: processes that read images. java: as in `metrics.score`.
    skip_unreadable: leave out images that cannot be read instead of raising InputError for the first.
    results: file to which the captions are written, before they are scored, in COCO's results format.
    Raises `InputError` for a limit below 1 and where no image can be read.
    """
    if limit is not None and limit < 1:
        raise InputError(f"limit must be at least 1, not {limit}.")
    process = this_process()
    is_main = process.is_main_process
    paths = dataset.paths[:limit]
    ids = [int(i) for i in dataset.image_ids[:limit]]
    share: list[tuple[int, Caption | str]] = []  # this process's images: index, and caption or error

    def skip(index: int, error: InputError) -> None:
        if not skip_unreadable:
            raise InputError(f"{str(error).rstrip('.')} (--skip-unreadable evaluates without it).")
        share.append((index, str(error)))

    start = time.perf_counter()
    stream = captioner.stream(paths, decode or Decoding(), workers, skip, shared=True)
    total = -(-len(paths) // process.num_processes)
    progress = tqdm(stream, total=total, unit="image", delay=2, disable=None if is_main else True)
    share.extend((i, caption.without_attention()) for i, caption in progress)
    outcomes = sorted(gather_object(share), key=itemgetter(0))
    if not is_main:
        return None
    captions = {ids[i]: caption for i, caption in outcomes if isinstance(caption, Caption)}
    unreadable = [error for _, error in outcomes if isinstance(error, str)]
    if not captions:
        raise InputError(f"none of the {len(paths)} images can be read; the error of the first: {unreadable[0]}")
    evaluation = Evaluation(captions, time.perf_counter() - start, None, {}, unreadable)
    if results is not None:
        _write_results(evaluation.results(), results)
    hypotheses = evaluation.hypotheses()
    if len(dataset.image_rows):
        references = dataset.references()
        evaluation.scores = score(hypotheses, {i: references[i] for i in hypotheses}, java=java)
    evaluation.attribute_accuracy = score_attributes(dataset, hypotheses)
    return evaluation


def score_attributes(dataset: CaptionDataset, hypotheses: dict[int, str]) -> dict[str, float]:
    """Compute the attribute accuracy of captions (image id -> caption) of drawn scenes; empty for photos."""
    correct: dict[str, list[bool]] = defaultdict(list)
    for i, scene in dataset.scenes().items():
        if i in hypotheses:
            for attribute, is_correct in checking.check(hypotheses[i], scene).items():
                correct[attribute].append(is_correct)
    return {attribute: sum(values) / len(values) for attribute, values in correct.items()}


def main(
    decoding: Annotated[Decoding, tyro.conf.arg(name=""), tyro.conf.DisallowNone],
    model: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    data: Path = Path("data/scenes"),
    split: Literal["train", "val", "test"] = "test",
    limit: int | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    results: Path | None = None,
    references: Path | None = None,
    skip_unreadable: bool = False,
    workers: int = WORKERS,
    precision: Precision = "auto",
) -> None:
    """Caption a split of a data set with a trained model and score the captions.

    After `make demo`:  python evaluate.py --model models/scenes --data data/scenes

    Captions of any other program:  python evaluate.py --references captions_val2017.json --results results.json

    Args:
        decoding: how words are chosen.
        model: folder, or user/name on the Hub; several make an ensemble. Default: the newest that names this data set.
        data: folder of the data set.
        split: split of the data set.
        limit: evaluate the first LIMIT images only.
        json_: print one JSON document, whose keys docs/commands.md lists.
        results: write the captions to this file in COCO's results format; with --references, read them from it.
        references: run no model; score the captions in --results against this COCO captions file.
        skip_unreadable: leave out images that are missing or cannot be read, and report how many.
        workers: processes that read images.
        precision: the backbone's; auto: bf16 if supported, else fp32; int8 needs a CPU, onnx, onnxruntime, onnxscript.
    """
    if sys.stdout is None:
        raise InputError("standard output is closed, so the scores cannot be printed; redirect it to a file.")
    if references is not None:
        ignored = {
            "model": model,
            "data": data != Path("data/scenes"),
            "split": split != "test",
            "limit": limit is not None,
            "skip-unreadable": skip_unreadable,
            "precision": precision != "auto",
            "workers": workers != WORKERS,
        }
        for name in (name for name, given in ignored.items() if given):
            raise InputError(f"--{name} has no effect with --references, which captions nothing; leave it out.")
        if decoding != Decoding():
            raise InputError("decoding options have no effect with --references, which captions nothing.")
        if this_process().is_main_process:
            _score_file(references, results, json_)
        return
    if decoding.alternatives:
        raise InputError("--alternatives has no effect on an evaluation, which scores one caption per image.")
    decoding.check()
    with this_process().local_main_process_first():  # the others use the files that this process downloads and caches
        find_split(data, split)
        models = list(model) or [_choose_model(data)]
        captioner = Captioner.load(models, precision=precision)
        dataset = CaptionDataset(data, split, vocab=captioner.vocab, must_exist=not skip_unreadable)
    about = _describe(captioner, models, data, split)
    training_captions = None
    if this_process().is_main_process:
        log("{model}, {weights}, trained on {trained_on}; evaluated on {data}, {split} split".format(**about))
        results = _choose_output(results, dataset)
        training_captions = _read_training_captions(data, captioner)
    evaluation = evaluate(
        captioner, dataset, decoding, limit, workers, skip_unreadable=skip_unreadable, results=results
    )
    if evaluation is not None:
        _report(evaluation, about, diversity(evaluation.hypotheses(), training_captions), json_)
        if results is not None:
            log(f"wrote {results}")


def _score_file(references: Path, results: Path | None, as_json: bool) -> None:
    """Score the captions in a file and print the scores."""
    if results is None:
        raise InputError("--references needs --results, the file with the captions to score.")
    scores = score_results(references, results)
    images = len(scores.per_caption)
    if scores.uncaptioned:
        total = images + scores.uncaptioned
        log(f"{results} captions {images} of the {total} images of {references}; only those are scored")
    if as_json:
        print(json.dumps({**scores.metrics, "tokenizer": scores.tokenizer, "photos": images}))
    else:
        print(format_table(scores))
    if scores.without_meteor:
        log(scores.without_meteor)


def _choose_model(data: Path) -> Path:
    """Return the newest model in models/ that was trained on the data set; another must be named with --model."""
    for name in (name_of_data(data), data.resolve().name):
        model = default_model(data=name)
        trained_on = read_description(model).data.get("folder")
        if trained_on == name:
            return model
    raise InputError(
        f"no model in models/ was trained on {data}; train one with `python train.py --data {data}`, or name one "
        f"with --model ({model} was trained on {trained_on})."
    )


def _choose_output(results: Path | None, dataset: CaptionDataset) -> Path | None:
    """Choose the file for the captions and check it; without references, there is always one."""
    if results is None and not len(dataset.image_rows):
        results = Path(f"captions_{dataset.mode}_results.json")
        log(f"{dataset.annotation_file} has no reference captions; the model's captions are written to {results}")
    if results is not None:
        results = Path(os.path.realpath(results)) if results.is_symlink() else results  # a link stays one
        if results.suffix.lower() not in (".json", ""):
            raise InputError(f"{results} would hold JSON, not {results.suffix}; name a file that ends in .json.")
        check_output(results)
        if os.path.exists(results):
            if os.path.samefile(results.parent, dataset.annotation_file.parent):
                raise InputError(f"{results} is a file of the data set; name another, or score it with --references.")
            read_bytes(results)  # raises: its content is kept under another name
    return results


def _write_results(rows: list[dict[str, Any]], path: Path) -> None:
    """Write captions in COCO's results format; an existing file with other content is renamed first."""
    content = json.dumps(rows).encode()
    # Other content may be captions to score, where --references was forgotten.
    if os.path.exists(path) and path.read_bytes() != content:
        names = (path.with_name(f"{path.name}.old{number}") for number in ("", *range(2, 1000)))
        backup = next(name for name in names if not name.exists())
        os.replace(path, backup)
        log(f"the earlier content of {path} is now in {backup}")
    write_file(path, lambda file: file.write(content))


def _members(captioner: Captioner) -> list[Captioner]:
    return captioner.members if isinstance(captioner, Ensemble) else [captioner]


def _training_data(model: Captioner) -> str:
    return model.description.data.get("folder", "an unknown data set")


def _describe(captioner: Captioner, models: list[Path], data: Path, split: str) -> dict[str, Any]:
    """Describe the models and the data: the first keys of the JSON document."""
    members = _members(captioner)
    return {
        "model": " + ".join(map(str, models)),
        "epoch": members[0].epoch if len(members) == 1 else None,
        "weights": " + ".join(name_weights(member.description, member.epoch) for member in members),
        "trained_on": " + ".join(dict.fromkeys(map(_training_data, members))),
        "data": str(data),
        "split": split,
        "precision": captioner.precision,
    }


def _read_training_captions(data: Path, captioner: Captioner) -> list[str] | None:
    """Read the captions that the model learned from, for the share of novel captions; None if they are not found."""
    try:
        path = find_split(data, "train")[0]
        learned_from = [member.description.data.get("train_sha256") for member in _members(captioner)]
        here = hash_file(path)
        if any(hashed != here for hashed in learned_from):
            raise InputError(f"{path} is not known to be the file that the model was trained on.")
        references = read_references(path)
    except InputError as error:
        log(f"the share of novel captions is not measured: {error}")
        return None
    return [caption for captions in references.values() for caption in captions]


def _report(evaluation: Evaluation, about: dict[str, Any], variety: dict[str, float | None], as_json: bool) -> None:
    """Print the evaluation, as one JSON document or as tables."""
    scores, images, unreadable = evaluation.scores, len(evaluation.captions), len(evaluation.unreadable)
    different, speed = len(set(evaluation.hypotheses().values())), images / evaluation.seconds
    for error in evaluation.unreadable:
        log(f"skipped: {error}")
    if as_json:
        document = {
            **about,
            **(scores.metrics if scores else {}),
            "tokenizer": scores.tokenizer if scores else None,
            **({"scenes": evaluation.attribute_accuracy} if evaluation.attribute_accuracy else {}),
            "different_captions": different,
            **variety,
            "photos": images,
            "unreadable": unreadable,
            "photos_per_second": speed,
        }
        print(json.dumps(document, indent=1))
    else:
        if scores is not None:
            print(format_table(scores))
        if evaluation.attribute_accuracy:
            print("\nattribute accuracy")
            for attribute, accuracy in evaluation.attribute_accuracy.items():
                print(f"    {attribute:<10} {accuracy:6.1%}")
        skipped = f" ({unreadable} skipped, which cannot be read)" if unreadable else ""
        novel = "" if variety["novel"] is None else f", {variety['novel']:.0%} not among the training captions"
        print(
            f"\n{images} images{skipped}, {different} different captions, {variety['vocabulary']} words used{novel}; "
            f"{speed:.1f} images/s with a backbone in {about['precision']}"
        )
    if scores is not None and scores.without_meteor:
        log(scores.without_meteor)


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main, config=(tyro.conf.DisallowNone,)))
