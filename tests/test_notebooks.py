"""The notebooks: that they run, and as they are committed, with figures and without leftovers."""

from __future__ import annotations

import ast
import importlib
import json
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

from captioning.annotations import read_annotations
from captioning.config import load_config
from vocabulary import tokenize

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted(ROOT.glob("[0-3]_*.ipynb"))
DRAWING = {"show", "draw_sheet", "draw_attention", "draw_architecture"}
IMAGES = {"image/png", "image/jpeg"}
LEFTOVERS = {
    "a figure as text": r"<Figure size|<Axes|<PIL\.",
    "a progress bar": r"\d%\|",
    "a path of the machine": r"(?<![\w.:/])/(?:home|root|tmp|work|mnt|opt|usr|var|Users|content)/|[A-Z]:\\\\Users",
}

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[dict]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def outputs_as_text(cell: dict) -> str:
    """What a reader sees of the outputs, without images and without the text that stands in for them."""
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        visible = {kind: text for kind, text in data.items() if kind not in IMAGES}
        if IMAGES & data.keys():
            visible.pop("text/plain", None)
        texts += [output.get("text", []), *visible.values()]
    return "".join("".join(text) for text in texts if not isinstance(text, dict))


def parse(cell: dict) -> ast.Module:
    """The cell's Python, without IPython's own commands."""
    return ast.parse(re.sub(r"^(\s*)[%!].*$", r"\1pass", source(cell), flags=re.M))


def calls(node: ast.AST) -> set[str]:
    """The names of the functions that are called when `node` runs; a definition calls nothing."""
    names = set()
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            names |= calls(child)
    if isinstance(node, ast.Call):
        names.add(getattr(node.func, "attr", getattr(node.func, "id", "")))
    return names


@each
def test_every_cell_has_run_without_error_and_in_order(path: Path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@each
def test_every_cell_that_draws_shows_an_image(path: Path):
    drawing = set(DRAWING)
    figures = 0
    for cell in code_cells(path):
        tree = parse(cell)
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if any(calls(statement) & drawing for statement in function.body):
                drawing.add(function.name)
        if calls(tree) & drawing:
            figures += 1
            kinds = {kind for output in cell["outputs"] for kind in output.get("data", {})}
            assert kinds & IMAGES, source(cell)
    assert figures >= 4


@each
@pytest.mark.parametrize("what", LEFTOVERS)
def test_outputs_hold_no(path: Path, what: str):
    for cell in code_cells(path):
        assert not re.search(LEFTOVERS[what], outputs_as_text(cell) + source(cell)), source(cell)


@each
def test_no_output_is_a_widget(path: Path):
    notebook = json.loads(path.read_text())
    assert "widgets" not in notebook["metadata"]
    kinds = {kind for cell in code_cells(path) for output in cell["outputs"] for kind in output.get("data", {})}
    assert kinds <= {*IMAGES, "text/plain", "text/markdown"}


@each
def test_the_first_cell_installs_in_colab_and_the_text_says_so(path: Path):
    cells = json.loads(path.read_text())["cells"]
    assert "Open in Colab" in source(cells[0])
    assert "GPU" in source(cells[0])
    assert "google.colab" in source(cells[1])
    assert "git clone" in source(cells[1])


@each
def test_what_is_imported_exists(path: Path):
    for node in (node for cell in code_cells(path) for node in ast.walk(parse(cell))):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@each
def test_cells_are_short_and_the_file_is_small(path: Path):
    assert not [source(cell) for cell in code_cells(path) if source(cell).count("\n") >= 30]
    assert path.stat().st_size < 1_000_000


def test_they_run_in_order_on_a_small_data_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("NOTEBOOK_QUICK", "1")
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, nbformat.NO_CONVERT)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT)}}).execute()


def test_there_are_four():
    assert [path.name[0] for path in NOTEBOOKS] == ["0", "1", "2", "3"]


def test_the_table_of_parameters_gives_the_values_of_the_recipe():
    cells = json.loads(next(path for path in NOTEBOOKS if path.name.startswith("2")).read_text())["cells"]
    table = next(source(cell) for cell in cells if "| parameter |" in source(cell))
    rows = re.findall(r"^\| `(\w+)` \| `?([\w.]+)", table, re.M)
    config = load_config(ROOT / "configs" / "scenes.toml")
    assert len(rows) == 9
    assert rows == [(name, str(getattr(config, name))) for name, _ in rows]


def test_captions_of_the_photos_are_compared_with_what_each_of_them_shows():
    [cell] = [cell for cell in code_cells(NOTEBOOKS[3]) if "SHOWN = {" in source(cell)]
    names = {"tokenize": tokenize}
    exec(source(cell), names)
    assert sorted(names["SHOWN"]) == sorted(path.stem for path in (ROOT / "images").glob("*.jpg"))
    right, wrong, missing = names["compare"]("a man at a red table, a red mug and a plate.", names["SHOWN"]["coffee"])
    assert right == ["red", "table", "mug", "plate"]
    assert wrong == ["man"]
    assert missing == ["coffee", "spoon"]
    assert names["compare"]("", names["SHOWN"]["cat"]) == ([], [], ["cat", "face", "eyes"])
    table = next(text for text in map(outputs_as_text, code_cells(NOTEBOOKS[3])) if "| not on the list |" in text)
    rows = re.findall(r"^\| ([\w-]+) \| (a [^|]+) \| ([^|]*) \| ([^|]*) \| ([^|]*) \|", table, re.M)
    assert [name for name, *_ in rows] == sorted(names["SHOWN"])
    for name, caption, *columns in rows:
        assert columns == [", ".join(words) for words in names["compare"](caption, names["SHOWN"][name])]


def test_what_notebook_0_says_of_coco_is_so(shared: Path, tmp_path: Path):
    captions = read_annotations(shared / "captions_val2017.json", tmp_path)
    lengths, frequency = np.diff(captions.offsets), np.bincount(captions.tokens)
    half, most = np.percentile(lengths, (50, 95)).astype(int)
    rare = frequency < 5
    share = 100 * frequency[rare].sum() / frequency.sum()
    cells = json.loads(NOTEBOOKS[0].read_text())["cells"]
    text = " ".join(" ".join(source(cell) for cell in cells if cell["cell_type"] == "markdown").split())
    for sentence in (
        f"half of the {len(lengths):,} validation captions have at most {half} tokens",
        f"95 in 100 have at most {most}, and the longest has {lengths.max()}",
        f"hold {len(captions.words):,} different words, of which {(frequency == 1).sum():,} occur a single time",
        f"removes {100 * rare.mean():.0f}% of the words and {share:.1f}% of the tokens",
    ):
        assert sentence in text


def test_the_exercise_with_the_sample_s_size_names_it():
    text = (ROOT / "1_Architecture.ipynb").read_text("utf-8")
    assert (
        f"`IMAGE_SIZE = {load_config(ROOT / 'configs' / 'scenes.toml').image_size}`, which is what the sample" in text
    )
