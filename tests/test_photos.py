"""The model of photos that comes with the project."""

import csv
import shutil
from pathlib import Path

import pytest
from conftest import PEAK, run_code, write_split
from gradio.media import get_image
from PIL import Image
from test_importers import captions, make_image

import importers
from captioning.captioner import Caption, Captioner
from captioning.checkpoint import default_model, read_description
from captioning.weights import read_state_dict
from data_loader import CaptionDataset
from evaluate import evaluate
from vocabulary import tokenize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models" / "photos"


def test_it_is_whole_and_small():
    sizes = {path.name: path.stat().st_size for path in MODEL.iterdir()}
    epoch = read_description(MODEL).best_epoch
    assert {"README.md", "captioner.json", f"encoder-{epoch}.pkl", f"decoder-{epoch}.pkl"} <= sizes.keys()
    assert sum(sizes.values()) <= 30e6
    assert not list(MODEL.glob("backbone.*"))  # it is named in captioner.json
    for part in ("encoder", "decoder"):
        state = read_state_dict(MODEL / f"{part}-{epoch}.pkl")
        assert {str(value.dtype) for value in state.values()} <= {"torch.float16", "torch.int64"}


def test_an_image_is_captioned_by_it_without_a_network_wherever_no_model_is_named(tmp_path: Path):
    """In 12 megapixels, from another folder, and in less than 1.5 GB."""
    photo = tmp_path / "lion.jpg"
    with Image.open(get_image("lion.jpg")) as image:
        image.resize((4000, 3000)).save(photo)
    script = "import runpy, socket; socket.socket.connect = socket.getaddrinfo = None\n"
    script += f"sys.argv = ['caption.py', {str(photo)!r}]\n"
    script += f"sys.path.insert(0, {str(ROOT)!r}); runpy.run_path({str(ROOT / 'caption.py')!r}, run_name='__main__')\n"
    script += "print(peak(), file=sys.stderr)"
    done = run_code(PEAK + script, cwd=tmp_path)
    assert done.stdout.strip() == Captioner.load(default_model(MODEL.parent))(photo)[0].text
    _model, peak = done.stderr.splitlines()
    assert int(peak) < 1.5e9


def test_the_photos_of_the_project_show_what_it_names():
    captions = {path.stem: caption.text for path, caption in _caption_photos()}
    words = {name: set(tokenize(text)) for name, text in captions.items()}
    assert "cat" in words["cat"], captions
    assert words["coffee"] & {"cup", "mug"}, captions
    assert words["astronaut"] & {"person", "people", "man", "woman", "boy", "girl", "astronaut", "lady"}, captions


def _caption_photos() -> list[tuple[Path, Caption]]:
    paths = sorted((ROOT / "images").glob("*.jpg"))
    return list(zip(paths, Captioner.load(MODEL)(paths), strict=True))


def test_it_captions_images_that_it_was_not_trained_on(shared: Path, tmp_path: Path):
    flickr8k = shared / "flickr8k"
    names = (flickr8k / "Flickr_8k.devImages.txt").read_text().split()[:200]
    captions: dict[str, list[str]] = {name: [] for name in names}
    for line in (flickr8k / "Flickr8k.token.txt").read_text().splitlines():
        name, text = line.split("\t")
        if name[:-2] in captions:
            captions[name[:-2]].append(text)
    write_split(tmp_path, "val", captions)
    for name in names:
        (tmp_path / "images" / "val" / name).symlink_to(flickr8k / "Images" / name)
    captioner = Captioner.load(MODEL)
    data = CaptionDataset(tmp_path, "val", vocab=captioner.vocab, cache=tmp_path / "cache")
    evaluation = evaluate(captioner, data, java=False)
    assert evaluation.scores.metrics["CIDEr"] > 0.4
    assert len({caption.text for caption in evaluation.captions.values()}) > 100


def import_captions(table: str, folder: Path) -> None:
    """Import a table of configs/ into `folder`/data, with drawn images in the place of its photos."""
    shutil.copy(ROOT / "configs" / table, folder / "metadata.csv")
    with open(folder / "metadata.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for i, row in enumerate(rows):
        make_image(folder / row["file_name"], (8 + i % 100, 8 + i // 100))
    importers.import_folder(folder, folder / "data")


def test_the_importer_reads_the_captions_of_imagenet_that_it_was_trained_on(tmp_path: Path):
    import_captions("imagenet.csv", tmp_path)
    assert len(captions(tmp_path / "data", "train")) == 980
    assert len(captions(tmp_path / "data", "val")) == 20
    assert {len(texts) for split in ("train", "val") for texts in captions(tmp_path / "data", split).values()} == {4}
    assert "a white cup with blue flowers on it." in captions(tmp_path / "data", "train")["n07930864_cup.JPEG"]


def test_the_importer_reads_the_captions_of_caltech101_that_it_was_trained_on(tmp_path: Path):
    import_captions("caltech101.csv", tmp_path)
    train, val = (captions(tmp_path / "data", split) for split in ("train", "val"))
    texts = train | val
    assert (len(train), len(val)) == (533, 27)
    assert {len(each) for each in texts.values()} == {4}
    assert texts["cup/image_0023.jpg"][0] == "a cup of coffee on a saucer on a wooden table."
