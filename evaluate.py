"""Caption a split with a trained model and score the captions.

python evaluate.py --model models/scenes --data data/scenes --split test --beam-size 3
torchrun --nproc_per_node 2 evaluate.py --model models/scenes --data data/scenes
python evaluate.py --references data/coco/annotations/captions_val2017.json --results results.json
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from accelerate.utils import gather_object
from tqdm.auto import tqdm

import scenes
from captioning.annotations import read_annotations
from captioning.captioner import Caption, Captioner, Decoding, Precision
from captioning.checkpoint import default_model
from captioning.distributed import this_process
from captioning.errors import InputError, run_command
from captioning.files import write_file
from captioning.metrics import Scores, diversity, format_table, score, score_results
from data_loader import CaptionDataset, find_split


@dataclass
class Evaluation:
    """A split as a model captions it.

    captions: image id -> its `Caption`. seconds: for captioning all of them, from file to sentence.
    scores: against the references, or None where the split has none.
    scenes: on the sample data set, the share of captions that pass each part of `scenes.check`, of those to
        which it applies; elsewhere empty.
    """

    captions: dict[int, Caption]
    seconds: float
    scores: Scores | None
    scenes: dict[str, float]

    def results(self) -> list[dict[str, Any]]:
        """The captions in the form that the COCO evaluation server takes."""
        return [{"image_id": i, "caption": caption.text} for i, caption in self.captions.items()]


def evaluate(
    captioner: Captioner,
    dataset: CaptionDataset,
    how: Decoding | None = None,
    limit: int | None = None,
    workers: int = 0,
    java: bool | None = None,
) -> Evaluation | None:
    """Caption a split's photos, the first `limit` of them, and score them where the references are there.

    Several processes share the photos, and the captions are the same for any number of them; the main process has
    the result, the others None.
    """
    process = this_process()
    main = process.is_main_process
    paths = dataset.paths[:limit]
    ids = [int(i) for i in dataset.image_ids[:limit]]
    start = time.perf_counter()
    found = captioner.stream(paths, how or Decoding(), workers, shared=True)
    total = -(-len(paths) // process.num_processes)
    share = list(tqdm(found, total=total, unit="photo", delay=2, disable=None if main else True))
    captions = {ids[i]: caption for i, caption in sorted(gather_object(share), key=itemgetter(0))}
    if not main:
        return None
    seconds = time.perf_counter() - start
    hypotheses = {i: caption.text for i, caption in captions.items()}
    scores = None
    if len(dataset.photo):
        references = dataset.references()
        scores = score(hypotheses, {i: references[i] for i in ids}, java=java)
    return Evaluation(captions, seconds, scores, check_scenes(dataset, hypotheses))


def check_scenes(dataset: CaptionDataset, hypotheses: dict[int, str]) -> dict[str, float]:
    """The share of captions right about each part of the drawn scenes; empty for photos."""
    right: dict[str, list[bool]] = defaultdict(list)
    for i, text in hypotheses.items():
        scene = dataset.coco.imgs[i].get("scene")
        if scene is not None:
            try:
                found = scenes.check(text, scene)
            except (KeyError, TypeError, AttributeError, IndexError):
                raise InputError(
                    f"{dataset.annotation_file} says of image {i} what no drawn scene is; draw the scenes again."
                ) from None
            for part, correct in found.items():
                right[part].append(correct)
    return {part: sum(values) / len(values) for part, values in right.items()}


def main(
    decoding: Annotated[Decoding, tyro.conf.arg(name=""), tyro.conf.DisallowNone],
    model: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = (),
    data: Path = Path("data/scenes"),
    split: Literal["train", "val", "test"] = "test",
    limit: int | None = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    results: Path | None = None,
    references: Path | None = None,
    workers: int = min(4, os.cpu_count() or 1),
    precision: Precision = "auto",
) -> None:
    """Caption a split with a trained model and score the captions.

    Args:
        decoding: how words are chosen; by default greedily.
        model: the model's folder, or user/name on the Hugging Face Hub; by default the newest in models/ that was
            trained on this data set. Given several times, the models' probabilities are averaged.
        data: the data set's folder.
        split: which of its splits.
        limit: only so many photos, the first ones.
        json_: print one JSON document.
        results: write the captions here, in the form that the COCO evaluation server takes; with --references
            read them from here instead.
        references: only score the captions in --results against this COCO captions file.
        workers: processes that read photos.
        precision: of the backbone; auto is bf16 where the processor or GPU has it, else fp32.
    """
    if references is not None:
        if not this_process().is_main_process:
            return
        if results is None:
            raise InputError("--references needs --results, the file with the captions to score.")
        scores = score_results(references, results)
        print(json.dumps({**scores.metrics, "tokenizer": scores.tokenizer}) if json_ else format_table(scores))
        return
    if limit is not None and limit < 1:
        raise InputError(f"--limit must be at least 1, not {limit}.")
    decoding.check()
    if decoding.alternatives:
        raise InputError("--alternatives has no effect on an evaluation, which scores one caption per image.")
    with this_process().local_main_process_first():  # what it downloads and tokenizes the others find
        captioner = Captioner.load(model or default_model(data=data.resolve().name), precision=precision)
        dataset = CaptionDataset(data, split, vocab=captioner.vocab)
    found = evaluate(captioner, dataset, decoding, limit, workers)
    if found is None:
        return
    if results is not None or found.scores is None:
        results = results or Path(f"captions_{split}_results.json")
        write_file(results, lambda file: file.write(json.dumps(found.results()).encode()))
        print(f"wrote {results}", file=sys.stderr)
    train_captions = _training_captions(data)
    variety = diversity({i: c.text for i, c in found.captions.items()}, train_captions)
    different = len({c.text for c in found.captions.values()})
    speed = len(found.captions) / found.seconds
    if json_:
        document = {
            **(found.scores.metrics if found.scores else {}),
            "tokenizer": found.scores.tokenizer if found.scores else None,
            **({"scenes": found.scenes} if found.scenes else {}),
            "different_captions": different,
            **variety,
            "photos": len(found.captions),
            "photos_per_second": speed,
            "precision": captioner.precision,
        }
        print(json.dumps(document, indent=1))
        return
    if found.scores is not None:
        print(format_table(found.scores))
    if found.scenes:
        print("\ncaptions right about")
        for part, share in found.scenes.items():
            print(f"    {part:<10} {share:6.1%}")
    print(
        f"\n{len(found.captions)} photos, {different} different captions, {variety['vocabulary']} words used, "
        f"{variety['novel']:.0%} not among the training captions; {speed:.1f} photos/s "
        f"with a backbone in {captioner.precision}"
    )
    if found.scores is not None and found.scores.metrics["METEOR"] is None:
        print("METEOR is missing because Java is; captions were tokenized by the plain tokenizer.")


def _training_captions(data: Path) -> list[str]:
    """The captions that a model may have learned by heart; none where the data set has no training split."""
    try:
        path, _ = find_split(data, "train")
        read_annotations(path)  # says what is wrong with it
        return [annotation["caption"] for annotation in json.loads(path.read_bytes())["annotations"]]
    except InputError:
        return []


if __name__ == "__main__":
    run_command(lambda: tyro.cli(main))
