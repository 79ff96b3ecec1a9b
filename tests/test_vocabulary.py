import json
import pickle
import re
from pathlib import Path

import pytest
from conftest import run_code
from nltk.tokenize import TreebankWordDetokenizer

from captioning.errors import InputError
from vocabulary import END, SPECIAL_WORDS, START, UNK, Vocabulary, tokenize

CAPTIONS = ["A dog runs.", "A cat, a dog and a man's bird.", "Isn't it a dog?"]


@pytest.fixture
def vocab() -> Vocabulary:
    return Vocabulary.build(CAPTIONS, threshold=1)


def test_typographic_quotation_marks_are_straight_ones():
    assert tokenize("A man’s hat isn’t “red”.") == tokenize("a man's hat isn't \"red\".")
    assert tokenize("l’homme") == tokenize("l'homme")


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("A cafe\u0301 E\u0301", ["a", "café", "é"]),
        ("do\xadg \ufeffdog do\ufeffg \u200e\u202adog\u202c \ufeff", ["dog"] * 4),
        ("dog\u200b \u200bdog dog\u200bdog \u200b", ["dog"] * 4),
        ("می\u200cخواهم \u200dsaw\u200c \u200d", ["می\u200cخواهم", "saw"]),  # joiners stay within a word only
        ('കുട്ടികള്\u200d, (saw\u200c). \u200d"dog"', ["കുട്ടികള്", ",", "(", "saw", ")", ".", "``", "dog", "''"]),
        ("❤️ 1\ufe0f\u20e3 do\u034fg", ["❤", "1\u20e3", "dog"]),
    ],
)
def test_words_that_look_the_same_are_the_same(caption: str, words: list[str]):
    assert tokenize(caption) == words


def test_words_of_an_older_vocabulary_with_invisible_characters_are_found():
    vocab = Vocabulary(["<start>", "<end>", "<unk>", "❤️", "do\u034fg"])
    assert vocab.encode("❤️ do\u034fg ❤ dog") == [START, 3, 4, 3, 4, END]
    assert "❤️" in vocab
    assert vocab["❤️"] == vocab["❤"] == 3


def test_a_hebrew_abbreviation_is_one_word():
    caption = 'חייל צה"ל עומד "כאן"'
    words = ["חייל", "צה״ל", "עומד", "``", "כאן", "''"]
    assert tokenize(caption) == words
    vocab = Vocabulary.build([caption], 1)
    assert vocab.decode(vocab.encode(caption)) == 'חייל צה״ל עומד "כאן"'
    assert tokenize('ה"סופר" "שלום"אבא')[:2] == ["ה", "''"]  # a quotation


def test_a_word_of_an_older_vocabulary_in_decomposed_form_is_found():
    vocab = Vocabulary(["<start>", "<end>", "<unk>", "cafe\u0301", "dog", "café"])
    assert vocab.encode("Café dog") == vocab.encode("Cafe\u0301 dog") == [START, 3, 4, END]


def test_a_caption_becomes_lower_case_tokens_with_punctuation_apart():
    assert tokenize("A man's dog, running.") == ["a", "man", "'s", "dog", ",", "running", "."]


def test_stray_newlines_and_double_spaces_separate_words_only():
    assert tokenize("A dog\n  runs \t fast\n") == ["a", "dog", "runs", "fast"]


def test_the_full_stop_of_a_first_sentence_is_a_token():
    assert tokenize("A dog runs. It is wet.") == ["a", "dog", "runs", ".", "it", "is", "wet", "."]


def test_abbreviations_keep_their_full_stops():
    assert tokenize("Mr. Smith of the U.S. at 5 p.m. today") == [
        *("mr.", "smith", "of", "the", "u.s.", "at", "5", "p.m.", "today")
    ]


def test_the_special_words_have_the_first_three_indices(vocab: Vocabulary):
    assert (vocab["<start>"], vocab["<end>"], vocab["<unk>"]) == (START, END, UNK) == (0, 1, 2)


