from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conftest import run_code
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor import meteor as meteor_package
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer

from captioning import metrics
from captioning.cider import CiderD
from captioning.errors import InputError, warn_once
from captioning.metrics import METRICS, diversity, format_table, score, score_results, tokenize_plain
from vocabulary import Vocabulary

CAPTIONS = Path(__file__).parents[2] / "shared" / "data" / "captions_val2017.json"
JAR_FOLDER = Path(ptbtokenizer.__file__).parent

REFERENCES = {
    7: ["A brown dog runs on the beach.", "The dog is running along the sand.", "A dog at the sea!"],
    3: ["Two men ride horses down a dirt road.", "A pair of riders on horseback."],
    5: ["A red bus is parked near the man's house.", "A big red bus (parked)."],
    9: ["A plate of food with broccoli and rice.", "Rice, broccoli and meat on a plate.", "A meal"],
}
HYPOTHESES = {
    3: "two men are riding horses on a road",
    7: "a brown dog runs on the sand.",
    9: "a plate of broccoli and rice",
    5: "a bus parked in front of a house",
}


def coco_captions():
    if not CAPTIONS.exists():
        pytest.skip("../shared/data/captions_val2017.json is absent")
    return json.loads(CAPTIONS.read_text(encoding="utf-8"))


def first_against_rest(images):
    """The first photos: the first caption of each as its result, its other captions as its references."""
    dataset = coco_captions()
    dataset["images"] = dataset["images"][:images]
    ids = {image["id"] for image in dataset["images"]}
    hypotheses, others = {}, []
    for annotation in dataset["annotations"]:
        if annotation["image_id"] in ids:
            if annotation["image_id"] in hypotheses:
                others.append(annotation)
            else:
                hypotheses[annotation["image_id"]] = annotation["caption"]
    dataset["annotations"] = others
    return dataset, [{"image_id": image, "caption": caption} for image, caption in hypotheses.items()]


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def official_and_ours(tmp_path_factory):
    """COCOEvalCap without SPICE, and score_results in a German locale, of 500 photos, two captions empty.

    One run for several tests, because METEOR takes seconds to start.
    """
    dataset, results = first_against_rest(500)
    from pycocoevalcap import eval as official
    from pycocotools.coco import COCO

    class NoSpice:
        def compute_score(self, references, hypotheses):
            return 0.0, [0.0] * len(references)

        def method(self):
            return "SPICE"

    started = []

    class RecordedPopen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    folder = tmp_path_factory.mktemp("coco")
    results[10]["caption"] = results[20]["caption"] = ""
    references_file = write(folder / "captions.json", dataset)
    results_file = write(folder / "results.json", results)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(official, "Spice", NoSpice)
        # Its tokenizer writes into its package's folder, which may be read-only.
        jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
        (folder / jar.name).symlink_to(jar)
        patch.setattr(ptbtokenizer, "__file__", str(folder / "ptbtokenizer.py"))
        coco = COCO(str(references_file))
        evaluation = official.COCOEvalCap(coco, coco.loadRes(str(results_file)))
        evaluation.evaluate()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LC_ALL", "C")
        patch.setenv("JAVA_TOOL_OPTIONS", "-Duser.language=de -Duser.country=DE")
        patch.setattr(subprocess, "Popen", RecordedPopen)
        write(results_file, results[::-1])
        files = set(JAR_FOLDER.iterdir())
        patch.setattr(metrics, "METEOR_IDLE", 0)
        ours = score_results(references_file, results_file)
    for process in started:
        process.wait(10)
    return evaluation, ours, started, set(JAR_FOLDER.iterdir()) - files


def test_results_file_scores_as_cocoevalcap(official_and_ours):
    evaluation, ours, _, _ = official_and_ours
    assert ours.tokenizer == "PTB"
    assert ours.metrics == pytest.approx({name: evaluation.eval[name] for name in METRICS}, abs=1e-9)


def test_every_caption_scores_as_in_cocoevalcap(official_and_ours):
    evaluation, ours, _, _ = official_and_ours
    assert len(ours.per_caption) == 500
    for image, row in evaluation.imgToEval.items():
        assert ours.per_caption[image] == pytest.approx({name: row[name] for name in METRICS}, abs=1e-9)


