"""BLEU, METEOR, ROUGE-L and CIDEr of captions, as COCO's caption evaluation computes them (arXiv 1504.00325).

The numbers are pycocoevalcap's own. Two of its parts run in Java: the Penn Treebank tokenizer and METEOR.
Where Java is missing or not wanted, a tokenizer in Python takes the first one's place and METEOR is left out.
`CiderD` is the same CIDEr, fast enough to be the reward of self-critical training.
"""

from __future__ import annotations

import json
import re
import subprocess
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from captioning.errors import InputError

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")

# METEOR reads numbers in the user's locale, and before Java 18 text is read in the locale's encoding.
_JAVA = ("java", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")

_ASCII = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "´": "'", "`": "'", "–": "--", "—": "--", "…": "..."}
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$"}
)
# The brackets' names are lower case by the time pycocoevalcap drops punctuation, so it keeps them as words.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = {*ptbtokenizer.PUNCTUATIONS, '"'}
_TOKEN = re.compile(
    r"""
      \.?\d+(?:[:.,/]\d+)+ | \.\d+                          # 12:30, 1,000, 1/2, .5
    | (?<!\w)(?:[^\W\d_]\.)+(?:[^\W\d_](?!\w))?             # t.v., u.s.a, j. crew
    | (?:st|ave|blvd|rd|dr|mr|mrs|ms|jr|ft|vs|etc|inc|co)\.  # abbreviations keep their full stop
    | [^\W\d_]+(?=n't\b) | n't\b | can(?=not\b)              # do n't, can not
    | 'n' | '(?:s|m|d|ll|re|ve)\b                            # rock 'n' roll, dog 's
    | \w+(?:[-/.'](?!(?:s|m|d|ll|re|ve)\b)\w+)*              # dog, wide-eyed, and/or, o'clock
    | <\w+> | [?!]{2,} | [^\s\w]
    """,
    re.VERBOSE,
)


@dataclass(frozen=True)
class Scores:
    """What `score` found.

    metrics: the corpus value of each of METRICS, 0 to 1 (CIDEr: 0 to 10); METEOR is None if it was not run.
    per_caption: image id -> the same for that caption alone (without METEOR if it was not run). ROUGE_L and
        CIDEr of the corpus are the means of these; BLEU and METEOR pool their counts over the corpus.
    tokenizer: "PTB" (pycocoevalcap's, in Java) or "plain" (this module's).
    """

    metrics: dict[str, float | None]
    per_caption: dict[int, dict[str, float]]
    tokenizer: str


def tokenize_plain(caption: str) -> list[str]:
    """Lower-case words without punctuation, as pycocoevalcap's PTB tokenizer cuts them, without its Java."""
    tokens = _TOKEN.findall(" ".join(caption.translate(_ASCII).lower().split()))
    return [_BRACKETS.get(token, token) for token in tokens if token not in _PUNCTUATION]


def _tokenize_ptb(captions: Sequence[str]) -> list[str]:
    # Through pipes: PTBTokenizer.tokenize() writes into its package's folder, which may be read-only, and
    # miscounts lines where a caption holds one of Unicode's other line ends.
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [
        *_JAVA,
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    text = "".join(" ".join(caption.split()) + "\n" for caption in captions).encode(errors="replace")
    lines = subprocess.run(command, input=text, capture_output=True, check=True).stdout.decode().split("\n")
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in drop) for line in lines[:-1]]


def _tokenize(captions: Sequence[str], java: bool | None) -> tuple[list[str], str]:
    if java is not False:
        try:
            return _tokenize_ptb(captions), "PTB"
        except (OSError, subprocess.CalledProcessError) as error:
            if java:
                raise InputError("java does not run; install a Java runtime or score without it.") from error
    return [" ".join(tokenize_plain(caption)) for caption in captions], "plain"