def test_a_word_below_the_threshold_is_unknown():
    vocab = Vocabulary.build(CAPTIONS, threshold=2)
    assert vocab["dog"] > UNK
    assert vocab["bird"] == UNK
    assert vocab["zebra"] == UNK


def test_encode_puts_the_words_between_start_and_end(vocab: Vocabulary):
    indices = vocab.encode("A dog zooms.")
    assert indices == [START, vocab["a"], vocab["dog"], UNK, vocab["."], END]


@pytest.mark.parametrize(
    "caption",
    ["a dog runs.", "a cat, a dog and a man's bird.", "isn't it a dog?", "a dog, a cat."],
)
def test_decode_restores_the_punctuation_that_encode_took_apart(vocab: Vocabulary, caption: str):
    assert vocab.decode(vocab.encode(caption)) == caption


@pytest.mark.parametrize(
    "caption",
    [
        "a dog runs",
        "a t-shirt on a well-lit street.",
        "une fenêtre 日本 42.",
        "snake_case 2-3.",
        "a man cannot see.",
        "gimme that dog.",
        "a dog wanna run.",
        "lemme see",
        "it's gonna rain.",
        "i gotta go.",
        "gotta",
        ".",
        "a . dog.",
        "'tis a dog",
        "a dog - a cat",
        "a dog-- a cat.",
        'a "dog" runs.',
        "a dog...",
        "dog.)",
        "a (dog).",
        "a b. .",
        "",
    ],
)
def test_decode_writes_what_nltks_detokenizer_does(caption: str):
    tokens = tokenize(caption)
    vocab = Vocabulary([*SPECIAL_WORDS, *dict.fromkeys(tokens)])
    assert vocab.decode([vocab[token] for token in tokens]) == TreebankWordDetokenizer().detokenize(tokens)


def test_words_and_a_full_stop_are_decoded_without_nltk():
    words = [*SPECIAL_WORDS, "a", "dog", "."]
    code = f"import sys, vocabulary; print(vocabulary.Vocabulary({words}).decode([3, 4, 5]), 'nltk' in sys.modules)"
    assert run_code(code).stdout == "a dog. False\n"


def test_a_vocabulary_holds_and_lists_its_words(vocab: Vocabulary):
    assert "dog" in vocab
    assert "zebra" not in vocab
    assert 4 not in vocab
    assert list(vocab) == vocab.words


def test_one_text_is_not_taken_for_captions_of_a_letter_each():
    with pytest.raises(InputError, match="captions are a list of texts, not one text"):
        Vocabulary.build("a dog runs", 1)


@pytest.mark.parametrize("index", [-1, -100, 10**6])
def test_an_index_without_a_word_is_refused(vocab: Vocabulary, index: int):
    with pytest.raises(InputError, match=f"has none with the index {index}"):
        vocab.decode([START, index])


def test_decode_stops_at_the_first_end_and_drops_special_words(vocab: Vocabulary):
    indices = [START, vocab["a"], UNK, vocab["dog"], END, vocab["cat"], END]
    assert vocab.decode(indices) == "a dog"