def test_java_leaves_no_process_and_no_file(official_and_ours):
    _, _, started, new_files = official_and_ours
    assert len(started) == 2
    assert all(process.returncode is not None and process.stdout.closed for process in started)
    assert not new_files


def test_one_meteor_serves_several_calls_and_ends_with_their_process():
    """One that has died, or that raised an error, is replaced."""
    code = """
import sys
from contextlib import suppress
from captioning import metrics

def run(error=None):
    with suppress(ZeroDivisionError), metrics._running_meteor() as meteor:
        if error is not None:
            raise error
    return meteor.meteor_p

metrics._JAVA = (sys.executable, "-c", "import time; time.sleep(99)")
first = run()
assert run() is first
first.kill()
first.wait()
second = run()
assert second is not first
assert run(ZeroDivisionError()) is second
assert second.poll() is not None
third = run()
assert third is not second
print(third.pid)
"""
    pid = int(run_code(code).stdout)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.java
def test_standard_output_stays_clean(capfd):
    score(HYPOTHESES, REFERENCES)
    assert capfd.readouterr() == ("", "")


@pytest.mark.java
def test_plain_tokenizer_agrees_with_ptb():
    captions = [annotation["caption"] for annotation in coco_captions()["annotations"]]
    theirs = metrics._tokenize_ptb(captions)
    assert len(theirs) == len(captions) == 25014
    agree = sum(tokenize_plain(mine) == ptb.split() for mine, ptb in zip(captions, theirs, strict=True))
    assert agree / len(captions) > 0.9997


def test_plain_tokenizer_splits_as_the_treebank_does():
    caption = "It's a “wide-eyed” dog's\nO'Clock, isn't it?  (12:30 on 5th St.) T.V. … and/or"
    words = "it 's a wide-eyed dog 's o'clock is n't it -lrb- 12:30 on 5th st. -rrb- t.v. and/or"
    assert tokenize_plain(caption) == words.split()


