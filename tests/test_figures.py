"""Contact sheets and attention maps, looked at by their pixels."""

from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from conftest import PEAK, draw_noise, run_code
from PIL import Image

from captioning.backbones import Preprocessing
from captioning.captioner import Caption
from captioning.errors import InputError, warn_once
from captioning.figures import (
    CELL,
    MARGIN,
    MAX_SHEET,
    THUMBNAIL,
    draw_attention,
    draw_sheet,
    overlay_attention,
    save_figure,
    scale_attention,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (1600, 900), (640, 20), (3, 3)], ids=str)
def test_a_caption_stands_below_its_image(size: tuple[int, int]):
    text = "Çà et là, a very long caption of a red dog that runs, jumps and swims"
    sheet = np.asarray(draw_sheet([Image.new("RGB", size, "red")], [text])).astype(int)
    rows, columns = np.where(np.abs(sheet - (255, 0, 0)).sum(2) < 30)
    thumbnail = sheet[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    assert np.abs(thumbnail - (255, 0, 0)).max() < 30  # nothing is drawn over it
    assert thumbnail.shape[1] == THUMBNAIL[0] or thumbnail.shape[0] == THUMBNAIL[1]
    dark = np.where(sheet.sum(2) < 200)
    assert dark[0].min() > rows.max() + MARGIN // 2
    assert dark[0].max() < len(sheet) - MARGIN // 2
    assert min(dark[1].min(), sheet.shape[1] - dark[1].max()) >= MARGIN // 2


@pytest.mark.parametrize("text", ["W" * 84, "这是一只猫坐在桌子上的照片" * 6, "a cat " * 20])
def test_captions_of_wide_characters_stay_in_their_column(text: str):
    warn_once.cache_clear()
    sheet = np.asarray(draw_sheet([Image.new("RGB", (300, 20), "red")] * 3, ["", text, ""])).astype(int)
    dark = np.where(sheet.sum(2) < 200)[1]
    assert CELL <= dark.min() <= dark.max() < 2 * CELL


def test_a_sheet_says_which_characters_its_font_lacks(capsys: pytest.CaptureFixture):
    for text, warned in (("Çà, 1 «été»", False), ("это кошка", False), ("一只猫", True)):
        warn_once.cache_clear()
        draw_sheet([Image.new("RGB", (30, 20))], [text])
        assert ("such as 一" in capsys.readouterr().err) == warned


def test_a_figure_of_the_attention_says_it_too(
    image_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture, recwarn: pytest.WarningsRecorder
):
    warn_once.cache_clear()
    caption = Caption("ನಾಯಿ", ["ನಾಯಿ"], -1.0, torch.ones(1, 4))
    save_figure(draw_attention(image_path, caption, Preprocessing(64)), tmp_path / "a.png")
    assert "the figure shows boxes for characters that its font lacks, such as ನ" in capsys.readouterr().err
    assert not recwarn


def test_a_full_disk_leaves_the_earlier_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(self: Image.Image, file: BinaryIO, **_: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    path = tmp_path / "sheet.png"
    save_figure(draw_sheet([draw_noise(0)], ["a"]), path)
    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(InputError, match=r"sheet\.png cannot be written \(No space left on device\)"):
        save_figure(Image.new("RGB", (3, 3)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (4, 4), (9, 4), (100, 10)])
def test_a_sheet_of_many_is_about_square(count: int, columns: int):
    sheet = draw_sheet([draw_noise(i) for i in range(count)], [f"caption {i}" for i in range(count)])
    assert sheet.width == columns * CELL


def test_a_sheet_shows_so_many_at_most():
    with pytest.raises(InputError, match="at most 1,000 images, not 1,001"):
        draw_sheet([draw_noise(0)] * (MAX_SHEET + 1), ["a"] * (MAX_SHEET + 1))


@pytest.mark.slow
def test_a_sheet_keeps_no_image_whole(tmp_path: Path):
    draw_noise(0, (4000, 3000)).save(tmp_path / "a.jpg")
    script = (
        "from captioning.figures import draw_sheet\n"
        "draw_sheet([sys.argv[1]], ['a'])\n"
        "before = peak()\n"
        "draw_sheet([sys.argv[1]] * 40, ['a'] * 40)\n"
        "print((peak() - before) // 2**20)\n"
    )
    assert int(run_code(PEAK + script, tmp_path / "a.jpg").stdout) < 50


@pytest.mark.slow
def test_a_sheet_of_a_thousand_images_takes_little_memory(tmp_path: Path):
    draw_noise(0, (400, 300)).save(tmp_path / "a.jpg")
    script = (
        "from pathlib import Path\n"
        "from captioning.figures import draw_sheet, save_figure\n"
        "save_figure(draw_sheet([sys.argv[1]] * 1000, ['a red dog runs on the beach.'] * 1000), Path(sys.argv[2]))\n"
        "print(peak())\n"
    )
    assert int(run_code(PEAK + script, tmp_path / "a.jpg", tmp_path / "sheet.png").stdout) < 1.5e9
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width * sheet.height > 1000 * 100 * 75


def test_attention_spans_the_whole_range():
    weights = torch.full((49,), 1 / 49)
    weights[10] += 0.002
    weights[30] -= 0.001
    scaled = scale_attention(weights)
    assert scaled.shape == (7, 7)
    assert scaled[1, 3] == 1
    assert scaled[4, 2] == 0
    assert (scale_attention(torch.full((49,), 1 / 49)) == 0).all()
    assert scale_attention(weights.bfloat16()).max() == 1


def test_a_map_is_clear_where_the_decoder_looked_and_grey_elsewhere():
    view = Image.new("RGB", (70, 70), (200, 100, 50))
    weights = torch.full((49,), 0.02)
    weights[0] = 0.03
    drawn = np.asarray(overlay_attention(view, weights)).astype(int)
    assert np.abs(drawn[:4, :4] - (200, 100, 50)).max() < 20
    assert np.abs(drawn[40:, 40:] - (142, 122, 112)).max() < 5


def test_words_are_no_mathematics(tmp_path: Path, image_path: Path):
    caption = Caption("costs $5 or $\\frac", ["costs", "$5", "$\\frac$"], -1.0, torch.rand(3, 4))
    save_figure(draw_attention(image_path, caption, Preprocessing(64)), tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").width > 300
    with pytest.raises(InputError, match="does not attend"):
        draw_attention(image_path, Caption("a", ["a"], -1.0), Preprocessing(64))


def test_a_figure_that_cannot_be_written(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"a\.png cannot be written"):
        save_figure(draw_noise(0), tmp_path / "file" / "a.png")
