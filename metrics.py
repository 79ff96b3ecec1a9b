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
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from errors import InputError

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


class CiderD:
    """CIDEr-D (arXiv 1411.5726, equations 4 and 5) as a reward for self-critical training (arXiv 1612.00563).

    The number is pycocoevalcap's CIDEr (sigma 6, times 10), with document frequencies from all `references`.
    Their vectors are computed once, here; a call then scores tens of thousands of captions a second.

    references: image id -> its reference captions, each a sequence of tokens: vocabulary indices or words.
        Whether `<end>` is one of the tokens is the caller's choice, the same for references and hypotheses.

    Raises InputError for an image without references, references without a word, and more than 65,535
    different tokens.
    """

    def __init__(self, references: Mapping[Hashable, Sequence[Sequence[Hashable]]]) -> None:
        if not references or not all(len(group) for group in references.values()):
            raise InputError("CIDEr-D needs images with a reference caption each; leave out those without.")
        self._row = {image: row for row, image in enumerate(references)}
        self._codes: dict[Hashable, int] = {}
        captions = [caption for group in references.values() for caption in group]
        counts = np.array([len(group) for group in references.values()])
        self._first = np.concatenate([[0], np.cumsum(counts)])  # (images + 1,) first reference of each image
        self._log_images = np.log(len(counts))

        owner, keys, self._lengths = _ngrams(self._encode(captions, self._codes))
        if not keys.size:
            raise InputError("CIDEr-D needs words in the references; all of them are empty.")
        self._keys, ngram = np.unique(keys, return_inverse=True)  # (ngrams,) sorted
        entries, frequency = np.unique(owner * len(self._keys) + ngram, return_counts=True)
        owner, self._ngram = np.divmod(entries, len(self._keys))  # (entries,) the references' n-grams
        image = np.repeat(np.arange(len(counts)), counts)
        # Asked for the counts too, np.unique sorts; it would hash otherwise, 30 times slower on these.
        documents, _ = np.unique(image[owner] * len(self._keys) + self._ngram, return_counts=True)
        frequency_in_images = np.bincount(documents % len(self._keys))
        self._idf = self._log_images - np.log(frequency_in_images)
        self._weight = frequency * self._idf[self._ngram]
        self._norms = _norms(owner, self._keys[self._ngram], self._weight, len(captions))
        self._start = np.searchsorted(owner, np.arange(len(captions) + 1))  # (references + 1,) into entries

    def _encode(self, captions: Iterable[Sequence[Hashable]], codes: dict[Hashable, int]) -> list[list[int]]:
        encoded = [[codes.setdefault(token, len(codes) + 1) for token in caption] for caption in captions]
        if len(codes) >= 1 << 16:
            raise InputError("CIDEr-D takes at most 65,535 different tokens; use a smaller vocabulary.")
        return encoded

    def __call__(self, ids: Sequence[Hashable], hypotheses: Sequence[Sequence[Hashable]]) -> np.ndarray:
        """CIDEr-D of each hypothesis against its image's references: (captions,) float64, 0 to 10.

        ids: the image of each hypothesis, repeated where an image has several. Raises InputError for one that
        has no references.
        """
        try:
            rows = np.array([self._row[image] for image in ids], dtype=np.int64)
        except KeyError as error:
            raise InputError(f"image {error.args[0]} has no reference captions for CIDEr-D.") from error
        if len(rows) != len(hypotheses):
            raise ValueError(f"{len(rows)} ids for {len(hypotheses)} hypotheses")
        # A copy of the codes, or the tokens that only hypotheses have would pile up.
        owner, keys, lengths = _ngrams(self._encode(hypotheses, self._codes.copy()))
        distinct, ngram = np.unique(keys, return_inverse=True)
        entries, frequency = np.unique(owner * len(distinct) + ngram, return_counts=True)
        owner, ngram = np.divmod(entries, max(len(distinct), 1))
        place = np.minimum(np.searchsorted(self._keys, distinct), len(self._keys) - 1)
        known = self._keys[place] == distinct
        weight = frequency * np.where(known, self._idf[place], self._log_images)[ngram]
        norms = _norms(owner, distinct[ngram], weight, len(rows))

        # Every pair of a hypothesis and a reference of its image, and every n-gram entry of those references.
        pair_owner, pair = _ranges(self._first[rows], self._first[rows + 1])
        entry_pair, entry = _ranges(self._start[pair], self._start[pair + 1])
        wanted = pair_owner[entry_pair] * len(self._keys) + self._ngram[entry]
        known = known[ngram]
        have = owner[known] * len(self._keys) + place[ngram[known]]
        at = np.searchsorted(have, wanted)
        hit = np.append(have, -1)[at] == wanted
        entry, entry_pair = entry[hit], entry_pair[hit]
        overlap = np.minimum(weight[known][at[hit]], self._weight[entry]) * self._weight[entry]
        order = _order(self._keys[self._ngram[entry]])
        similarity = np.bincount(entry_pair * 4 + order, overlap, len(pair) * 4).reshape(-1, 4)
        scale = norms[pair_owner] * self._norms[pair]
        similarity = np.divide(similarity, scale, out=np.zeros_like(scale), where=scale > 0)  # (pairs, 4)
        difference = lengths[pair_owner] - self._lengths[pair]
        value = similarity.mean(1) * np.exp(-(difference**2) / (2 * 6.0**2))
        return 10 * np.bincount(pair_owner, value, len(rows)) / (self._first[rows + 1] - self._first[rows])


def _ngrams(captions: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    # Every 1- to 4-gram as one integer, 16 bits a token: its caption and itself, and every caption's length,
    # which pycocoevalcap counts in bigrams.
    sizes = np.array([len(caption) for caption in captions], dtype=np.int64)
    tokens = np.fromiter(chain.from_iterable(captions), dtype=np.uint64, count=sizes.sum())
    owner = np.repeat(np.arange(len(captions)), sizes)
    owners, keys, key = [owner], [tokens], tokens
    for n in range(1, 4):
        key = (key[:-1] << np.uint64(16)) | tokens[n:]
        inside = owner[: len(key)] == owner[n:]
        owners.append(owner[: len(key)][inside])
        keys.append(key[inside])
    return np.concatenate(owners), np.concatenate(keys), np.maximum(sizes - 1, 0)


def _order(keys: np.ndarray) -> np.ndarray:
    return (keys >> np.uint64(16) > 0).astype(int) + (keys >> np.uint64(32) > 0) + (keys >> np.uint64(48) > 0)


def _norms(owner: np.ndarray, keys: np.ndarray, weight: np.ndarray, captions: int) -> np.ndarray:
    return np.sqrt(np.bincount(owner * 4 + _order(keys), weight**2, captions * 4)).reshape(captions, 4)


def _ranges(start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # The numbers of all ranges start[i]:stop[i], one after the other, and the i of each.
    sizes = stop - start
    owner = np.repeat(np.arange(len(sizes)), sizes)
    return owner, np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes - start, sizes)
