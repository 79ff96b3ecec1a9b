"""Every command of the README runs as it stands there, on little data and with options that keep its work small."""

import re
import runpy
import shlex
import shutil
from functools import partial

import pytest
from conftest import ROOT, draw_noise

from captioning.captioner import Captioner

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
SHELL = [text for language, text in BLOCKS if language == "sh"]
ELSEWHERE = ("make setup", "python download.py")  # run by .ci/run and by test_download.py
SMALL = {
    "train.py --config": "--weights random --image-size 64 --num-epochs 1 --batch-size 16",
    "train.py --resume": "--num-epochs 1",
    "train.py --data": "--num-epochs 1 --batch-size 4",
}


def commands(block: str) -> list[list[str]]:
    """A block's commands without their comments, as lists of words; those that other tests run are left out."""
    lines = [line.split("  #")[0].replace(".venv/bin/", "").strip() for line in block.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith(ELSEWHERE)]


@pytest.fixture
def clone(tmp_path, monkeypatch, drawn, tiny_backbone):
    """A folder with what the README's commands name, as the working directory."""
    for name in ("configs", "images", "models/photos"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copytree(drawn, tmp_path / "data" / "coco")
    for folder, names in (("holiday", ["beach.jpg"]), ("SOURCE", [f"{i}.jpg" for i in range(8)])):
        (tmp_path / folder).mkdir()
        for seed, name in enumerate(names):
            draw_noise(seed).save(tmp_path / folder / name)
    rows = [f"{i}.jpg,squares in many colours" for i in range(8)]
    (tmp_path / "SOURCE" / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(clone, run_here):
    """Runs one of `commands` in `clone`, with further options."""

    def run(command, *further):
        python, name, *arguments = command
        assert python == "python"
        return run_here(name, partial(runpy.run_path, str(ROOT / name), run_name="__main__"), *arguments, *further)

    return run


def test_the_readme_is_read_in_minutes():
    assert len(README.split()) <= 900


def test_the_scores_of_the_model_are_the_same_in_the_results_and_on_its_card():
    documents = [(ROOT / name).read_text() for name in ("docs/results.md", "models/photos/README.md")]
    rows = [re.findall(r"^\| ((?:COCO|Flickr8k), [\d,]+ .*? \| \d+) \|", text, re.M) for text in documents]
    assert len(rows[0]) == 6
    assert rows[0] == rows[1]


PHOTOS = {  # of the model in models/photos, in the README's words and in those of docs/results.md
    "COCO train2014, 1,000": "COCO, 1,000 held-out photos of train2014",
    "COCO val2017, 79 full-size": "COCO, 79 full-size photos of val2017",
    "Flickr8k, 1,091": "Flickr8k, 1,091 development photos",
}
DECODINGS = ("greedy", "beam of 3, blocked trigrams")


def test_the_scores_in_the_readme_are_those_of_the_results():
    results = (ROOT / "docs" / "results.md").read_text()
    coco, flickr8k = results.split("The same on the 6,000 training photos of Flickr8k")
    row = r"^\|(?:\[(.+?)\]\(.+?\)|([^|,\[]+))((?:, [^|]+)?)\|((?:COCO|Flickr8k)[^|]*)\|(.+/.+)\|([^|]*)\|$"
    rows = re.findall(row, README, re.M)
    assert len(rows) == 15
    for linked, name, objective, photos, scores, minutes in rows:
        is_decoder = bool(objective)
        label = f"{linked or name}{objective}" if is_decoder else PHOTOS[photos]
        table = flickr8k if is_decoder and photos == "Flickr8k" else coco
        for at, decoding in enumerate(DECODINGS):
            (row,) = (line for line in table.split("\n") if line.startswith(f"| {label} | {decoding} |"))
            expected = [cell.strip() for cell in row.strip("|").split("|")][2:]
            assert [cell.split("/")[at] for cell in scores.split("|")] == expected[:5]
            if is_decoder and at == 0:
                assert minutes == expected[5]


@pytest.mark.slow
@pytest.mark.parametrize("block", SHELL, ids=[commands(block)[0][1] for block in SHELL])
def test_every_command_runs(block, run):
    for command in commands(block):
        small = SMALL.get(" ".join(command[1:3]), "").split()
        code, _, errors = run(command, *small)
        assert code == 0, errors


def test_the_output_shown_is_what_the_command_before_it_prints(run):
    pairs = [(block[1], BLOCKS[i - 1][1]) for i, block in enumerate(BLOCKS) if block[1].startswith("images/")]
    ((output, block),) = pairs
    (command,) = commands(block)
    assert run(command)[:2] == (0, output)


def test_the_captions_under_the_images_are_the_model_s():
    table = [line for line in README.split("\n") if line.startswith("|")]
    paths = [ROOT / path for path in re.findall(r"\((images/.+?)\)", table[0])]
    captions = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert len(paths) == len(captions) == 4
    model = Captioner.load(ROOT / "models" / "photos", precision="bf16")
    assert [caption.text for caption in model(paths)] == captions


def test_the_python_prints_a_caption_of_each_image(clone, capsys):
    (code,) = [text for language, text in BLOCKS if language == "python"]
    exec(compile(code, "README.md", "exec"), {})
    assert re.fullmatch(r"(a .+ -\d+\.\d+\n){2}", capsys.readouterr().out)
