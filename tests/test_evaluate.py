import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from conftest import EIGHT, Output, draw_noise, write_split

from captioning import metrics
from captioning.captioner import Captioner
from captioning.checkpoint import read_description
from captioning.errors import InputError
from captioning.files import check_output
from captioning.training import train
from data_loader import CaptionDataset, find_split
from evaluate import evaluate, main, score_attributes


@pytest.fixture
def command(run_here: Callable[..., Output], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Output]:
    """Runs the command in this process, in a new folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_JAVA", ("no-java",))  # starting it takes seconds; test_metrics.py does

    def run(*arguments: object) -> Output:
        workers = () if "--references" in arguments else ("--workers", 0)
        return run_here("evaluate.py", lambda: tyro.cli(main), *arguments, *workers)

    return run


def test_captions_known_by_heart_score_highest(memorized: Path, eight: Path, cache: Path):
    captioner = Captioner.load(memorized)
    evaluation = evaluate(captioner, CaptionDataset(eight, "val", vocab=captioner.vocab, cache=cache), java=False)
    assert [evaluation.captions[i].text for i in sorted(evaluation.captions)] == list(EIGHT.values())
    assert evaluation.scores.metrics["Bleu_4"] == pytest.approx(1, abs=1e-3)
    assert evaluation.scores.metrics["ROUGE_L"] == pytest.approx(1)
    assert evaluation.attribute_accuracy == {}
    assert evaluation.seconds > 0
    assert evaluation.results() == [{"image_id": i, "caption": c.text} for i, c in evaluation.captions.items()]


def test_scenes_are_checked_against_what_was_drawn(trained: Path, drawn: Path, cache: Path):
    captioner = Captioner.load(trained)
    evaluation = evaluate(captioner, CaptionDataset(drawn, "test", vocab=captioner.vocab, cache=cache), java=False)
    assert {"thing", "colour", "setting"} <= set(evaluation.attribute_accuracy)
    assert all(0 <= accuracy <= 1 for accuracy in evaluation.attribute_accuracy.values())


def test_a_scene_of_another_form_is_not_checked(drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    shutil.copytree(drawn, tmp_path / "data")
    path = tmp_path / "data" / "annotations" / "captions_test.json"
    content = json.loads(path.read_text())

    def accuracy(scenes: list) -> dict:
        for image, scene in zip(content["images"], scenes, strict=False):
            image["scene"] = scene
        path.write_text(json.dumps(content))
        data = CaptionDataset(tmp_path / "data", "test", vocab_threshold=1, cache=tmp_path / "cache")
        return score_attributes(data, dict.fromkeys(data.image_ids.tolist(), "a dog"))

    truth = content["images"][0]["scene"]
    wrong = [None, "kitchen", 5, {}, [], {**truth, "others": 7}, {**truth, "kind": []}, {**truth, "colour": "pink"}]
    assert accuracy(wrong[:2])
    assert 'has an invalid "scene" of 2 images' in capsys.readouterr().err
    for scene in wrong:
        assert accuracy([scene] * len(content["images"])) == {}
    assert not capsys.readouterr().err


def test_only_the_first_images_with_a_limit(trained: Path, drawn: Path, cache: Path):
    captioner = Captioner.load(trained)
    data = CaptionDataset(drawn, "test", vocab=captioner.vocab, cache=cache)
    evaluation = evaluate(captioner, data, limit=3, java=False)
    assert list(evaluation.captions) == data.image_ids[:3].tolist()
    for limit in (0, -5):
        with pytest.raises(InputError, match=f"limit must be at least 1, not {limit}"):
            evaluate(captioner, data, limit=limit)


def test_json_is_one_document_with_what_was_promised(command: Callable, trained: Path, drawn: Path):
    code, output, _ = command("--model", trained, "--data", drawn, "--json")
    document = json.loads(output)
    assert code == 0
    metrics = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR"}
    assert metrics | {"photos", "photos_per_second"} <= set(document)
    assert document["photos"] == 8
    assert document["unreadable"] == 0
    epoch = read_description(trained).best_epoch
    assert [document[key] for key in ("model", "epoch", "data", "split")] == [str(trained), epoch, str(drawn), "test"]
    assert document["photos_per_second"] > 0


def test_the_table_is_for_people(command: Callable, trained: Path, drawn: Path):
    code, output, _ = command("--model", trained, "--data", drawn, "--split", "val")
    assert code == 0
    assert "CIDEr" in output
    assert "attribute accuracy" in output
    assert "8 images" in output


def test_written_results_get_the_same_scores(command: Callable, trained: Path, drawn: Path, tmp_path: Path):
    results = tmp_path / "results.json"
    _, first, _ = command("--model", trained, "--data", drawn, "--json", "--results", results)
    rows = json.loads(results.read_text())
    assert [set(row) for row in rows] == [{"image_id", "caption"}] * 8
    references = find_split(drawn, "test")[0]
    code, second, _ = command("--references", references, "--results", results, "--json")
    assert code == 0
    assert json.loads(second)["CIDEr"] == pytest.approx(json.loads(first)["CIDEr"])


def test_captions_in_a_file_of_results_are_kept(command: Callable, trained: Path, drawn: Path, tmp_path: Path):
    (tmp_path / "mine.json").write_text("mine")
    _, _, errors = command("--model", trained, "--data", drawn, "--results", "mine.json")
    assert "the earlier content of mine.json is now in mine.json.old\n" in errors
    command("--model", trained, "--data", drawn, "--results", "mine.json")
    assert {path.name for path in tmp_path.glob("mine*")} == {"mine.json", "mine.json.old"}
    assert (tmp_path / "mine.json.old").read_text() == "mine"
    assert len(json.loads((tmp_path / "mine.json").read_text())) == 8


def test_each_model_of_an_ensemble_is_named(command: Callable, trained: Path, drawn: Path):
    best = read_description(trained).best_epoch
    _, _, errors = command("--model", trained, "--model", trained, "--data", drawn)
    assert f"{trained} + {trained}, epoch {best} + epoch {best}, trained on" in errors


def test_the_data_of_each_model_of_an_ensemble_are_named(
    command: Callable, trained: Path, attending: Path, drawn: Path, tmp_path: Path
):
    shutil.copytree(trained, tmp_path / "other")
    description = json.loads((tmp_path / "other" / "captioner.json").read_text())
    description["data"]["folder"] = "data/other"
    (tmp_path / "other" / "captioner.json").write_text(json.dumps(description))
    first = read_description(trained).data["folder"]
    for model, named in ((tmp_path / "other", f"{first} + data/other"), (trained, first)):
        _, output, _ = command("--model", trained, "--model", model, "--data", drawn, "--json")
        assert json.loads(output)["trained_on"] == named


def test_captions_that_the_model_did_not_learn_from_make_none_novel(command: Callable, trained: Path, tmp_path: Path):
    for split in ("train", "val"):
        write_split(tmp_path / "data", split, {"a.png": ["a dog"], "b.png": ["a cat"]})
        for name in "ab":
            draw_noise(3).save(tmp_path / "data" / "images" / split / f"{name}.png")
    _, output, errors = command("--model", trained, "--data", tmp_path / "data", "--split", "val", "--json")
    assert json.loads(output)["novel"] is None
    assert "is not known to be the file that the model was trained on" in errors


def test_the_data_set_s_own_files_are_no_output(command: Callable, trained: Path, drawn: Path):
    path = drawn / "annotations" / "captions_test.json"
    whole = path.read_bytes()
    code, _, error = command("--model", trained, "--data", drawn, "--split", "test", "--results", path)
    assert code == 2
    assert "captions_test.json is a file of the data set; name another, or score it with --references" in error
    assert path.read_bytes() == whole
    assert not list(path.parent.glob("*.old"))


def test_a_split_without_public_captions_gives_the_results_file(command: Callable, trained: Path, tmp_path: Path):
    path = write_split(tmp_path / "data", "test2017", {"a.png": [], "b.png": []})
    path.rename(path.with_name("image_info_test2017.json"))
    for name in "ab":
        draw_noise(3).save(tmp_path / "data" / "images" / "test2017" / f"{name}.png")
    code, _, errors = command("--model", trained, "--data", tmp_path / "data")
    assert code == 0
    assert "captions_test_results.json" in errors
    rows = json.loads((tmp_path / "captions_test_results.json").read_text())
    assert [row["image_id"] for row in rows] == [1, 2]


def test_a_data_set_of_one_split_can_be_measured(command: Callable, trained: Path, tmp_path: Path):
    write_split(tmp_path / "data", "val", {"a.png": ["a dog"], "b.png": ["a cat"]})
    for name in "ab":
        draw_noise(3).save(tmp_path / "data" / "images" / "val" / f"{name}.png")
    code, output, errors = command("--model", trained, "--data", tmp_path / "data", "--split", "val", "--json")
    assert code == 0
    assert "the share of novel captions is not measured" in errors
    document = json.loads(output)
    assert (document["photos"], document["novel"]) == (2, None)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_a_mistake(command: Callable, trained: Path, drawn: Path, limit: int):
    code, _, errors = command("--model", trained, "--data", drawn, "--limit", limit)
    assert code == 2
    assert "limit" in errors


def test_what_is_evaluated_is_printed_first(command: Callable, trained: Path, drawn: Path):
    _, _, errors = command("--model", trained, "--data", drawn, "--split", "val", "--limit", 1)
    epoch = read_description(trained).best_epoch
    first = f"{trained}, epoch {epoch}, trained on scenes; evaluated on {drawn}, val split"
    assert errors.splitlines()[0] == first


def test_results_are_written_where_a_link_leads(command: Callable, trained: Path, drawn: Path, tmp_path: Path):
    (tmp_path / "results.json").symlink_to(tmp_path / "new" / "results.json")
    options = ("--data", drawn, "--split", "val", "--limit", 1, "--results", tmp_path / "results.json")
    assert command("--model", trained, *options)[0] == 0
    assert (tmp_path / "results.json").is_symlink()
    assert len(json.loads((tmp_path / "new" / "results.json").read_text())) == 1


def test_without_a_model_of_the_data_set_none_is_taken(command: Callable, trained: Path, drawn: Path, tmp_path: Path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine").symlink_to(trained)
    other = tmp_path / "drawings"
    other.symlink_to(drawn)
    assert command("--data", other)[0] == 0  # a link's name is not the data set's
    shutil.copytree(drawn / "annotations", tmp_path / "other" / "annotations")
    code, output, errors = command("--data", "other")
    assert (code, output) == (2, "")
    assert "no model in models/ was trained on other" in errors
    assert "--model (models/mine was trained on scenes)" in errors


def test_a_data_set_given_as_a_dot_has_its_folder_s_name(
    small: Callable, drawn: Path, tmp_path: Path, tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(drawn)
    folder = train(small(data=Path("."), num_epochs=1, image_size=32))
    assert read_description(folder).data["folder"] == drawn.name


def test_a_data_set_without_a_test_split_has_others_to_score(
    command: Callable, trained: Path, drawn: Path, tmp_path: Path
):
    data = tmp_path / drawn.name
    shutil.copytree(drawn, data)
    for path in (data / "annotations").glob("*_test*"):
        path.unlink()
    code, _, errors = command("--model", trained, "--data", data)
    assert (code, "there is a val split, which `evaluate.py --split val` scores" in errors) == (2, True)


def test_a_missing_data_set_is_named_before_a_missing_model(command: Callable):
    code, _, errors = command("--data", "absent")
    assert code == 2
    assert "absent does not exist" in errors


@pytest.mark.parametrize("place", ["file/r.json", "folder", "/dev/null", "x" * 300, "r.csv", "r.jsonl"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    place: str, command: Callable, trained: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(Captioner, "stream", None)
    code, _, errors = command("--model", trained, "--data", drawn, "--results", place)
    assert code == 2
    assert f"error: {place} " in errors
    assert not list(tmp_path.rglob("*.new"))


def test_results_whose_earlier_content_cannot_be_kept_are_refused_before_the_work(
    command: Callable, trained: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(path: Path) -> bytes:
        raise InputError(f"{path} cannot be read (Permission denied).")

    (tmp_path / "r.json").touch()
    monkeypatch.setattr("evaluate.read_bytes", refuse)
    monkeypatch.setattr(Captioner, "stream", None)
    code, _, errors = command("--model", trained, "--data", drawn, "--results", "r.json")
    assert (code, "r.json cannot be read (Permission denied)" in errors) == (2, True)


def test_the_folder_of_an_output_is_created(tmp_path: Path):
    check_output(tmp_path / "out" / "x.json")
    assert [path.name for path in tmp_path.rglob("*")] == ["out"]


def test_captions_are_written_before_they_are_scored(
    command: Callable, trained: Path, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise InputError("scoring fails")

    monkeypatch.setattr("evaluate.score", fail)
    code, _, errors = command("--model", trained, "--data", drawn, "--results", "out/r.json")
    assert (code, errors.splitlines()[-1]) == (2, "error: scoring fails")
    assert len(json.loads((tmp_path / "out" / "r.json").read_text())) == 8


@pytest.fixture
def damaged(drawn: Path, tmp_path: Path) -> Path:
    """The drawn data set with one of its test images broken and another one missing."""
    data = shutil.copytree(drawn, tmp_path / "damaged")
    first, second, *_ = sorted((data / "images" / "test").iterdir())
    first.write_bytes(b"no image")
    second.unlink()
    return data


def test_images_that_cannot_be_read_are_skipped_and_counted(command: Callable, trained: Path, damaged: Path):
    options = ("--model", trained, "--data", damaged, "--results", "r.json", "--skip-unreadable")
    code, output, errors = command(*options, "--json")
    document = json.loads(output)
    assert (code, document["photos"], document["unreadable"]) == (0, 6, 2)
    assert document["CIDEr"] is not None
    assert len(json.loads(Path("r.json").read_text())) == 6
    assert errors.count("skipped: ") == 2
    assert "6 images (2 skipped, which cannot be read)" in command(*options)[1]


def test_an_image_that_cannot_be_read_is_an_error_that_names_the_option(
    command: Callable, trained: Path, drawn: Path, damaged: Path
):
    code, _, errors = command("--model", trained, "--data", damaged)
    assert code == 2
    assert "1 of 8 images" in errors
    folder = damaged / "images" / "test"
    for name in {path.name for path in (drawn / "images" / "test").iterdir()} - {
        path.name for path in folder.iterdir()
    }:
        shutil.copy(drawn / "images" / "test" / name, folder / name)
    code, _, errors = command("--model", trained, "--data", damaged)
    assert code == 2
    assert "(--skip-unreadable evaluates without it)" in errors


def test_no_readable_image_is_an_error(command: Callable, trained: Path, damaged: Path):
    shutil.rmtree(damaged / "images" / "test")
    code, _, errors = command("--model", trained, "--data", damaged, "--skip-unreadable")
    assert code == 2
    assert "none of the 8 images can be read" in errors


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_a_results_file_of_a_part_of_the_images_says_so(command: Callable, tmp_path: Path):
    rows = [{"image_id": i, "caption": "a dog runs"} for i in (1, 2, 3)]
    references = write_json(tmp_path / "references.json", {"annotations": rows})
    results = write_json(tmp_path / "results.json", rows[:1])
    code, output, errors = command("--references", references, "--results", results, "--json")
    assert (code, json.loads(output)["photos"]) == (0, 1)
    assert "captions 1 of the 3 images" in errors
    assert "METEOR is missing because Java is missing" in errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ((), "--references needs --results"),
        (("--results", "r.json", "--limit", "3"), "--limit has no effect"),
        (("--results", "r.json", "--model", "m"), "--model has no effect"),
        (("--results", "r.json", "--skip-unreadable"), "--skip-unreadable has no effect"),
        (("--results", "r.json", "--workers", "1"), "--workers has no effect"),
        (("--results", "r.json", "--beam-size", "3"), "decoding options have no effect"),
        (("--results", "r.json"), "references.json cannot be read"),
    ],
)
def test_scoring_a_file_refuses_what_it_does_not_use(command: Callable, options: tuple[str, ...], says: str):
    code, output, errors = command("--references", "references.json", *options)
    assert (code, output) == (2, "")
    assert says in errors


def test_help_is_for_newcomers(command: Callable):
    code, output, _ = command("--help")
    assert code == 0
    assert output.count("python evaluate.py") == 2
    assert "metrics.score" not in output


def test_a_closed_standard_output_is_known_before_the_work(
    command: Callable, trained: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", None)
    code, _, errors = command("--model", trained, "--data", drawn)
    assert (code, "standard output is closed, so the scores cannot be printed" in errors) == (2, True)