def test_a_saved_vocabulary_is_json_and_loads_the_same(vocab: Vocabulary, tmp_path: Path):
    path = tmp_path / "folder" / "vocab.json"
    vocab.save(path)
    assert json.loads(path.read_text()) == vocab.words
    assert Vocabulary.load(path).words == vocab.words
    assert [p.name for p in path.parent.iterdir()] == ["vocab.json"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_vocabulary_in_another_unicode_encoding_is_read(vocab: Vocabulary, tmp_path: Path, encoding: str):
    (tmp_path / "vocab.json").write_text(json.dumps([*vocab.words, "café"], ensure_ascii=False), encoding=encoding)
    assert Vocabulary.load(tmp_path / "vocab.json").words == [*vocab.words, "café"]


@pytest.mark.parametrize("name", ["file/vocab.json", "a" * 300, f"{'a' * 300}/vocab.json"])
def test_a_vocabulary_that_cannot_be_written(vocab: Vocabulary, tmp_path: Path, name: str):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be (written|created) \("):
        vocab.save(tmp_path / name)
    with pytest.raises(InputError, match=r'cannot be written to "\."; name a file'):
        vocab.save("")


def test_a_threshold_that_leaves_no_word_is_a_mistake_that_names_the_highest_useful_one():
    with pytest.raises(InputError, match=r"lower --vocab-threshold .*occurs 5 times"):
        Vocabulary.build(CAPTIONS, threshold=6)


def test_real_captions_leave_no_token_with_white_space_or_a_full_stop_stuck_to_it(shared: Path):
    annotations = json.loads((shared / "captions_val2017.json").read_text())["annotations"]
    captions = [annotation["caption"] for annotation in annotations]
    assert any("\n" in text for text in captions)
    assert any("  " in text for text in captions)
    vocab = Vocabulary.build(captions, threshold=1)
    words = vocab.words[3:]
    assert not [word for word in words if re.search(r"\s", word)]
    stuck = [word for word in words if re.search(r"[a-z0-9]\.$", word)]
    abbreviation = re.compile(r"([a-z]\.)+|st\.|ave\.|blvd\.|rd\.|dr\.|mrs?\.|ft\.|jr\.|vs\.")
    assert not [word for word in stuck if not abbreviation.fullmatch(word)]
    frequent = Vocabulary.build(captions, threshold=5)
    assert len(frequent) < 0.5 * len(vocab)
    assert frequent.encode(captions[0]) == [START, *(frequent[word] for word in tokenize(captions[0])), END]


def test_a_pickled_vocabulary_is_pointed_to_its_importer(tmp_path):
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(InputError, match=r"vocab\.pkl is a pickle; `python importers\.py weights` converts it"):
        Vocabulary.load(tmp_path / "vocab.pkl")


@pytest.mark.parametrize(
    ("caption", "tokens", "written"),
    [
        ("कुत्ता दौड़ रहा है।", ["कुत्ता", "दौड़", "रहा", "है", "।"], "कुत्ता दौड़ रहा है।"),
        ("كلب يجري، ثم ينام؟", ["كلب", "يجري", "،", "ثم", "ينام", "؟"], "كلب يجري، ثم ينام؟"),
        ("¿Qué hace el perro?", ["¿", "qué", "hace", "el", "perro", "?"], "¿qué hace el perro?"),
        ("一只 狗，在 跑。", ["一只", "狗", "，", "在", "跑", "。"], "一只 狗， 在 跑。"),
        ("a dog… runs", ["a", "dog", "…", "runs"], "a dog… runs"),
        ("Ինչո՞ւ է վազում։", ["ինչո՞ւ", "է", "վազում", "։"], "ինչո՞ւ է վազում։"),
        ("3、4 个 5。3 只", ["3", "、", "4", "个", "5", "。", "3", "只"], "3、 4 个 5。 3 只"),
        ("5，000 人 12：30", ["5，000", "人", "12：30"], "5，000 人 12：30"),
    ],
)
def test_punctuation_of_any_script_is_a_token_of_its_own(caption: str, tokens: list[str], written: str):
    assert tokenize(caption) == tokens
    vocab = Vocabulary.build([caption], 1)
    assert vocab.decode(vocab.encode(caption)) == written


@pytest.mark.parametrize("caption", [None, float("nan"), 3])
def test_a_caption_that_is_not_text_is_refused(vocab: Vocabulary, caption: object):
    with pytest.raises(InputError, match=f"a caption is text, not {caption}"):
        Vocabulary.build(["a dog", caption], 1)
    with pytest.raises(InputError, match=f"a caption is text, not {caption}"):
        vocab.encode(caption)


def test_an_index_is_not_a_word(vocab: Vocabulary):
    with pytest.raises(InputError, match=r"a word is text, not 3; vocab\.words\[3\] is the word"):
        vocab[3]  # pyright: ignore[reportArgumentType]
