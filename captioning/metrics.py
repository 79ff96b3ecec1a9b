"""BLEU, METEOR, ROUGE-L and CIDEr of captions, as COCO's caption evaluation computes them (arXiv 1504.00325).

The numbers are pycocoevalcap's own. Two of its parts run in Java: the Penn Treebank (PTB) tokenizer and METEOR.
Without Java, and for scripts whose words PTB cuts, a tokenizer in Python replaces the former and METEOR is left out.
`cider.CiderD` is the same CIDEr, fast enough to be the reward of self-critical training.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import threading
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import SupportsFloat

import numpy as np
import regex
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from captioning.annotations import lacks_spaces, parse_image_id, read_captions
from captioning.captions import MARKS, is_structure
from captioning.errors import InputError, warn_once
from captioning.files import decode_text, require_regular
from captioning.tables import parse_json

METRICS = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
METEOR_IDLE = 60  # seconds after which an unused METEOR ends: it takes 10 seconds to start, and a gigabyte of memory
MAX_LOSSES = 0.1  # share of captions from which the PTB tokenizer may drop combining marks
METEOR_WORDS = 1000  # maximum words of a caption for METEOR, which takes seconds for 1,000 and minutes for 9,000

# METEOR parses numbers in the user's locale, and before Java 18, text is read in the locale's encoding.
_JAVA = ("java", "-Dfile.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")

# What references may have in place of the characters in captions of `vocabulary.tokenize`.
_AS_TYPED = str.maketrans({"\N{HEBREW PUNCTUATION GERSHAYIM}": '"', "‘": "'", "’": "'"})
_REPLACEMENTS = str.maketrans(
    {"“": '"', "”": '"', "´": "'", "`": "'", "–": "--", "—": "--", "…": "..."}
    | _AS_TYPED
    | {"½": "1/2", "¼": "1/4", "¾": "3/4", "£": "#", "€": "$"}
    | dict.fromkeys(["\N{SOFT HYPHEN}", *map(chr, range(0xFE00, 0xFE10))])  # emoji variation selectors
)
# pycocoevalcap drops the brackets' names in upper case only. As they are lower case by then, it keeps them as words.
_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PUNCTUATION = {*ptbtokenizer.PUNCTUATIONS, *'"«»‹›「」『』《》〈〉【】〔〕〜'}
# In `regex`, unlike in `re`, \w matches the combining marks and joiners within the words of many scripts.
_MARK = regex.compile(r"(?<=[\p{L}\p{M}])\p{M}")
_STRAY_JOINERS = regex.compile(r"(?<![\p{L}\p{M}\p{N}])\p{Join_Control}+|\p{Join_Control}+(?![\p{L}\p{M}\p{N}])")
_TOKEN = regex.compile(
    r"""
      \.?\d+(?:[:.,/]\d+)+ | \.\d+                          # 12:30, 1,000, 1/2, .5
    | (?<!\w)(?:[a-z]\.)+(?:[a-z](?!\w))?                  # t.v., u.s.a, j. crew
    | (?:st|ave|blvd|rd|dr|mr|mrs|ms|jr|ft|vs|etc|inc|co)\.  # abbreviations keep their full stop
    | [^\W\d_]+(?=n't\b) | n't\b | can(?=not\b)              # do n't, can not
    | 'n' | '(?:s|m|d|ll|re|ve)\b                            # rock 'n' roll, dog 's
    | \w+(?:[-/.'](?!(?:s|m|d|ll|re|ve)\b)\w+)*              # dog, wide-eyed, and/or, o'clock
    | <\w+> | [?!]{2,}
    | [^\s\w\p{C}\U00010000-\U0010FFFF]                     # punctuation; PTB drops emoji and control characters
    """,
    regex.VERBOSE,
)


@dataclass(frozen=True)
class Scores:
    """The metrics of a set of captions.

    metrics: the corpus value of each of METRICS, 0 to 1 (CIDEr: 0 to 10); METEOR is None if it was not run.
    per_caption: image id -> the same for that caption alone (without METEOR if it was not run). ROUGE_L and
        CIDEr of the corpus are the means of these; BLEU and METEOR pool their counts over the corpus.
    tokenizer: "PTB" (pycocoevalcap's, in Java) or "plain" (this module's).
    without_meteor: a sentence that says why METEOR was not run; None if it was run, or Java was not to be used.
    uncaptioned: number of images with references but no caption; they do not count.
    """

    metrics: dict[str, float | None]
    per_caption: dict[int, dict[str, float]]
    tokenizer: str
    without_meteor: str | None = None
    uncaptioned: int = 0


def tokenize_plain(caption: str) -> list[str]:
    """Split a caption into lower-case words without punctuation, as pycocoevalcap's PTB tokenizer does in Java."""
    text = unicodedata.normalize("NFC", caption.translate(_REPLACEMENTS)).lower()
    tokens: list[str] = _TOKEN.findall(_STRAY_JOINERS.sub("", " ".join(text.split())))
    return [_BRACKETS.get(token, token) for token in tokens if token not in _PUNCTUATION]


def _tokenize_ptb(captions: Sequence[str]) -> list[str]:
    # Through pipes, as PTBTokenizer.tokenize() writes into its package's folder, which may be read-only, and miscounts
    # lines if a caption contains one of Unicode's other line separators.
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [
        *_JAVA,
        "-cp",
        str(jar),
        "edu.stanford.nlp.process.PTBTokenizer",
        "-preserveLines",
        "-lowerCase",
    ]
    texts = (" ".join(caption.translate(_AS_TYPED).split()) for caption in captions)
    texts = (unicodedata.normalize("NFC", text) for text in texts)
    text = "".join(f"{text}\n" for text in texts).encode(errors="replace")
    lines = subprocess.run(command, input=text, capture_output=True, check=True).stdout.decode().split("\n")
    drop = set(ptbtokenizer.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in drop) for line in lines[:-1]]


def _tokenize(captions: Sequence[str], java: bool | None) -> tuple[list[str], str | None]:
    """Split captions into words with spaces between them; returns them, and why the tokenizer is not PTB if it is not.

    In many scripts, such as Kannada, Khmer and Tibetan, PTB drops vowel signs and takes each letter for a word.
    """
    why = "Java was not to be used"
    if java is not False:
        try:
            tokenized = _tokenize_ptb(captions)
            if sum(map(_lost_marks, captions, tokenized)) <= MAX_LOSSES * len(captions):
                return tokenized, None
            why = "the PTB tokenizer cuts words of these captions' script"
        except (OSError, subprocess.CalledProcessError) as error:
            if java:
                raise InputError(f"{_describe_java(error)}; install a Java runtime, or score without it.") from error
            why = _describe_java(error)
    return [" ".join(tokenize_plain(caption)) for caption in captions], why


def _describe_java(error: OSError | subprocess.CalledProcessError) -> str:
    """Describe why Java does not run: it is missing, or the first line of what it prints."""
    if isinstance(error, OSError):
        return "Java is missing"
    lines = [line.strip() for line in (error.stderr + error.stdout).decode(errors="replace").split("\n")]
    lines = [line for line in lines if line and not line.startswith("Picked up ")]  # environment variables
    return f"Java fails ({[*lines, f'exit code {error.returncode}'][0]:.200})"


def _check_texts(hypotheses: Mapping[int, str], references: Mapping[int, Sequence[str]]) -> None:
    """Raise `InputError` unless each image has one text as its caption, and a list of texts as its references."""
    for image, caption in hypotheses.items():
        if not isinstance(caption, str):
            raise InputError(f"the caption of image {image} has to be one text, not a {type(caption).__name__}.")
        group = references.get(image) or ()
        if isinstance(group, str) or not all(isinstance(reference, str) for reference in group):
            raise InputError(f"the references of image {image} have to be a list of texts.")


def _lost_marks(caption: str, tokenized: str) -> bool:
    """Return whether a caption has lost combining marks of its letters."""
    composed = unicodedata.normalize("NFC", caption.translate(_REPLACEMENTS))
    return len(_MARK.findall(composed)) > len(_MARK.findall(tokenized))


class _Meteor(meteor_package.Meteor):
    """pycocoevalcap's METEOR in a fixed locale, with a lock that errors release."""

    timer: threading.Timer  # ends it after its last use

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
            self.close()
            raise InputError("METEOR's Java stopped; give it 2 GB of memory, or score without it.") from error


_idle: list[_Meteor] = []  # for the next call of `score`


@contextmanager
def _running_meteor() -> Iterator[_Meteor]:
    """Start METEOR, or take the one of the last call; it is kept for `METEOR_IDLE` seconds for the next."""
    meteor = None
    with suppress(IndexError):
        meteor = _idle.pop()
        meteor.timer.cancel()
    if meteor is None or meteor.meteor_p.poll() is not None:
        meteor = _Meteor()
    try:
        yield meteor
    except BaseException:
        meteor.close()
        raise
    if meteor.meteor_p.poll() is None:
        meteor.timer = timer = threading.Timer(METEOR_IDLE, _end_idle, [meteor])
        timer.daemon = True
        _idle.append(meteor)  # from here on, another thread may use it, and set another timer
        timer.start()


def _end_idle(meteor: _Meteor) -> None:
    with suppress(ValueError):  # it is in use again
        _idle.remove(meteor)
        meteor.close()


@atexit.register
def _end_all_idle() -> None:
    while _idle:
        _idle.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # they are the parent's


def score(
    hypotheses: Mapping[int, str],
    references: Mapping[int, Sequence[str]],
    java: bool | None = None,
) -> Scores:
    """Score one caption per image (image id -> caption) against its references (image id -> captions).

    Images that are only in `references` are left out, as in pycocoevalcap's COCOEvalCap, and CIDEr takes its
    document frequencies from the references of the scored images. A caption or reference without a token counts as
    empty.

    java: None uses the PTB tokenizer and METEOR if Java runs, PTB keeps the captions' letters whole and no caption has
        more than METEOR_WORDS words; False does not start Java, which takes seconds; True requires both. METEOR's
        process serves later calls, and ends when there was none for METEOR_IDLE seconds.

    Raises `InputError` for no captions, an image without references, and if Java is required and fails.
    """
    if not hypotheses:
        raise InputError("there are no captions to score.")
    _check_texts(hypotheses, references)
    missing = [i for i in hypotheses if not references.get(i)]
    if missing:
        raise InputError(f"image {missing[0]} has no reference caption; score only images that have one.")

    # In the references' order, as in COCOEvalCap: the PTB tokenizer splits "K." or not depending on the next line.
    ids = [i for i in references if i in hypotheses]
    texts = [caption for i in ids for caption in references[i]]
    tokenized, why_plain = _tokenize([*texts, ".", *(hypotheses[i] for i in ids)], java)
    words = iter(tokenized)
    tokenized_references = {i: [next(words) for _ in references[i]] for i in ids}
    next(words)
    tokenized_hypotheses = {i: [next(words)] for i in ids}

    without_meteor = None
    if java is not False:
        without_meteor = _why_no_meteor(tokenized_references, tokenized_hypotheses, why_plain)
    if without_meteor and java:
        raise InputError(without_meteor)
    run_meteor = java is not False and not without_meteor
    # Where METEOR starts, which takes seconds, the other metrics are computed meanwhile.
    with _running_meteor() if run_meteor else nullcontext() as meteor_scorer:
        values = _score_in_python(tokenized_references, tokenized_hypotheses)
        if meteor_scorer is not None:
            try:
                values["METEOR"] = meteor_scorer.compute_score(tokenized_references, tokenized_hypotheses)
            except InputError as error:
                if java:
                    raise
                without_meteor = str(error)
    names = [name for name in METRICS if name in values]
    return Scores(
        metrics={name: float(values[name][0]) if name in values else None for name in METRICS},
        per_caption={i: {name: float(values[name][1][row]) for name in names} for row, i in enumerate(ids)},
        tokenizer="plain" if why_plain else "PTB",
        without_meteor=without_meteor,
        uncaptioned=sum(map(bool, references.values())) - len(ids),
    )


Tokenized = dict[int, list[str]]  # image id -> captions, each as words with spaces between them
Values = dict[str, tuple[SupportsFloat, Sequence[float] | np.ndarray]]  # metric -> of the corpus, of each caption


def _why_no_meteor(
    tokenized_references: Tokenized, tokenized_hypotheses: Tokenized, why_plain: str | None
) -> str | None:
    if why_plain:
        return f"METEOR is missing because {why_plain}; captions were split by the plain tokenizer."
    for image, captions in tokenized_references.items():
        if any(caption.count(" ") >= METEOR_WORDS for caption in [*captions, *tokenized_hypotheses[image]]):
            return f"METEOR is missing because a caption of image {image} has more than {METEOR_WORDS:,} words."
    return None


def _score_in_python(tokenized_references: Tokenized, tokenized_hypotheses: Tokenized) -> Values:
    """Compute all metrics but METEOR."""
    corpus, each = Bleu(4).compute_score(tokenized_references, tokenized_hypotheses, verbose=0)
    values: Values = {f"Bleu_{n}": pair for n, pair in enumerate(zip(corpus, each, strict=True), start=1)}
    _, rouge = Rouge().compute_score(tokenized_references, tokenized_hypotheses)
    rouge = rouge * [bool(caption) for (caption,) in tokenized_hypotheses.values()]  # else equal if both are empty
    values["ROUGE_L"] = rouge.mean(), rouge
    if len(tokenized_references) == 1:
        warn_once("CIDEr is 0 for a single image, as it weights n-grams by how few of the images have them.")
    if any(chain.from_iterable(tokenized_references.values())):
        values["CIDEr"] = Cider().compute_score(tokenized_references, tokenized_hypotheses)
    else:  # CIDEr needs an n-gram in the references
        values["CIDEr"] = 0.0, np.zeros(len(tokenized_references))
    return values


def read_references(path: str | Path) -> dict[int, list[str]]:
    """Read a COCO captions file: image id -> its captions as written; raises `InputError` that names a wrong entry."""
    references: dict[int, list[str]] = {}
    for image, caption in read_captions(Path(path)):
        references.setdefault(image, []).append(caption)
    return references


def _read_results(path: str | Path) -> dict[int, str]:
    """Read a COCO results file: image id -> its one caption."""
    form = '[{"image_id": 1, "caption": "..."}, ...]'
    require_regular(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a results file, {form}.") from error
    try:
        entries = parse_json(data)
    except (ValueError, RecursionError) as error:
        decode_text(data, path)  # raises if the file is, say, an archive or not in UTF-8
        raise InputError(f"{path} is not JSON ({error}); give a results file, {form}.") from error
    if not isinstance(entries, list) or not entries:
        held = "an empty list" if entries == [] else f"a JSON value of another type, {entries!r:.60}"
        raise InputError(f"{path} must be a list, {form}; it holds {held}.")
    hypotheses: dict[int, str] = {}
    for number, entry in enumerate(entries):
        try:
            image, caption = _parse_result(entry)
        except InputError as error:
            raise InputError(f"{path}: entry {number} {error}; give results as {form}.") from None
        if image in hypotheses:
            raise InputError(f"{path}: entry {number} captions image {image} again; keep one caption per image.")
        hypotheses[image] = caption
    return hypotheses


def _parse_result(entry: object) -> tuple[int, str]:
    """Parse an entry of a results file; a caption that is null or NaN is empty.

    Raises `InputError` with a predicate ("has ...") to follow the entry's name.
    """
    for key in ("image_id", "caption"):
        if not isinstance(entry, dict) or key not in entry:
            raise InputError(f'lacks "{key}": {entry!r:.80}')
    image, caption = parse_image_id(entry["image_id"]), entry["caption"]
    captions = caption if isinstance(caption, list) else [caption]
    if len(captions) != 1:
        raise InputError(f"has {len(captions)} captions of image {image}; keep one caption per image")
    if captions[0] is None or captions[0] != captions[0]:  # null, or NaN as pandas writes it
        return image, ""
    if not isinstance(captions[0], str) or is_structure(captions[0]):
        raise InputError(f'has a "caption" that is not text: {caption!r:.80}')
    return image, captions[0]


def score_results(references_file: str | Path, results_file: str | Path, java: bool | None = None) -> Scores:
    """Score a COCO results file, `[{"image_id": 1, "caption": "..."}, ...]`, against a COCO captions file.

    Only the images in the results count; `java` is that of `score`. Raises `InputError` that names the file and the
    entry for a missing or wrong one, an unknown image, and an image captioned twice.
    """
    references, hypotheses = read_references(references_file), _read_results(results_file)
    for image in hypotheses:
        if not references.get(image):
            raise InputError(
                f"{results_file}: image {image} has no caption with a word in {references_file}; name the references "
                "of its split, or remove it."
            )
    captions = chain(hypotheses.values(), *(references[image] for image in hypotheses))
    words = Counter(word for caption in captions for word in tokenize_plain(caption))
    if words and lacks_spaces(list(words), np.array(list(words.values()))):
        warn_once(
            f"{results_file}: captions have no spaces between words, so that each whole sentence counts as one word; "
            "split results and references into words first (as jieba, MeCab and PyThaiNLP do)."
        )
    if empty := [image for image, caption in hypotheses.items() if not caption.strip()]:
        warn_once(
            f"{results_file}: {len(empty):,} of {len(hypotheses):,} captions are empty, that of {empty[0]} first."
        )
    if mark := next(filter(None, map(MARKS.search, hypotheses.values())), None):
        warn_once(f"{results_file}: marks in captions, such as {mark[0]}, count as words; remove them first.")
    return score(hypotheses, references, java=java)


def format_table(scores: Scores) -> str:
    """Format the corpus metrics as a Markdown table that also reads well in a terminal; METEOR is "-" if not run."""
    rows = [(name, "-" if value is None else f"{value:.3f}") for name, value in scores.metrics.items()]
    lines = [f"| {name:<7} | {value:>5} |" for name, value in [("metric", "value"), (":------", "----:"), *rows]]
    return "\n".join([*lines, "", f"{len(scores.per_caption)} captions, {scores.tokenizer} tokenizer"])


def diversity(hypotheses: Mapping[int, str], training_captions: Iterable[str] | None) -> dict[str, float | None]:
    """Measure how varied captions (image id -> caption) are.

    Returns `vocabulary` (different words used), `novel` (share of captions not among the training captions, None
    without those), `distinct_captions` (different captions / captions), `distinct_1` and `distinct_2` (different
    n-grams / n-grams, arXiv 1510.03055), and `mean_length` (words per caption). Case and punctuation do not count.
    """
    if not hypotheses:
        raise InputError("there are no captions to measure.")
    if isinstance(training_captions, str):
        raise InputError("training_captions has to be several texts, not one text.")
    captions = [tuple(tokenize_plain(caption)) for caption in hypotheses.values()]
    different = set(captions)
    novel = None
    if training_captions is not None:
        known = {words for caption in training_captions if (words := tuple(tokenize_plain(caption))) in different}
        novel = sum(caption not in known for caption in captions) / len(captions)
    words = list(chain.from_iterable(captions))
    bigrams = [pair for caption in captions for pair in pairwise(caption)]
    return {
        "vocabulary": len(set(words)),
        "novel": novel,
        "distinct_captions": len(different) / len(captions),
        "distinct_1": len(set(words)) / max(len(words), 1),
        "distinct_2": len(set(bigrams)) / max(len(bigrams), 1),
        "mean_length": len(words) / len(captions),
    }
