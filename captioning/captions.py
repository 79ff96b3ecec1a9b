"""Validate and clean captions, and parse a table cell that holds several."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from captioning.errors import InputError

MISSING = re.compile(  # spellings of a cell without a value, in lower case
    r"-?nan|none|null|n/a|na|<na>|nat|undefined|\\n|#na|#nv|#n/a n/a|loading\.\.\.|#(name|nombre)\?"
    r"|#(ref|bezug|value|wert|valor|div/0|null|num|zahl|error|spill|calc)!"
)
SPREADSHEET_ERROR = re.compile(r"#[¡¿]?[^\W\d_a-z][^\Wa-z]*(/0)?[!?]|#\w/\w")  # in any language, in capitals
REJECTED = ("is_rejected", "is_precanned")  # VizWiz's marks of captions that do not describe their image
MARKS = re.compile(  # of tutorials, tokenizers, HTML and annotation tools, such as "startseq a dog endseq"
    r"<(start|end|s|/s|bos|eos|sos|pad|unk|sep|image|person|br ?/?)>|<\|\w+\|>|\[(cls|sep|bos|eos|sos|pad|unk)\]"
    r"|</?(b|i|p|em|strong)>|\b(start|end|bos|eos|sos)seq\b|\[/EN#|&(#x?\w+|[a-z]{2,8});|\w ?\|[^|]+\| ?\w|\|{2,}|#{2,}"
    r"|\\[nrt\"',;]|\\u[0-9a-f]{4}|^(Negative prompt|Steps): |<a\s|<lora:|\*\*|^([-*•]|\d+[.)]) ",
    re.IGNORECASE,
)
MAY_BE_MARKED = re.compile(r"[<\[&|\\#*]|[^\x00-\x7f]|seq|^(neg|ste|[-\d])", re.IGNORECASE)  # found faster than marks
MISREAD = re.compile(  # letters that were decoded in a wrong encoding; capitals may stand before a punctuation mark
    "\ufffd|â€|(?<![A-ZÀ-Þ])Ã[\xa1-\xbfŸ„–œ]|(?<!\\w)Ã(?!\\w)"
)
# Letters of scripts without spaces between words: of Thai, Lao, Burmese, Khmer, Japanese and Chinese.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")
MAX_CAPTION = 5000  # maximum length in characters, since batches are padded to their longest caption
STRUCTURE = re.compile(  # one that need not be well-formed
    r"""\[+(['"]|np\.|array\(|list\(|(None|nan),).*\]|\((['"]|np\.).*['"]\)?,\s*(['"]|np\.).*\)|\{['"].*\}|array\(.*\)""",
    re.DOTALL,
)
BYTES = re.compile(r"""b(['"]).*\1""", re.DOTALL)
SERIES = re.compile(r"\bdtype: \w+$")  # the end of a column that pandas prints
NUMPY = {"np", ".", "str_", "array"}  # what NumPy prints around texts


def clean_caption(caption: Any, where: str) -> str:
    """Return the caption in one line with single spaces, or "" if it is missing.

    Raises `InputError` for a caption that is not text, is too long, or cannot be encoded.
    """
    if is_missing(caption):
        return ""
    require_text(caption, where)
    if len(caption) > MAX_CAPTION:
        raise InputError(f"{where}, has a caption of more than {MAX_CAPTION:,} characters; shorten it.")
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise InputError(f"{where}, has a caption with half of a surrogate pair; write the whole character.") from None
    return " ".join(caption.replace("_x000D_", " ").split())  # a line's end in Excel's files


def require_text(caption: Any, where: str) -> None:
    """Raise `InputError` for a caption that is not text, or that is a list or an object saved as text."""
    if not isinstance(caption, str) or is_structure(caption):
        raise InputError(f"{where}, has a caption that is not text: {caption!s:.80}; write text or a list of texts.")


def is_missing(caption: Any) -> bool:
    """Return whether a caption is null, NaN, a spelling of a missing value, or a text without a letter."""
    if not isinstance(caption, str):
        return caption is None or caption != caption
    text = caption.strip()
    if MISSING.fullmatch(text.lower()) or SPREADSHEET_ERROR.fullmatch(text):
        return True
    return not any(map(str.isalpha, text))


def may_be_captions(value: Any) -> bool:
    """Return whether a cell may hold captions rather than, say, their language."""
    if not isinstance(value, str):
        return isinstance(value, list)
    return (" " in value.strip() or UNSPACED.search(value) is not None) and not is_missing(value)


def find_marks(caption: str) -> str | None:
    """Describe, as a kind of entries of a `Report`, marks or misread letters in a caption; None if it has none."""
    if not MAY_BE_MARKED.search(caption):
        return None
    if MARKS.search(caption):
        return "caption{s} with marks such as <start>, which are learned as words"
    if _is_misread(caption):
        return "caption{s} with letters of a wrong encoding; save their file as UTF-8 anew"
    return None


def _is_misread(text: str) -> bool:
    """Return whether letters in UTF-8 were decoded in a wrong encoding.

    Then they can be encoded in it and decoded again. A single pair may be correct: a capital before an ellipsis.
    """
    for encoding in () if text.isascii() else ("cp1252", "latin-1"):
        with suppress(UnicodeError):
            if len(text) - len(text.encode(encoding).decode()) > 1:
                return True
    return MISREAD.search(text) is not None


def is_rejected(entry: Mapping[str, Any]) -> bool:
    """Return whether a caption's entry has one of VizWiz's marks, for a rejected caption or a ready-made one."""
    return any(str(entry[mark]).strip().lower() in ("true", "1", "1.0") for mark in REJECTED if mark in entry)


def split_lines(text: str) -> list[str]:
    """Split a text that holds a caption in each line; the line breaks are those of any system."""
    return re.split(r"[\r\n]+", text.strip())


def parse_captions(value: Any) -> list[Any]:
    """Parse the captions of a cell, which in CSV files of Flickr30k and of pandas may be a list written as text."""
    value = value.strip() if isinstance(value, str) else value
    if isinstance(value, str) and value[:1] + value[-1:] == "{}":  # Label Studio's several texts
        with suppress(ValueError, RecursionError):
            texts = json.loads(value).get("text")
            return texts if isinstance(texts, list) else [value]
    if isinstance(value, str) and (value[:1] + value[-1:] in ("[]", "()") or value.startswith("array(")):
        for parse in (json.loads, _parse_texts):
            try:
                texts = parse(value)
            except (ValueError, SyntaxError, RecursionError, tokenize.TokenError):
                continue
            if isinstance(texts, list) and all(isinstance(text, str) or is_missing(text) for text in texts):
                return texts
    return [value]


def is_structure(value: str) -> bool:
    """Return whether a text is an object, a list or bytes of Python's, of NumPy's or of JSON's, or a pandas column."""
    value = value.strip()
    if SERIES.search(value) or BYTES.fullmatch(value):
        return True
    if value[:1] + value[-1:] not in ("{}", "[]", "()", "a)"):
        return False
    for parse in (json.loads, ast.literal_eval):
        try:
            return isinstance(parse(value), dict | list | set | tuple)
        except TypeError:  # a set of dicts, such as {{}}
            return True
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return STRUCTURE.fullmatch(value) is not None


def _parse_texts(value: str) -> list[Any]:
    """Parse texts as Python prints them in a list, a tuple or a NumPy array, which has no commas between them."""
    texts: list[Any] = []
    end = None  # of the text before
    value = re.sub(r",\s*dtype=[^,()\[\]]*\)$", ")", value)
    for token in tokenize.generate_tokens(io.StringIO(value).readline):
        if token.type == tokenize.STRING:
            if token.start == end:
                raise ValueError("an apostrophe is doubled")  # as in SQL, where that is one text
            texts.append(ast.literal_eval(token.string))
            end = token.end
        elif token.string in ("None", "nan"):
            texts.append(None)
        elif token.string.strip() not in ("", "[", "]", "(", ")", ",", *NUMPY):
            raise ValueError(f"{token.string} is not text")
    return texts
