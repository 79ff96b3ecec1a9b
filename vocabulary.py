"""Tokenize captions, and convert words to indices and back."""

from __future__ import annotations

import functools
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from captioning.errors import InputError
from captioning.files import decode_text, read_bytes, require_access, web_address, write_file

if TYPE_CHECKING:
    from nltk.tokenize import NLTKWordTokenizer, TreebankWordDetokenizer

START, END, UNK = 0, 1, 2
START_WORD, END_WORD, UNK_WORD = "<start>", "<end>", "<unk>"
SPECIAL_WORDS = [START_WORD, END_WORD, UNK_WORD]
_BUILD_ONE = "build one without --vocab-from-file (in Python, vocab_from_file=False)"
DEFAULT_LENGTH = 20  # default maximum number of tokens of a generated caption, with <end>

# The soft hyphen, marks of direction, word joiners, variants of emoji, the byte order mark and others without a shape.
_INVISIBLE = re.compile("[\xad\u034f\u061c\u200e\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
_REPLACEMENTS = str.maketrans(
    # Word processors replace ' and " with these, but the tokenizer finds contractions and quotations by ' and " only.
    dict(zip("‘’‚“”„", "'''\"\"\"", strict=True)) | {"\N{ZERO WIDTH SPACE}": " "}  # which stands between words
)
# Punctuation that NLTK leaves at its word: of Arabic, Indian, Armenian, Ethiopic, Burmese, Khmer, Chinese and Spanish.
_ENDS = "…،؛؟۔।॥։՝።፣፤፥፦፧၊။។៕，、。！？；：）」』》〉】"
_BEGINNINGS = "¿¡（「『《〈【"
_PUNCTUATION = re.compile(rf"(?!(?<=\d)[，：،]\d)[{_BEGINNINGS}{_ENDS}]")  # but not those within a number
_SPACE = re.compile(f" (?=[{_ENDS}])|(?<=[{_BEGINNINGS}]) ")  # that decoding leaves out
_JOINERS = "\u200c\u200d"  # spelling needs them within words of many scripts
# With " in place of its own mark, before its last letter.
_HEBREW_ABBREVIATION = re.compile('(?<=[\u05d0-\u05ea])"(?=[\u05d0-\u05ea](?![\u05d0-\u05ea]))')
_ABBREVIATION = re.compile(r"(?:[a-z]\.)+|(?:st|ave|blvd|rd|dr|mr|mrs|ft|jr|vs)\.")
# Sentences to which NLTK's detokenizer does nothing: words, none of which was one word with the next ("can not").
_PLAIN = re.compile(r"(?!.*\b(?:can not|gim me|gon na|got ta|lem me|wan na)\b)\w+(?:[ -]\w+)*", re.DOTALL)


@functools.cache
def _nltk() -> tuple[NLTKWordTokenizer, TreebankWordDetokenizer]:
    """Import NLTK's tokenizer and detokenizer when the first caption is tokenized or written."""
    from nltk.tokenize import NLTKWordTokenizer, TreebankWordDetokenizer

    return NLTKWordTokenizer(), TreebankWordDetokenizer()


@functools.lru_cache(maxsize=1 << 18)
def _tokenize_chunk(chunk: str) -> tuple[str, ...]:
    chunk = chunk.strip(_JOINERS)
    if _ABBREVIATION.fullmatch(chunk):
        return (chunk,)
    tokens = (token.strip(_JOINERS) for token in _nltk()[0].tokenize(chunk))
    return tuple(filter(None, tokens))


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFC", _INVISIBLE.sub("", text))


def tokenize(caption: str) -> list[str]:
    """Split a caption into lower-case tokens with NLTK's word tokenizer, without its downloaded data.

    NLTK's sentence splitter needs a download, and without it the word tokenizer separates only the last full
    stop of a caption. Tokenizing each white-space separated chunk by itself separates all of them, and caching
    the chunks, most of which recur, makes this 40 times as fast. Tokens are in Unicode's composed form (NFC), without
    invisible characters.

        "A dog runs.  It's wet." -> ["a", "dog", "runs", ".", "it", "'s", "wet", "."]
    """
    if not isinstance(caption, str):
        raise InputError(f"a caption is text, not {caption!r:.80}.")
    text = _normalize(caption.lower().translate(_REPLACEMENTS))
    text = _HEBREW_ABBREVIATION.sub("\N{HEBREW PUNCTUATION GERSHAYIM}", text)
    text = _PUNCTUATION.sub(r" \g<0> ", text)
    return [token for chunk in text.split() for token in _tokenize_chunk(chunk)]


class Vocabulary:
    """The words that a model knows, by their indices; `<start>`, `<end>` and `<unk>` are 0, 1 and 2.

    Raises `InputError` where `words` is not a list of distinct strings that begins with these three.
    """

    def __init__(self, words: list[str]):
        if not isinstance(words, list) or words[:3] != SPECIAL_WORDS:
            raise InputError("a vocabulary is a list of words that begins with <start>, <end>, <unk>.")
        if not all(isinstance(word, str) and word for word in words) or len(set(words)) != len(words):
            raise InputError("the words of a vocabulary must be distinct strings, none of them empty.")
        self.words = words
        # Keys are as tokens are. Of two forms of one word in an older vocabulary, the first counts.
        self.index = {_normalize(words[i]): i for i in reversed(range(len(words)))}

    @classmethod
    def build(cls, captions: Iterable[str], threshold: int) -> Vocabulary:
        """Take every word that occurs at least `threshold` times in the captions, in order of first appearance.

        Raises `InputError` if there is none, and for a single text in place of captions.
        """
        if isinstance(captions, str):
            raise InputError("captions are a list of texts, not one text.")
        return cls.from_counts(Counter(token for caption in captions for token in tokenize(caption)), threshold)

    @classmethod
    def from_counts(cls, counts: dict[str, int], threshold: int) -> Vocabulary:
        """Take every word whose count is at least `threshold`, in the order of `counts`; raises as `build` does."""
        words = [word for word, count in counts.items() if count >= threshold and word not in SPECIAL_WORDS]
        if not words:
            raise InputError(
                f"no word occurs {threshold} times in the captions; lower --vocab-threshold (the most common "
                f"occurs {max(counts.values(), default=0)} times)."
            )
        return cls(SPECIAL_WORDS + words)

    def __len__(self) -> int:
        return len(self.words)

    def __iter__(self) -> Iterator[str]:
        return iter(self.words)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and _normalize(word) in self.index

    def __getitem__(self, word: str) -> int:
        """Return the word's index, or `UNK` for a word that is not in the vocabulary."""
        if not isinstance(word, str):
            raise InputError(f"a word is text, not {word!r:.80}; vocab.words[3] is the word whose index is 3.")
        return self.index.get(_normalize(word), UNK)

    def encode(self, caption: str) -> list[int]:
        """Convert a caption to indices, with `<start>` before them and `<end>` after them."""
        return [START, *(self.index.get(token, UNK) for token in tokenize(caption)), END]

    def tokens(self, indices: Iterable[int]) -> list[str]:
        """Convert indices to words, up to the first `<end>` and without special words.

        Raises `InputError` for an index without a word.
        """
        tokens = []
        for index in indices:
            if index == END:
                break
            if not 0 <= index < len(self.words):
                raise InputError(f"this vocabulary of {len(self):,} words has none with the index {index}.")
            if index not in (START, UNK):
                tokens.append(self.words[index])
        return tokens

    def decode(self, indices: Iterable[int]) -> str:
        """Convert indices to a sentence, up to the first `<end>`; punctuation joins the word before it."""
        tokens = self.tokens(indices)
        end = "." if tokens[-1:] == ["."] else ""
        words = " ".join(tokens[:-1] if end else tokens)
        if _PLAIN.fullmatch(words):  # importing NLTK would take a tenth of the time that a first caption takes
            return words + end
        return _SPACE.sub("", _nltk()[1].detokenize(tokens))

    def save(self, path: str | Path) -> None:
        """Write the words as a JSON list, atomically; raises `InputError` where that is impossible."""
        path = Path(path)
        if not path.name:
            raise InputError(f'a vocabulary cannot be written to "{path}"; name a file.')
        content = json.dumps(self.words, ensure_ascii=False, indent=0).encode()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{path.parent} cannot be created ({error.strerror}).") from None
        write_file(path, lambda file: file.write(content))

    @classmethod
    def load(cls, path: str | Path) -> Vocabulary:
        """Read a vocabulary written by `save`; raises `InputError` where it is missing or not a vocabulary."""
        if not os.path.exists(path):
            if not web_address(path):
                require_access(Path(path).parent)
            raise InputError(f"{path} does not exist; check the path, or {_BUILD_ONE}.")
        data = read_bytes(Path(path))
        if data.startswith(b"\x80"):
            raise InputError(
                f"{path} is a pickle; `python importers.py weights` converts it together with its weights."
            )
        text = decode_text(data, path)
        try:
            return cls(json.loads(text))
        except InputError as error:
            raise InputError(f"{path} is not a vocabulary: {error}") from None
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{path} cannot be read as a vocabulary, a JSON list of words ({error}); name one, or {_BUILD_ONE}."
            ) from None