class _Meteor(meteor_package.Meteor):
    """pycocoevalcap's METEOR in a fixed locale, and with a lock that an error cannot leave it waiting for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.meteor_p = subprocess.Popen(
            [*_JAVA, "-Xmx2G", "-jar", meteor_package.METEOR_JAR, "-", "-", "-stdio", "-l", "en", "-norm"],
            cwd=Path(meteor_package.__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def close(self) -> None:
        self.meteor_p.kill()
        self.meteor_p.communicate()

    def compute_score(self, references: dict, hypotheses: dict) -> tuple[float, list[float]]:
        try:
            return super().compute_score(references, hypotheses)
        except (OSError, ValueError) as error:
            raise InputError("METEOR's Java stopped; give it 2 GB of memory or score without it.") from error


def score(
    hypotheses: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    meteor: bool = True,
    java: bool | None = None,
) -> Scores:
    """Score one caption an image (image id -> caption) against its references (image id -> captions).

    Images that are only in `references` are left out, as in pycocoevalcap's COCOEvalCap, and CIDEr takes its
    document frequencies from the references of those that are scored.

    meteor: run METEOR where Java runs (seconds to start).
    java: None uses Java where it runs; False never does, for a quick score between epochs; True insists.

    Raises InputError for no captions, an image without references, and where Java is insisted on and missing.
    """
    if not hypotheses:
        raise InputError("there are no captions to score.")
    missing = [i for i in hypotheses if not references.get(i)]
    if missing:
        raise InputError(f"image {missing[0]} has no reference caption; score only images that have one.")

    # In the references' order, as COCOEvalCap: what the PTB tokenizer makes of "K." depends on the next line.
    ids = [i for i in references if i in hypotheses]
    texts = [caption for i in ids for caption in references[i]]
    tokenized, tokenizer = _tokenize([*texts, ".", *(hypotheses[i] for i in ids)], java)
    words = iter(tokenized)
    truth = {i: [next(words) for _ in references[i]] for i in ids}
    next(words)
    result = {i: [next(words)] for i in ids}

    use_meteor = meteor and tokenizer == "PTB"
    # Its Java takes seconds to start, while the others compute.
    with closing(_Meteor()) if use_meteor else nullcontext() as meteor_scorer:
        corpus, each = Bleu(4).compute_score(truth, result, verbose=0)
        found = {f"Bleu_{n}": pair for n, pair in enumerate(zip(corpus, each, strict=True), start=1)}
        found["ROUGE_L"] = Rouge().compute_score(truth, result)
        found["CIDEr"] = Cider().compute_score(truth, result)
        if use_meteor:
            found["METEOR"] = meteor_scorer.compute_score(truth, result)
    names = [name for name in METRICS if name in found]
    return Scores(
        metrics={name: float(found[name][0]) if name in found else None for name in METRICS},
        per_caption={i: {name: float(found[name][1][row]) for name in names} for row, i in enumerate(ids)},
        tokenizer=tokenizer,
    )


def _read_json(path: str | Path) -> object:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a file that is there.") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON ({error}); give a COCO file.") from error


def score_results(
    references_file: str | Path, results_file: str | Path, meteor: bool = True, java: bool | None = None
) -> Scores:
    """Score a COCO results file, `[{"image_id": 1, "caption": "..."}, ...]`, against a COCO captions file.

    Only the images in the results count; `meteor` and `java` are those of `score`. Raises InputError, naming
    the file, when one is missing or not what it should be, for an unknown image and for one captioned twice.
    """
    annotations, results = _read_json(references_file), _read_json(results_file)
    references: dict[int, list[str]] = {}
    try:
        for image in annotations.get("images", []):
            references[image["id"]] = []
        for annotation in annotations["annotations"]:
            if not isinstance(annotation["caption"], str):
                raise TypeError
            references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    except (AttributeError, KeyError, TypeError) as error:
        message = f"{references_file} is not a COCO captions file; its annotations need image_id and caption, a string."
        raise InputError(message) from error
    if not isinstance(results, list) or not results:
        raise InputError(f'{results_file} must be a list of {{"image_id": ..., "caption": ...}}, not empty.')
    hypotheses: dict[int, str] = {}
    for row, entry in enumerate(results):
        image = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(image, int | str) or not isinstance(entry.get("caption"), str):
            raise InputError(f"{results_file}: entry {row} lacks an image_id or a caption; give it both.")
        if image in hypotheses:
            raise InputError(f"{results_file}: image {image} is captioned twice; keep one caption an image.")
        if not references.get(image):
            raise InputError(f"{results_file}: image {image} has no caption in {references_file}; remove it.")
        hypotheses[image] = entry["caption"]
    return score(hypotheses, references, meteor=meteor, java=java)


def format_table(scores: Scores) -> str:
    """The corpus metrics as a Markdown table that also reads well in a terminal; METEOR is "-" if not run."""
    rows = [(name, "-" if value is None else f"{value:.3f}") for name, value in scores.metrics.items()]
    lines = [f"| {name:<7} | {value:>5} |" for name, value in [("metric", "value"), (":------", "----:"), *rows]]
    return "\n".join([*lines, "", f"{len(scores.per_caption)} captions, {scores.tokenizer} tokenizer"])


def diversity(hypotheses: Mapping[int, str], training_captions: Iterable[str]) -> dict[str, float]:
    """How varied captions are (image id -> caption), which the metrics against references do not see.

    Returns `vocabulary` (different words used), `novel` (share of captions not among the training captions),
    `distinct_captions` (different captions / captions), `distinct_1` and `distinct_2` (different n-grams /
    n-grams, arXiv 1510.03055), and `mean_length` (words a caption). Case and punctuation do not count.
    """
    if not hypotheses:
        raise InputError("there are no captions to measure.")
    captions = [tuple(tokenize_plain(caption)) for caption in hypotheses.values()]
    different = set(captions)
    known = {words for caption in training_captions if (words := tuple(tokenize_plain(caption))) in different}
    words = list(chain.from_iterable(captions))
    bigrams = [pair for caption in captions for pair in pairwise(caption)]
    return {
        "vocabulary": len(set(words)),
        "novel": sum(caption not in known for caption in captions) / len(captions),
        "distinct_captions": len(different) / len(captions),
        "distinct_1": len(set(words)) / max(len(words), 1),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
        "mean_length": len(words) / len(captions),
    }
