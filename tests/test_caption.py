import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from conftest import EIGHT, Output, draw_noise, run_code
from PIL import Image

import caption as caption_module
from caption import main
from captioning import bulk, export, listing
from captioning.backbones import Preprocessing
from captioning.captioner import Caption, Captioner, Decoding
from captioning.checkpoint import load_model
from captioning.decoding import greedy
from captioning.errors import InputError
from captioning.features import BATCH
from captioning.figures import draw_attention
from captioning.images import ImageDataset, build_transform
from captioning.listing import find_images


@pytest.fixture(scope="module")
def captioner(memorized: Path) -> Captioner:
    return Captioner.load(memorized)


@pytest.fixture
def image_paths(eight: Path) -> list[Path]:
    return [eight / "images" / "val" / name for name in EIGHT]


def test_different_pictures_get_different_captions(captioner: Captioner, image_paths: list[Path]):
    texts = [caption.text for caption in captioner(image_paths)]
    assert len(set(texts)) == len(image_paths)


def test_a_reloaded_model_captions_as_before(memorized: Path, image_paths: list[Path]):
    before, after = Captioner.load(memorized)(image_paths), Captioner.load(memorized)(image_paths)
    assert [(c.text, c.log_probability) for c in before] == [(c.text, c.log_probability) for c in after]


def test_the_caption_is_what_the_networks_give_image_by_image(
    memorized: Path, image_paths: list[Path], captioner: Captioner
):
    encoder, decoder, vocab, description = load_model(memorized)
    pictures = ImageDataset(image_paths, build_transform(image_size=description.preprocessing.image_size))
    for index, caption in enumerate(captioner(image_paths)):
        with torch.no_grad():
            hypothesis = greedy(decoder, encoder(pictures[index][None]))[0]
        assert caption.text == vocab.decode(hypothesis.tokens)
        assert caption.tokens == vocab.tokens(hypothesis.tokens)


def test_one_image_or_many_paths_or_pictures(captioner: Captioner, image_paths: list[Path]):
    text = captioner(image_paths[0])[0].text
    assert captioner(str(image_paths[0]))[0].text == text
    assert captioner(Image.open(image_paths[0]))[0].text == text
    assert [c.text for c in captioner(iter([Image.open(image_paths[0]), image_paths[0]]))] == [text, text]
    assert captioner([]) == []


def test_more_images_than_a_batch_keep_their_order(captioner: Captioner, image_paths: list[Path]):
    many = image_paths * 5
    texts = [caption.text for caption in captioner(many)]
    assert texts == texts[:8] * 5


def test_the_log_probability_is_the_sentence_s(captioner: Captioner, image_paths: list[Path]):
    for caption in captioner(image_paths, beam_size=3):
        assert -20 < caption.log_probability <= 0
        assert not math.isnan(caption.log_probability)


def test_where_the_decoder_looked_for_each_word(captioner: Captioner, image_paths: list[Path]):
    caption = captioner(image_paths[0])[0]
    if not captioner.decoder.attends:
        assert caption.attention is None
        with pytest.raises(InputError, match="--decoder attention"):
            draw_attention(image_paths[0], caption, Preprocessing(64))
        return
    assert caption.attention.shape == (len(caption.tokens), 4)
    torch.testing.assert_close(caption.attention.sum(1), torch.ones(len(caption.tokens)), rtol=0.02, atol=0.02)
    figure = draw_attention(image_paths[0], caption, Preprocessing(64))
    assert [axes.get_title() for axes in figure.axes][: len(caption.tokens) + 1] == ["image", *caption.tokens]


def test_alternatives_come_after_the_best(captioner: Captioner, image_paths: list[Path]):
    caption = captioner(image_paths[0], beam_size=4, alternatives=3)[0]
    texts = [caption.text, *(other.text for other in caption.alternatives)]
    assert len(set(texts)) == len(texts) == 4
    ranks = [each.log_probability / (len(each.tokens) + 1) for each in (caption, *caption.alternatives)]
    assert ranks == sorted(ranks, reverse=True)


