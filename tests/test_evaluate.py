import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro
from conftest import EIGHT, draw_noise, write_split

from captioning import metrics
from captioning.captioner import Captioner
from captioning.errors import InputError, run_command
from data_loader import CaptionDataset, find_split
from evaluate import check_scenes, evaluate, main


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, cache: Path, tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, in a new folder: its exit code, standard output and error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(metrics, "_JAVA", ("no-java",))  # starting it takes seconds; test_metrics.py does

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments), "--workers", "0"])
        code = 0
        try:
            run_command(lambda: tyro.cli(main))
        except SystemExit as end:
            code = int(end.code or 0)
        return (code, *capsys.readouterr())

    return run


def test_captions_known_by_heart_score_highest(memorised: Path, eight: Path, cache: Path):
    captioner = Captioner.load(memorised)
    found = evaluate(captioner, CaptionDataset(eight, "val", vocab=captioner.vocab, cache=cache), java=False)
    assert [found.captions[i].text for i in sorted(found.captions)] == list(EIGHT.values())
    assert found.scores.metrics["Bleu_4"] == pytest.approx(1, abs=1e-3)
    assert found.scores.metrics["ROUGE_L"] == pytest.approx(1)
    assert found.scenes == {}
    assert found.seconds > 0
    assert found.results() == [{"image_id": i, "caption": c.text} for i, c in found.captions.items()]


def test_scenes_are_checked_against_what_was_drawn(trained: Path, drawn: Path, cache: Path):
    captioner = Captioner.load(trained)
    found = evaluate(captioner, CaptionDataset(drawn, "test", vocab=captioner.vocab, cache=cache), java=False)
    assert {"thing", "colour", "setting"} <= set(found.scenes)
    assert all(0 <= share <= 1 for share in found.scenes.values())


def test_a_scene_that_is_none_is_one_sentence(drawn: Path, cache: Path):
    data = CaptionDataset(drawn, "test", cache=cache, vocab_threshold=1)
    first = int(data.image_ids[0])
    for scene in (5, {}, {"kind": "dog", "count": 1, "others": 7, "colour": None}, {"kind": []}):
        data.coco.imgs[first]["scene"] = scene
        with pytest.raises(InputError, match=rf"captions_test\.json says of image {first} what no drawn scene is"):
            check_scenes(data, {first: "a dog"})


def test_only_the_first_photos_with_a_limit(trained: Path, drawn: Path, cache: Path):
    captioner = Captioner.load(trained)
    data = CaptionDataset(drawn, "test", vocab=captioner.vocab, cache=cache)
    found = evaluate(captioner, data, limit=3, java=False)
    assert list(found.captions) == data.image_ids[:3].tolist()


def test_json_is_one_document_with_what_was_promised(command: Callable, trained: Path, drawn: Path):
    code, output, _ = command("--model", trained, "--data", drawn, "--json")
    document = json.loads(output)
    assert code == 0
    metrics = {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr", "METEOR"}
    assert metrics | {"photos", "photos_per_second"} <= set(document)
    assert document["photos"] == 8
    assert document["photos_per_second"] > 0


def test_the_table_is_for_people(command: Callable, trained: Path, drawn: Path):
    code, output, _ = command("--model", trained, "--data", drawn, "--split", "val")
    assert code == 0
    assert "CIDEr" in output
    assert "captions right about" in output
    assert "8 photos" in output


def test_results_are_written_and_scored_again(command: Callable, trained: Path, drawn: Path, tmp_path: Path):
    results = tmp_path / "results.json"
    _, first, _ = command("--model", trained, "--data", drawn, "--json", "--results", results)
    rows = json.loads(results.read_text())
    assert [set(row) for row in rows] == [{"image_id", "caption"}] * 8
    references = find_split(drawn, "test")[0]
    code, second, _ = command("--references", references, "--results", results, "--json")
    assert code == 0
    assert json.loads(second)["CIDEr"] == pytest.approx(json.loads(first)["CIDEr"])


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
    assert (code, errors) == (0, "")
    assert json.loads(output)["photos"] == 2


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_a_mistake(command: Callable, trained: Path, drawn: Path, limit: int):
    code, _, errors = command("--model", trained, "--data", drawn, "--limit", limit)
    assert code == 2
    assert "limit" in errors