# Words with combining marks and joiners, and characters that are no words, split by spaces and "।" alone.
SCRIPTS = {
    "hindi": ("एक कुत्ता समुद्र तट पर दौड़ता है।", "एक कुत्ता समुद्र तट पर दौड़ता है ।"),
    "bengali": ("একটি কুকুর ঘাসের উপর দৌড়াচ্ছে", "একটি কুকুর ঘাসের উপর দৌড়াচ্ছে"),
    "thai": ("สุนัขสีแดง วิ่งบนชายหาด", "สุนัขสีแดง วิ่งบนชายหาด"),
    "vowelled arabic": ("اَلْكَلْبُ يَجْرِي", "اَلْكَلْبُ يَجْرِي"),
    "stressed russian": ("Соба́ка бежи́т.", "соба́ка бежи́т"),
    "decomposed french": ("Une cre\u0300me bru\u0302le\u0301e", "une crème brûlée"),
    "turkish": ("İki köpek", "i̇ki köpek"),
    "soft hyphen": ("a won\u00adderful dog", "a wonderful dog"),
    "invisible": ("\ufeffa\u200bdog\x00 \x1bruns\u200c", "a dog runs"),
    "one letter and a full stop": ("잔디 위. и я.", "잔디 위 и я"),
    "quotation marks": ("un panneau « stop », 『 停 』 〜 › 〈〔", "un panneau stop 停"),
    "emoji": ("a ❤️ dog 👨\u200d👩\u200d👧 🇩🇪 👍🏽", "a ❤ dog"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_plain_tokenizer_keeps_words_of_other_scripts_whole(name):
    caption, words = SCRIPTS[name]
    assert tokenize_plain(caption) == unicodedata.normalize("NFC", words).split()


@pytest.mark.java
def test_an_apostrophe_counts_like_a_typewriter_s():
    references = {1: ["l’enfant d’un voisin court dans l’eau"], 2: ["O’Neil’s dog runs ‘fast’"]}
    results = {1: "l'enfant d'un voisin court dans l'eau", 2: "O'Neil's dog runs 'fast'"}
    metrics = score(results, references).metrics
    assert metrics["Bleu_4"] == pytest.approx(1)
    assert metrics["CIDEr"] == pytest.approx(10)


@pytest.mark.java
def test_plain_tokenizer_agrees_with_ptb_in_other_scripts():
    captions = [caption for caption, _ in SCRIPTS.values()]
    for mine, theirs in zip(captions, metrics._tokenize_ptb(captions), strict=True):
        assert tokenize_plain(mine) == theirs.split()


@pytest.mark.parametrize("word", ["می\u200cخواهم", "क्\u200dष"])
def test_joiners_stay_within_words_and_vanish_around_them(word):
    assert tokenize_plain(f"\u200c{word}\u200d . \u200d {word}") == [word, word]


def test_words_with_other_marks_are_other_words():
    references = {i: ["एक कुत्ता समुद्र तट पर दौड़ता है"] for i in (1, 2)}
    wrong = score(dict.fromkeys(references, "ऐक कितो समिद्रि तेट पुर दोड़ती हो"), references, java=False)
    assert wrong.metrics["Bleu_1"] == pytest.approx(0, abs=1e-3)
    right = score({i: captions[0] for i, captions in references.items()}, references, java=False)
    assert right.metrics["Bleu_4"] == pytest.approx(1)


UNCUT = {
    "Kannada": "ಒಬ್ಬ ಹುಡುಗಿ ಕೆಂಪು ಚೆಂಡು",
    "Sinhala": "රතු බෝලයක් සමඟ ගැහැණු ළමයෙක්",
    "Khmer": "ក្មេង ស្រី លេង បាល់",
    "Malayalam": "ഒരു പെൺകുട്ടി ചുവന്ന പന്തുമായി",
}


@pytest.mark.java
@pytest.mark.parametrize("script", UNCUT)
def test_the_plain_tokenizer_takes_the_place_of_one_that_cuts_words(script: str):
    captions = {1: "a dog", 2: UNCUT[script]}
    scores = score(captions, {i: [text] for i, text in captions.items()})
    assert scores.tokenizer == "plain"
    assert "METEOR is missing because the PTB tokenizer cuts words of these captions' script" in scores.without_meteor
    with pytest.raises(InputError, match="PTB tokenizer cuts words"):
        score(captions, {i: [text] for i, text in captions.items()}, java=True)


@pytest.mark.parametrize("java", [False, pytest.param(None, marks=pytest.mark.java)])
def test_a_hebrew_abbreviation_scores_as_it_was_written(java: bool | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "METEOR_WORDS", 0)  # no METEOR, which takes seconds
    captions = {1: 'חייל צה"ל עומד ליד כלב', 2: "כלב רץ על הדשא"}
    vocab = Vocabulary.build(captions.values(), 1)
    written = {i: vocab.decode(vocab.encode(text)) for i, text in captions.items()}
    scores = score(written, {i: [text] for i, text in captions.items()}, java=java)
    assert scores.metrics["Bleu_4"] == pytest.approx(1)


@pytest.mark.java
def test_single_words_of_such_a_script_do_not_change_the_tokenizer(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "METEOR_WORDS", 0)  # no METEOR, which takes seconds
    captions = {i: "a dog" for i in range(10)} | {10: UNCUT["Kannada"], 11: "a ❤️ and 1️⃣"}
    assert score(captions, {i: [text] for i, text in captions.items()}).tokenizer == "PTB"


@pytest.mark.java
def test_ptb_keeps_every_caption_on_its_line():
    captions = ["", "a\u2028dog\r\nruns\n", "\n", "...", "a cat.", "a *NL* b", "", ""]
    assert metrics._tokenize_ptb(captions) == ["", "a dog runs", "", "", "a cat", "a * nl * b", "", ""]


def test_meteor_is_kept_from_its_last_use_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics, "_JAVA", (sys.executable, "-c", "import time; time.sleep(99)"))
    monkeypatch.setattr(metrics, "_idle", [])
    with metrics._running_meteor() as meteor:
        pass
    first = meteor.timer
    assert first.is_alive()
    with metrics._running_meteor() as same:
        assert same is meteor
        assert first.finished.is_set()  # it would end the process soon after its second use
    assert meteor.timer.is_alive()
    meteor.timer.cancel()
    metrics._idle.pop().close()


@pytest.mark.java
def test_a_dead_meteor_costs_no_other_metric_and_does_not_hang(monkeypatch):
    monkeypatch.setattr(meteor_package, "METEOR_JAR", "absent.jar")
    monkeypatch.setattr(metrics, "_idle", [])
    scores = score(HYPOTHESES, REFERENCES)
    assert scores.metrics["METEOR"] is None
    assert scores.metrics["CIDEr"] > 0
    assert "METEOR's Java stopped" in scores.without_meteor
    with pytest.raises(InputError, match="METEOR's Java stopped"):
        score(HYPOTHESES, REFERENCES, java=True)


@pytest.mark.java
@pytest.mark.parametrize("long_one", ["hypothesis", "reference"])
def test_a_caption_too_long_for_meteor_costs_no_other_metric(long_one, monkeypatch):
    monkeypatch.setattr(metrics, "_Meteor", None)
    words = "a red ball " * 3000
    hypotheses = HYPOTHESES | ({5: words} if long_one == "hypothesis" else {})
    references = REFERENCES | ({5: [words]} if long_one == "reference" else {})
    scores = score(hypotheses, references)
    assert scores.metrics["METEOR"] is None
    assert "a caption of image 5 has more than 1,000 words" in scores.without_meteor
    assert scores.metrics["ROUGE_L"] > 0
    with pytest.raises(InputError, match="image 5"):
        score(hypotheses, references, java=True)


@pytest.mark.java
def test_meteor_of_empty_captions_and_references():
    references = {1: ["..."], 2: ["", "a dog runs on the grass"], 3: ["a cat | sleeps ||| here"], 4: ["..."]}
    scores = score({1: "a dog", 2: "a dog runs on the grass", 3: "a cat | sleeps ||| here", 4: "!"}, references)
    meteor = {i: row["METEOR"] for i, row in scores.per_caption.items()}
    assert meteor == pytest.approx({1: 0, 2: 1, 3: 1, 4: 0})


def test_without_java_the_plain_tokenizer_scores_and_meteor_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    scores = score(HYPOTHESES, REFERENCES)
    assert scores.tokenizer == "plain"
    assert scores.metrics["METEOR"] is None
    assert "Java" in scores.without_meteor
    assert all("METEOR" not in row for row in scores.per_caption.values())
    with pytest.raises(InputError, match="Java"):
        score(HYPOTHESES, REFERENCES, java=True)


@pytest.mark.skipif(os.name == "nt", reason="Windows runs no shell scripts")
@pytest.mark.parametrize("stream", ["", ">&2"])
def test_why_java_fails_is_said(monkeypatch, tmp_path, stream):
    lines = "echo 'Picked up _JAVA_OPTIONS: -Xmx1g' >&2\necho 'Could not reserve enough space' " + stream
    (tmp_path / "java").write_text(f"#!/bin/sh\n{lines}\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert "Java fails (Could not reserve enough space)" in score(HYPOTHESES, REFERENCES).without_meteor
    with pytest.raises(InputError, match=r"Java fails \(Could not reserve enough space\); install a Java runtime"):
        score(HYPOTHESES, REFERENCES, java=True)


@pytest.mark.parametrize(
    ("hypotheses", "references", "says"),
    [
        ({1: ["a dog"]}, {1: ["a dog"]}, "the caption of image 1 has to be one text, not a list"),
        ({1: None}, {1: ["a dog"]}, "the caption of image 1 has to be one text, not a NoneType"),
        ({1: "a dog"}, {1: "a dog"}, "the references of image 1 have to be a list of texts"),
        ({1: "a dog"}, {1: ["a dog", None]}, "the references of image 1 have to be a list of texts"),
    ],
)
def test_captions_of_another_type_are_a_sentence(hypotheses, references, says):
    with pytest.raises(InputError, match=says):
        score(hypotheses, references, java=False)


def test_one_text_as_training_captions_is_a_sentence():
    with pytest.raises(InputError, match="training_captions has to be several texts"):
        diversity({1: "a dog"}, "a dog")


@pytest.mark.java
def test_plain_and_ptb_scores_are_nearly_the_same(monkeypatch):
    monkeypatch.setattr(metrics, "METEOR_WORDS", 0)  # no METEOR, which takes seconds
    dataset, results = first_against_rest(1000)
    references = {}
    for annotation in dataset["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    hypotheses = {row["image_id"]: row["caption"] for row in results}
    plain = score(hypotheses, references, java=False)
    ptb = score(hypotheses, references)
    assert (plain.tokenizer, ptb.tokenizer) == ("plain", "PTB")
    assert plain.metrics == pytest.approx(ptb.metrics, abs=1e-3)


def test_java_can_be_left_out_for_speed(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    scores = score(HYPOTHESES, REFERENCES, java=False)
    assert (scores.tokenizer, scores.without_meteor) == ("plain", None)


def test_scores_are_pycocoevalcaps():
    scores = score(HYPOTHESES, REFERENCES, java=False)
    truth = {i: [" ".join(tokenize_plain(c)) for c in REFERENCES[i]] for i in sorted(REFERENCES)}
    result = {i: [" ".join(tokenize_plain(HYPOTHESES[i]))] for i in sorted(REFERENCES)}
    bleu, _ = Bleu(4).compute_score(truth, result, verbose=0)
    assert [scores.metrics[f"Bleu_{n}"] for n in range(1, 5)] == pytest.approx(bleu)
    assert scores.metrics["ROUGE_L"] == pytest.approx(Rouge().compute_score(truth, result)[0])
    assert scores.metrics["CIDEr"] == pytest.approx(Cider().compute_score(truth, result)[0])


def test_corpus_rouge_and_cider_are_the_means_of_the_captions():
    scores = score(HYPOTHESES, REFERENCES, java=False)
    for name in ("ROUGE_L", "CIDEr"):
        values = [row[name] for row in scores.per_caption.values()]
        assert scores.metrics[name] == pytest.approx(np.mean(values))


def test_order_of_captions_does_not_matter():
    reordered = {i: HYPOTHESES[i] for i in sorted(HYPOTHESES)}
    assert score(reordered, REFERENCES, java=False) == score(HYPOTHESES, REFERENCES, java=False)


def test_perfect_captions_score_one():
    scores = score({i: captions[0] for i, captions in REFERENCES.items()}, REFERENCES, java=False)
    assert [scores.metrics[f"Bleu_{n}"] for n in range(1, 5)] == pytest.approx([1] * 4)
    assert scores.metrics["ROUGE_L"] == pytest.approx(1)


@pytest.mark.parametrize("java", [False, pytest.param(None, marks=pytest.mark.java)])
def test_empty_captions_score_nothing_and_do_not_crash(java, monkeypatch):
    monkeypatch.setattr(metrics, "METEOR_WORDS", 0)  # no METEOR, which takes seconds
    scores = score(HYPOTHESES | {3: "", 5: " ... "}, REFERENCES, java=java)
    assert all(value == pytest.approx(0, abs=1e-6) for i in (3, 5) for value in scores.per_caption[i].values())
    nothing = score(dict.fromkeys(REFERENCES, ""), REFERENCES, java=java)
    measured = [value for value in nothing.metrics.values() if value is not None]
    assert measured == pytest.approx([0] * len(measured), abs=1e-6)


@pytest.mark.parametrize("java", [False, pytest.param(None, marks=pytest.mark.java)])
def test_references_without_a_word_score_nothing_and_do_not_crash(java, monkeypatch):
    monkeypatch.setattr(metrics, "METEOR_WORDS", 0)  # no METEOR, which takes seconds
    scores = score({1: "a dog", 2: "..."}, {1: ["..."], 2: ["\N{RABBIT}", "!"]}, java=java)
    values = [value for row in scores.per_caption.values() for value in row.values()]
    values += [value for value in scores.metrics.values() if value is not None]
    assert values == pytest.approx([0] * len(values), abs=1e-3)


def test_an_image_without_references_is_an_input_error():
    with pytest.raises(InputError, match="image 4"):
        score({4: "a dog"}, REFERENCES, java=False)
    with pytest.raises(InputError, match="image 3"):
        score(HYPOTHESES, REFERENCES | {3: []}, java=False)


def test_no_captions_is_an_input_error():
    with pytest.raises(InputError, match="no captions"):
        score({}, REFERENCES)


RESULT = {"image_id": 7, "caption": "a dog"}
ANNOTATIONS = [{"image_id": i, "caption": c} for i, group in REFERENCES.items() for c in group]


@pytest.mark.parametrize(
    ("results", "says"),
    [
        (None, "results.json cannot be read"),
        ("[{", "results.json is not JSON"),
        ('{"image_id": 7, "caption": "a"}\n{"image_id": 3, "caption": "b"}\n', r"is not JSON \(Extra data: line 2"),
        (b'[{"image_id": 7, "caption": "caf\xe9"}]', "results.json, line 1, is not UTF-8 text .*; save it as UTF-8"),
        ('[{"image_id": 7, "caption": "a", "caption": "b"}]', r"results.json is not JSON \('caption' occurs twice"),
        (RESULT, r"results.json must be a list, .*; it holds a JSON value of another type, \{'image_id': 7"),
        ([], "results.json must be a list, .*; it holds an empty list"),
        (
            [RESULT, {"image_id": 8, "caption": "a"}],
            "results.json: image 8 has no caption with a word in .*captions.json",
        ),
        ([RESULT, RESULT], "results.json: entry 1 captions image 7 again"),
        ([RESULT, {"image_id": "7", "caption": "a"}], "results.json: entry 1 captions image 7 again"),
        ([RESULT, {"image_id": 3}], 'results.json: entry 1 lacks "caption"'),
        (
            [{"id": 7, "caption": "a dog"}],
            r'results.json: entry 0 lacks "image_id".*; give results as \[{"image_id": 1,',
        ),
        ([{"image_id": [7], "caption": "a dog"}], r"entry 0 has an image id that is not a whole number: \[7\]"),
        ([{"image_id": 7.5, "caption": "a dog"}], "entry 0 has an image id that is not a whole number: 7.5"),
        (
            [{"image_id": 2.0**53, "caption": "a dog"}],
            "image id that a floating-point number rounds: 9007199254740992.0",
        ),
        ([{"image_id": True, "caption": "a dog"}], "entry 0 has an image id that is not a whole number: True"),
        ([{"image_id": 7, "caption": 5}], 'entry 0 has a "caption" that is not text: 5'),
        ([{"image_id": 7, "caption": ["a", "b"]}], "entry 0 has 2 captions of image 7"),
        ([{"image_id": 7, "caption": []}], "entry 0 has 0 captions of image 7"),
        (["a dog"], "entry 0 lacks \"image_id\": 'a dog'"),
    ],
)
def test_a_wrong_results_file_is_named(tmp_path, results, says):
    references_file = write(tmp_path / "captions.json", {"annotations": ANNOTATIONS})
    results_file = tmp_path / "results.json"
    if isinstance(results, bytes):
        results_file.write_bytes(results)
    elif results is not None:
        write(results_file, results)
    with pytest.raises(InputError, match=says):
        score_results(references_file, results_file, java=False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_ids_and_captions_whose_meaning_is_plain_are_read_in_any_encoding(tmp_path, encoding):
    entries = [{"image_id": float(i), "caption": list(group)} for i, group in REFERENCES.items()]
    references_file, results_file = tmp_path / "captions.json", tmp_path / "results.json"
    references_file.write_text(json.dumps({"annotations": entries}, ensure_ascii=False), encoding=encoding)
    rows = [{"image_id": str(i), "caption": [caption]} for i, caption in HYPOTHESES.items()]
    results_file.write_text(json.dumps(rows, ensure_ascii=False), encoding=encoding)
    assert score_results(references_file, results_file, java=False) == score(HYPOTHESES, REFERENCES, java=False)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ([], 'captions.json is not a COCO .* no list of "annotations"'),
        ({"images": []}, 'captions.json is not a COCO .* no list of "annotations"'),
        ({"annotations": 3}, 'captions.json is not a COCO .* no list of "annotations"'),
        ({"annotations": [{"id": 1}]}, r'captions.json: annotations\[0\] lacks "image_id"'),
        (
            {"annotations": [{"image_id": 1, "caption": 3}]},
            r'captions.json: annotations\[0\] has a "caption" that is not',
        ),
        (
            '{"annotations": [{"image_id": 7, "caption": "a", "caption": "b"}]}',
            r"captions.json is not a COCO annotation file: it has 'caption' twice in annotations\[0\]",
        ),
        (
            {"annotations": [{"image_id": "x", "caption": "a"}]},
            r"captions.json: annotations\[0\] has an image id that is",
        ),
        (
            {"annotations": [{"image_id": 7, "caption": "..."}]},
            "results.json: image 7 has no caption with a word in .*captions.json",
        ),
    ],
)
def test_a_wrong_references_file_is_named(tmp_path, document, says):
    with pytest.raises(InputError, match=says):
        score_results(write(tmp_path / "captions.json", document), write(tmp_path / "results.json", [RESULT]))


def test_only_the_images_in_the_results_count(tmp_path):
    references_file = write(tmp_path / "captions.json", {"annotations": ANNOTATIONS})
    some = {i: HYPOTHESES[i] for i in (7, 9)}
    results_file = write(tmp_path / "r.json", [{"image_id": i, "caption": c} for i, c in some.items()])
    scores = score_results(references_file, results_file, java=False)
    assert scores.uncaptioned == 2
    assert scores.metrics == score(some, {i: REFERENCES[i] for i in some}, java=False).metrics


@pytest.mark.parametrize("missing", [None, [None], math.nan, ""])
def test_a_missing_caption_of_a_results_file_is_empty(tmp_path, missing):
    references_file = write(tmp_path / "captions.json", {"annotations": ANNOTATIONS})
    hypotheses = {**HYPOTHESES, 7: ""}
    results = [{"image_id": i, "caption": c if i != 7 else missing} for i, c in hypotheses.items()]
    scores = score_results(references_file, write(tmp_path / "r.json", results), java=False)
    assert scores.metrics == score(hypotheses, REFERENCES, java=False).metrics


def test_table_is_markdown_with_three_decimals():
    lines = format_table(score(HYPOTHESES, REFERENCES, java=False)).splitlines()
    assert lines[:2] == ["| metric  | value |", "| :------ | ----: |"]
    assert [line.split("|")[1].strip() for line in lines[2:9]] == list(METRICS)
    assert lines[6] == "| METEOR  |     - |"
    assert len(lines[2].split("|")[2].strip()) == len("0.123")
    assert lines[-1] == "4 captions, plain tokenizer"


def test_diversity_counts_what_it_says():
    variety = diversity({1: "A dog runs.", 2: "a dog runs", 3: "a cat"}, ["A dog runs!", "two cats"])
    assert variety == pytest.approx(
        {
            "vocabulary": 4,
            "novel": 1 / 3,
            "distinct_captions": 2 / 3,
            "distinct_1": 4 / 8,
            "distinct_2": 3 / 5,
            "mean_length": 8 / 3,
        }
    )


def test_novelty_is_unknown_without_training_captions():
    assert diversity({1: "a dog"}, None)["novel"] is None


def test_diversity_of_empty_captions_is_nothing():
    assert diversity({1: "", 2: "."}, [])["distinct_2"] == 0
    with pytest.raises(InputError):
        diversity({}, [])


def test_cider_d_equals_the_score_of_coco_captions():
    dataset, results = first_against_rest(300)
    references = {}
    for annotation in dataset["annotations"]:
        references.setdefault(annotation["image_id"], []).append(annotation["caption"])
    hypotheses = {row["image_id"]: row["caption"] for row in results}
    scores = score(hypotheses, references, java=False)
    scorer = CiderD({i: [tokenize_plain(caption) for caption in group] for i, group in references.items()})
    mine = scorer(list(hypotheses), [tokenize_plain(caption) for caption in hypotheses.values()])
    np.testing.assert_allclose(mine, [scores.per_caption[i]["CIDEr"] for i in hypotheses], rtol=0, atol=1e-9)


def test_marks_and_empty_captions_in_results_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture):
    document = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a cat on a table"}]}
    (tmp_path / "captions.json").write_text(json.dumps(document))
    for caption in ("<start> a cat <end>", "a cat", None, " "):
        warn_once.cache_clear()
        (tmp_path / "results.json").write_text(json.dumps([{"image_id": 1, "caption": caption}]))
        score_results(tmp_path / "captions.json", tmp_path / "results.json", java=False)
        told = capsys.readouterr().err
        assert ("marks in captions, such as <start>, count as words" in told) == (caption == "<start> a cat <end>")
        assert ("1 of 1 captions are empty, that of 1 first" in told) == (caption in (None, " "))


def test_sentences_without_spaces_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture):
    document = {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "一只猫坐在桌子上"}]}
    references, results = tmp_path / "captions.json", tmp_path / "results.json"
    references.write_text(json.dumps(document), encoding="utf-8")
    for caption, warned in (("一只猫坐在桌子旁", True), ("a cat", False)):
        warn_once.cache_clear()
        results.write_text(json.dumps([{"image_id": 1, "caption": caption}]), encoding="utf-8")
        document["annotations"][0]["caption"] = "a cat on a table"
        score_results(references, results, java=False)
        assert ("captions have no spaces between words" in capsys.readouterr().err) == warned
        references.write_text(json.dumps(document), encoding="utf-8")