def test_drawn_captions_repeat_with_their_seed(captioner: Captioner, image_paths: list[Path]):
    how = Decoding(temperature=3.0, seed=5, alternatives=2)
    first, repeated = captioner(image_paths, how), captioner(image_paths, how)
    assert first[0].text == repeated[0].text
    assert len(first[0].alternatives) == 2
    assert first[0].text != captioner(image_paths, temperature=3.0, seed=6)[0].text


def test_an_image_that_cannot_be_read_is_named(captioner: Captioner, image_paths: list[Path], tmp_path: Path):
    (tmp_path / "bad.jpg").write_text("no photo")
    with pytest.raises(InputError, match=r"bad\.jpg"):
        captioner([image_paths[0], tmp_path / "bad.jpg"])
    failed: dict[int, InputError] = {}
    sources = [image_paths[0], tmp_path / "bad.jpg", image_paths[1]]
    captions = list(captioner.stream(sources, Decoding(), unreadable=failed.__setitem__))
    assert [index for index, _ in captions] == [0, 2]
    assert list(failed) == [1]


def test_a_folder_stands_for_its_images_in_name_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("b.jpg", "a.PNG", "c.txt", "d.pdf", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "deeper.jpg").mkdir()
    expected = [tmp_path / "a.PNG", tmp_path / "b.jpg", tmp_path / "x.jpg"]
    assert find_images([tmp_path, tmp_path / "x.jpg"]) == expected
    monkeypatch.setattr(listing, "NAMES_PER_SCAN", 1)  # scanned again for every name
    assert find_images([tmp_path, tmp_path / "x.jpg"]) == expected
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds no images"):
        find_images([tmp_path / "empty"])


# The command line


@pytest.fixture
def command(run_here: Callable[..., Output]) -> Callable[..., Output]:
    """Runs the command in this process."""
    return partial(run_here, "caption.py", lambda: tyro.cli(main))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Forty photos and ten files that are none."""
    for i in range(40):
        draw_noise(i).save(tmp_path / f"{i:02}.png")
    for i in range(10):
        (tmp_path / f"{4 * i:02}-bad.png").write_bytes((tmp_path / "00.png").read_bytes()[: 5 * i])
    return tmp_path


def test_one_image_gives_one_sentence(command: Callable, trained: Path, image_path: Path):
    expected = Captioner.load(trained, precision="fp32")(image_path)[0].text
    output = command(image_path, "--model", trained, "--precision", "fp32")
    assert output == (0, f"{expected}\n", f"{trained}, backbone in fp32\n")


@pytest.mark.parametrize("options", [(), ("--json",), ("--output", "captions.jsonl")])
def test_the_models_and_the_precision_that_auto_took_are_named(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple
):
    monkeypatch.chdir(tmp_path)
    code, _, err = command(image_path, "--model", trained, "--model", trained, *options)
    assert code == 0
    assert f"{trained} + {trained}, backbone in {Captioner.load(trained).precision}\n" in err


def test_json_is_one_document_in_the_order_given(command: Callable, trained: Path, image_path: Path, drawn: Path):
    folder = drawn / "images" / "val"
    code, output, _ = command(folder, image_path, "--model", trained, "--json")
    rows = json.loads(output)
    assert code == 0
    assert [row["photo"] for row in rows] == [*map(str, sorted(folder.iterdir())), str(image_path)]
    assert all(set(row) == {"photo", "caption", "log_probability", "precision"} for row in rows)


@pytest.mark.slow
def test_an_undecodable_name_is_printed_escaped(trained: Path, image_path: Path, tmp_path: Path):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(image_path, tmp_path / name)
    script = Path(caption_module.__file__)
    arguments = [script, image_path, tmp_path / name, "--model", trained, "--precision", "fp32"]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, f"{trained}, backbone in fp32\n")
    assert "caf\\udce9.png: " in done.stdout


@pytest.mark.parametrize("json_", [False, True])
def test_ten_bad_images_cost_no_other_its_caption(command: Callable, trained: Path, album: Path, json_: bool):
    code, output, errors = command(album, "--model", trained, *(["--json"] if json_ else []))
    assert code == 2
    assert (len(json.loads(output)) if json_ else len(output.splitlines())) == 40
    _model, *lines = errors.splitlines()
    assert len(lines) == 11
    assert [f"{4 * i:02}-bad.png" in line for i, line in enumerate(lines[:10])] == [True] * 10
    assert lines[10] == "error: 10 of 50 images could not be read; 40 are captioned."


def test_strict_stops_at_the_first_bad_image(command: Callable, trained: Path, album: Path):
    code, output, errors = command(album, "--model", trained, "--strict")
    assert code == 2
    assert output == ""
    _model, line = errors.splitlines()
    assert "00-bad.png" in line


def test_strict_keeps_the_captions_before_a_bad_image(command: Callable, trained: Path, album: Path, image_path: Path):
    images = [image_path] * BATCH + [album / "00-bad.png"]
    code, output, _ = command(*images, "--model", trained, "--strict", "--json")
    assert code == 2
    assert len(json.loads(output)) == BATCH


def test_a_closed_standard_output_loses_no_caption(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sys, "stdout", None)
    code, _, errors = command(image_path, "--model", trained)
    assert (code, errors.split(",")[0]) == (2, "error: standard output is closed")
    code, _, _ = command(image_path, "--model", trained, "--output", tmp_path / "captions.jsonl")
    assert code == 0
    assert len((tmp_path / "captions.jsonl").read_text().splitlines()) == 1


def test_a_sheet_is_drawn(command: Callable, trained: Path, image_path: Path, tmp_path: Path):
    code, _, errors = command(image_path, "--model", trained, "--sheet", tmp_path / "new" / "sheet.png")
    assert code == 0
    assert "sheet.png" in errors
    assert Image.open(tmp_path / "new" / "sheet.png").width > 300


def test_attention_is_drawn(command: Callable, attending: Path, image_path: Path, tmp_path: Path):
    code, _, _ = command(image_path, "--model", attending, "--attention", tmp_path / "attention.png")
    assert code == 0
    assert Image.open(tmp_path / "attention.png").width > 300


def test_mistakes_are_one_sentence_each(command: Callable, trained: Path, image_path: Path, tmp_path: Path):
    for arguments, expected in (
        ([image_path, "--model", tmp_path], r"is not a trained model's folder"),
        ([tmp_path / "no.jpg", "--model", trained], "no.jpg does not exist"),
        ([image_path, "--model", trained, "--attention", tmp_path / "a.png"], "--decoder attention"),
        ([image_path, "--model", trained, "--max-length", 0], "max_length is 0"),
        ([image_path, "--model", trained, "--temperature", 1, "--seed", 99999999999999999999], "seed is out of range"),
        ([image_path, "--model", trained, "--temperature", 1, "--seed=-1"], "seed is out of range"),
        ([image_path, "--model", trained, "--workers=-1"], "--workers must be at least 0"),
        (["https://example.org/a.jpg", "--model", trained], "https://example.org/a.jpg is a web address, and nothing"),
        (["a" * 300, "--model", trained], "File name too long"),
        (["file:///a.jpg", "--model", trained], "file:///a.jpg is an address; name the path itself"),
        ([image_path, "", "--model", trained], "an argument is empty"),
        ([image_path, "--model", trained, "--sheet", tmp_path / "s.jpg"], "s.jpg does not end in .png, but figures"),
        ([image_path, "--model", trained, "--attention", tmp_path / "s"], "name it s.png."),
        ([image_path, "--model", trained, "--output", tmp_path / "c.json"], "c.json would hold JSON Lines, not .json"),
        ([image_path, "--model", "a" * 5000], "aa does not exist"),
        ([image_path, "--model", "photos"], "photos does not exist; did you mean models/photos?"),
        (
            [image_path, "--model", trained, "--output", tmp_path / "c.CSV"],
            "c.CSV would hold JSON Lines, not .CSV; name a",
        ),
        (
            [image_path, "--model", trained, "--output", tmp_path / "c.jsonl.gz"],
            "c.jsonl.gz would hold JSON Lines, not .gz; name a",
        ),
    ):
        code, _, errors = command(*arguments)
        assert code == 2
        assert expected in errors
        assert "Traceback" not in errors


@pytest.mark.parametrize("option", ["--sheet", "--attention", "--export", "--output"])
@pytest.mark.parametrize("name", ["photo.jpg", "photo.png"])
def test_a_photo_that_takes_the_place_of_an_output_is_not_replaced(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, option: str, name: str
):
    draw_noise(0).save(tmp_path / name)
    before = (tmp_path / name).read_bytes()
    code, _, errors = command(
        *([] if option == "--export" else [image_path]), "--model", trained, option, tmp_path / name
    )
    assert code == 2
    assert name in errors
    assert (tmp_path / name).read_bytes() == before


def test_a_link_to_a_file_of_a_new_folder_is_followed(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path
):
    (tmp_path / "captions.jsonl").symlink_to(tmp_path / "new" / "captions.jsonl")
    assert command(image_path, "--model", trained, "--output", tmp_path / "captions.jsonl")[0] == 0
    assert json.loads((tmp_path / "new" / "captions.jsonl").read_text())["photo"] == str(image_path)


def test_a_figure_replaces_the_one_before(command: Callable, attending: Path, image_path: Path, tmp_path: Path):
    options = ("--sheet", tmp_path / "sheet.png", "--attention", tmp_path / "attention.png")
    for _ in range(2):
        assert command(image_path, "--model", attending, *options)[0] == 0


def test_a_photo_that_was_repaired_is_captioned_when_the_file_is_resumed(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path
):
    folder, output = tmp_path / "photos", tmp_path / "captions.jsonl"
    folder.mkdir()
    for i in range(20):
        draw_noise(i).save(folder / f"{i:02}.png")
    whole = (folder / "03.png").read_bytes()
    for name in ("03.png", "18.png"):
        (folder / name).write_bytes(b"no image")
    code, _, errors = command(folder, "--model", trained, "--output", output)
    assert (code, errors.splitlines()[-1]) == (
        2,
        f"error: 2 of 20 images could not be read; their rows in {output} say why.",
    )
    (folder / "03.png").write_bytes(whole)
    (folder / "18.png").write_bytes(b"")
    output.rename(tmp_path / "elsewhere.jsonl")
    output.symlink_to("elsewhere.jsonl")  # and stays a link
    code, _, errors = command(folder, "--model", trained, "--output", output)
    assert output.is_symlink()
    assert f"{output}: 0 rows written, 20 were there, 1 of them without a caption until now" in errors
    assert f"error: {folder / '18.png'} cannot be read as an image (it is empty)." in errors
    assert "it is empty" in json.loads(output.read_text().splitlines()[18])["error"]
    assert command(folder, "--model", trained, "--output", output, "--strict")[2].endswith("(it is empty).\n")
    assert (code, errors.splitlines()[-1]) == (
        2,
        f"error: 1 of 20 images could not be read; their rows in {output} say why.",
    )
    (folder / "20.png").write_bytes(b"")
    code, _, errors = command(folder, "--model", trained, "--output", output)
    assert (code, "2 of 21 images could not be read" in errors) == (2, True)
    (folder / "20.png").write_bytes(whole)
    (folder / "18.png").write_bytes(whole)
    assert command(folder, "--model", trained, "--output", output)[0] == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    command(folder, "--model", trained, "--output", tmp_path / "at-once.jsonl")
    assert rows == [json.loads(line) for line in (tmp_path / "at-once.jsonl").read_text().splitlines()]


def draw_photos_of_which_the_first_is_broken(folder: Path, count: int) -> bytes:
    """Draw photos called 0.png and so on; returns what the first would hold."""
    folder.mkdir()
    for i in range(count):
        draw_noise(i).save(folder / f"{i}.png")
    whole = (folder / "0.png").read_bytes()
    (folder / "0.png").write_bytes(b"no image")
    return whole


def test_no_open_file_is_replaced(command: Callable, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, output = tmp_path / "photos", tmp_path / "captions.jsonl"
    whole = draw_photos_of_which_the_first_is_broken(folder, 2)
    command(folder, "--model", trained, "--output", output)
    (folder / "0.png").write_bytes(whole)
    replaced: list[Path] = []

    def replace(path: Path, _: dict) -> None:  # as Windows, which refuses it
        assert str(path) not in [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        replaced.append(path)

    monkeypatch.setattr(bulk, "_replace_rows", replace)
    assert command(folder, "--model", trained, "--output", output)[0] == 0
    assert replaced == [output]


def test_a_run_that_is_refused_leaves_the_rows_as_they_are(command: Callable, trained: Path, tmp_path: Path):
    folder, output = tmp_path / "photos", tmp_path / "captions.jsonl"
    whole = draw_photos_of_which_the_first_is_broken(folder, 3)
    command(folder, "--model", trained, "--output", output)
    before = output.read_bytes()
    (folder / "0.png").write_bytes(whole)
    code, _, errors = command(folder, "--model", trained, "--output", output, "--max-length", "2")
    assert (code, "holds other captions than this model gives" in errors) == (2, True)
    assert output.read_bytes() == before
    assert command(folder, "--model", trained, "--output", output)[0] == 0


def test_a_sheet_and_a_map_of_one_name_are_refused(
    command: Callable, attending: Path, image_path: Path, tmp_path: Path
):
    options = ("--sheet", tmp_path / "a.png", "--attention", tmp_path / "a.png")
    code, _, errors = command(image_path, "--model", attending, *options)
    assert (code, "--sheet and --attention both name" in errors) == (2, True)


def test_images_that_are_newer_than_their_captions_are_reported(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path
):
    folder, output = tmp_path / "photos", tmp_path / "captions.jsonl"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copyfile(image_path, folder / name)
    command(folder, "--model", trained, "--output", output)
    for path, time in ((output, 1e9), (folder / "a.png", 1e9), (folder / "b.png", 1e9 + 5)):
        os.utime(path, (time, time))
    for _ in range(2):
        code, _, errors = command(folder, "--model", trained, "--output", output)
        assert code == 0
        assert f"1 image is newer than {output}, such as {folder / 'b.png'}; delete the file to caption all" in errors


def test_figures_in_the_folder_of_images_are_not_captioned(
    command: Callable, attending: Path, image_path: Path, tmp_path: Path
):
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copyfile(image_path, folder / "a.png")
    (folder / "bad.png").write_text("no image")
    options = ("--sheet", folder / "sheet.png", "--attention", folder / "maps.png", "--json")
    for _ in range(2):
        code, output, errors = command(folder, "--model", attending, *options)
        assert [Path(row["photo"]).name for row in json.loads(output)] == ["a.png"]
        assert (code, "bad.png cannot be read" in errors) == (2, True)
    code, _, errors = command(folder / "sheet.png", "--model", attending, "--sheet", folder / "sheet.png")
    assert (code, "the only images named are --sheet or --attention of an earlier run" in errors) == (2, True)
    (folder / "maps.png").unlink()
    (folder / "maps.png").symlink_to("sheet.png")
    code, _, errors = command(folder, "--model", attending, *options)
    assert (code, "--sheet and --attention both name" in errors) == (2, True)


@pytest.mark.parametrize("option", ["--output", "--sheet", "--export"])
def test_an_output_at_a_web_address_is_refused(command: Callable, trained: Path, image_path: Path, option: str):
    images = [] if option == "--export" else [image_path]
    code, _, errors = command(*images, "--model", trained, option, "s3://bucket/out.onnx")
    assert code == 2
    assert "is a web address; name a place on this computer" in errors
    assert not Path("s3:").exists()


@pytest.mark.parametrize("option", ["--sheet", "--attention", "--export", "--output"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, option: str, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "file").touch()
    for owner, name in ((Captioner, "load"), (export, "load_model")):
        monkeypatch.setattr(owner, name, lambda *_: pytest.fail("the work has begun"))
    image_paths = [] if option == "--export" else [image_path]
    for output in (tmp_path / "file" / "out.png", tmp_path, tmp_path / ("a" * 300)):
        code, _, errors = command(*image_paths, "--model", trained, option, output)
        assert code == 2
        assert f"{output} cannot be written" in errors
        assert len(errors.splitlines()) == 1


def test_a_run_that_finds_all_rows_written_reports_them(command: Callable, trained: Path, album: Path, tmp_path: Path):
    (album / "notes.txt").touch()
    good = [album / f"{i:02}.png" for i in range(1, 6)]
    output = tmp_path / "new" / "c.jsonl"
    for images, written, earlier in ((good[:3], 3, 0), (good, 2, 3), (good, 0, 5)):
        _model, line = command(*images, "--model", trained, "--output", output)[2].splitlines()
        assert line == f"{output}: {written} rows written, {earlier} were there"
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["photo"] for row in rows] == list(map(str, good))


@pytest.mark.parametrize("end", ["\n", ""])
def test_rows_of_ones_own_are_neither_taken_for_captions_nor_deleted(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, end: str
):
    output = tmp_path / "own.jsonl"
    for row, message in (
        ({"photo": str(image_path), "label": "cat"}, "own.jsonl, line 1 holds no caption; name another file"),
        ({"photo": "other.jpg", "caption": "by hand"}, "line 1 does not belong to"),
    ):
        output.write_text(json.dumps(row) + end)
        code, _, errors = command(image_path, "--model", trained, "--output", output)
        assert (code, message in errors) == (2, True)
        assert output.read_text() == json.dumps(row) + end


def test_a_last_row_that_an_editor_left_without_a_line_end_counts(
    command: Callable, trained: Path, album: Path, tmp_path: Path
):
    output, arguments = tmp_path / "c.jsonl", ("--model", trained, "--output", tmp_path / "c.jsonl")
    command(album / "01.png", album / "02.png", album / "03.png", *arguments)
    expected = output.read_text()
    command(album / "01.png", album / "02.png", "--model", trained, "--output", tmp_path / "first.jsonl")
    output.write_text((tmp_path / "first.jsonl").read_text().rstrip("\n"))
    code, _, errors = command(album / "01.png", album / "02.png", album / "03.png", *arguments)
    assert (code, "1 rows written, 2 were there" in errors) == (0, True)
    assert output.read_text() == expected


def test_left_out_files_are_reported(command: Callable, trained: Path, image_path: Path, tmp_path: Path):
    folder = tmp_path / "album"
    (folder / "2024").mkdir(parents=True)
    shutil.copy(image_path, folder / "a.png")
    shutil.copy(image_path, folder / "2024" / "b.png")
    (folder / "c.CR2").touch()
    code, output, errors = command(folder, "--model", trained, "--json")
    assert code == 0
    assert [row["photo"] for row in json.loads(output)] == [str(folder / "a.png")]
    assert errors.startswith(f"left out of {folder}: 1 ")
    code, output, errors = command(folder, "--model", trained, "--json", "--recursive")
    assert [row["photo"] for row in json.loads(output)] == [str(folder / "2024" / "b.png"), str(folder / "a.png")]
    assert errors.splitlines()[0] == f"left out of {folder}: 1 .cr2 file"


def test_names_do_not_steer_the_terminal(command: Callable, trained: Path, image_path: Path, tmp_path: Path):
    evil = "a\x1b[2J\x9b2J\n\u202e.png"
    shutil.copy(image_path, tmp_path / evil)
    (tmp_path / f"bad-{evil}").touch()
    code, output, errors = command(image_path, tmp_path / evil, tmp_path / f"bad-{evil}", "--model", trained)
    assert code == 2
    assert "a\\x1b[2J\\x9b2J\\n\\u202e.png: " in output
    assert "bad-a\\x1b[2J" in errors
    assert not {"\x1b", "\x9b", "\u202e"} & {*output, *errors}
    assert len(output.splitlines()) == 2


def test_a_sheet_says_where_it_ends(command: Callable, trained: Path, album: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(caption_module, "MAX_SHEET", 2)
    image_paths = [album / "01.png", album / "02.png", album / "03.png"]
    _, _, errors = command(*image_paths, "--model", trained, "--sheet", album / "sheet.png")
    assert "sheet.png shows the first 2 of 3 images" in errors


@pytest.mark.slow
def test_one_caption_imports_what_it_uses_only(trained: Path, image_path: Path):
    script = (
        "import sys, tyro\n"
        "from caption import main\n"
        "from captioning.errors import run_command\n"
        "run_command(lambda: tyro.cli(main))\n"
        "print(sorted({name.split('.')[0] for name in sys.modules}), file=sys.stderr)\n"
    )
    imported = run_code(script, image_path, "--model", trained).stderr
    for name in (
        "gradio",
        "matplotlib",
        "pycocotools",
        "pycocoevalcap",
        "pillow_heif",
        "huggingface_hub",
        "webdataset",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "sympy",  # torch's compiler needs it
    ):
        assert f"'{name}'" not in imported


def test_a_caption_is_never_its_own_alternative(capsys: pytest.CaptureFixture):
    texts = ["A bowl of food on a table.", "a pizza.", "a pizza", "a cat."]
    caption = Caption("a bowl of food on a table", [], -1.0, alternatives=[Caption(text, [], -2.0) for text in texts])
    assert [other["caption"] for other in bulk.as_json("x.jpg", caption)["alternatives"]] == ["a pizza.", "a cat."]
    fake = SimpleNamespace(stream=lambda *_: iter([(0, caption)]))
    options = caption_module.Options((), False, (), "auto", Decoding(), 0, False)
    caption_module.print_captions(fake, ["x.jpg"], options, False)
    assert capsys.readouterr().out == "a bowl of food on a table\n    a pizza.\n    a cat.\n"
    repeated = Caption("a dog.", [], -1.0, alternatives=[Caption("A dog", [], -2.0)])
    assert "alternatives" not in bulk.as_json("x.jpg", repeated)


def test_captions_hold_what_the_page_and_the_notebooks_show():
    assert Caption("a dog.", ["a", "dog", "."], -1.0).alternatives == []
    assert bulk.as_json("x.jpg", Caption("a", ["a"], -1.0, None, [Caption("b", ["b"], -2.00004567)])) == {
        "photo": "x.jpg",
        "caption": "a",
        "log_probability": -1.0,
        "alternatives": [{"caption": "b", "log_probability": -2.0}],
    }


def test_a_file_of_captions_that_may_not_be_written_is_refused_before_the_work(
    command: Callable, trained: Path, image_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "c.jsonl").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "c.jsonl")
    monkeypatch.setattr(Captioner, "load", lambda *_: pytest.fail("the work has begun"))
    code, _, errors = command(image_path, "--model", trained, "--output", tmp_path / "c.jsonl")
    assert (code, "c.jsonl may not be written; change its permissions, or name another file" in errors) == (2, True)


def test_maps_of_later_images_are_not_kept(attending: Path, image_paths: list[Path], capsys: pytest.CaptureFixture):
    options = caption_module.Options(tuple(image_paths), False, (attending,), "fp32", Decoding(), 0, False)
    captions, _ = caption_module.print_captions(Captioner.load(attending), image_paths, options, False)
    assert [caption.attention is None for caption in captions.values()] == [False, *[True] * (len(image_paths) - 1)]
