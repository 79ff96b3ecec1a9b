"""Which images a folder holds, and what is said of the rest."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from conftest import draw_noise

from captioning import listing
from captioning.errors import InputError
from captioning.images import find_unreadable
from captioning.listing import find_images, stream_images


@pytest.fixture(autouse=True)
def _without_heif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "image_suffixes", lambda: frozenset({".jpg", ".png"}))


@pytest.fixture
def album(tmp_path: Path) -> Path:
    for name in ("2024/b.jpg", "2025/trip/c.JPG", "2025/.hidden/e.jpg", "a.jpg", "z.jpg", "empty/notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        draw_noise(0).save(tmp_path / name, "JPEG")
    for name in ("1.HEIC", "2.heic", "3.CR2", "notes.txt", "._a.jpg", ".DS_Store", "without_suffix"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(folder: Path, paths: list) -> list[str]:
    return [str(path.relative_to(folder)) for path in paths]


def test_files_of_a_folder_that_are_left_out_are_reported(album: Path):
    messages: list[str] = []
    assert names(album, find_images([album], log=messages.append)) == ["a.jpg", "z.jpg"]
    assert len(messages) == 1
    where, what = messages[0].split(": ", 1)
    assert where == f"left out of {album}"
    assert sorted(what.split(", ")) == [
        "1 .cr2 file",
        "1 .txt file",
        "1 file without a suffix",
        "2 .heic files (`pip install pillow-heif` makes them readable)",
        "3 folders (--recursive reads folders in folders)",
    ]


def test_folders_in_folders_come_in_name_order(album: Path):
    messages: list[str] = []
    expected = ["2024/b.jpg", "2025/trip/c.JPG", "a.jpg", "z.jpg"]
    assert names(album, find_images([album], True, messages.append)) == expected
    assert "--recursive" not in messages[0]
    assert "1 .md file" in messages[0]


def test_a_large_folder_is_counted_once(album: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(listing, "NAMES_PER_SCAN", 1)
    messages: list[str] = []
    find_images([album], True, messages.append)
    assert "2 .heic files" in messages[0]


def test_many_suffixes_are_not_all_named(tmp_path: Path):
    draw_noise(0).save(tmp_path / "a.png")
    for i in range(100):
        (tmp_path / f"file.{i:03}").touch()
    messages: list[str] = []
    find_images([tmp_path], log=messages.append)
    assert messages[0].endswith(" file, 90 others")
    assert messages[0].count(" file,") == 10


@pytest.mark.parametrize(
    ("name", "recursive", "expected"),
    [
        ("2025", False, "holds no images but 1 folder (--recursive"),
        ("2025/trip", True, None),
        ("empty", True, "holds no images but 1 .md file; name an image"),
        ("2025/.hidden", False, None),
    ],
)
def test_a_folder_without_images_says_what_it_has(album: Path, name: str, recursive: bool, expected: str | None):
    if expected is None:
        assert len(find_images([album / name], recursive)) == 1
        return
    with pytest.raises(InputError) as error:
        stream_images([album / name], recursive)
    assert expected in str(error.value)


def test_a_folder_without_images_beside_others_is_told(album: Path):
    messages: list[str] = []
    assert names(album, find_images([album / "empty", album / "2025" / "trip"], log=messages.append)) == [
        "2025/trip/c.JPG"
    ]
    assert messages == [f"{album}/empty holds no images but 1 .md file"]
    with pytest.raises(InputError, match="empty holds no images"):
        find_images([album / "empty", album / "empty"])
    assert find_images([]) == []


@pytest.mark.parametrize("recursive", [False, True])
def test_links_and_pipes_cost_no_other_image(tmp_path: Path, recursive: bool):
    draw_noise(0).save(tmp_path / "a.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "gone.tar").symlink_to("nowhere.tar")
    (tmp_path / "loop").symlink_to("loop")
    sources = find_images([tmp_path], recursive)
    failed = find_unreadable(sources, cache=tmp_path / "cache")
    assert [sources[i].name for i in range(len(sources)) if i not in failed] == ["a.png"]
    assert len(failed) == 5


def test_a_folder_that_links_to_its_own_parent_is_entered_once(tmp_path: Path):
    (tmp_path / "a").mkdir()
    draw_noise(0).save(tmp_path / "a" / "a.png")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "b").symlink_to("a")
    assert names(tmp_path, find_images([tmp_path], True)) == ["a/a.png"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "depth"), [("a", sys.getrecursionlimit() + 100), ("a" * 200, 30)])
def test_folders_deeper_than_python_or_the_system_reaches(tmp_path: Path, name: str, depth: int):
    here = os.getcwd()
    try:
        os.chdir(tmp_path)
        for _ in range(depth):
            os.mkdir(name)
            os.chdir(name)
        draw_noise(0).save("a.png")
        draw_noise(0).save(tmp_path / "b.png")
    finally:
        os.chdir(here)
    try:
        sources = find_images([tmp_path], True)
        failed = find_unreadable(sources, cache=tmp_path / "cache")
        assert sources[-1].name == "b.png"
        assert len(sources) == 2
        assert len(failed) == (depth == 30)
        assert all("File name too long" in str(error) for error in failed.values())
    finally:
        subprocess.run(["rm", "-rf", tmp_path / name], check=True)


def test_a_folder_that_cannot_be_read_is_counted(album: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "2024":
            raise PermissionError(13, "Permission denied")
        return real(path)

    messages: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert names(album, find_images([album], True, messages.append)) == ["2025/trip/c.JPG", "a.jpg", "z.jpg"]
        with pytest.raises(InputError, match="2024 cannot be read"):
            find_images([album / "2024"])
    assert "1 folder that cannot be read" in messages[0]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [("[ab].jpg", ["[ab].jpg"]), ("?.jpg", ["a.jpg", "z.jpg"]), ("2025/*", ["2025/trip/c.JPG"]), ("x*", ["x*"])],
)
def test_a_pattern_that_no_shell_expanded_means_what_matches(album: Path, pattern: str, expected: list[str]):
    draw_noise(0).save(album / "[ab].jpg")  # the name of a file is no pattern
    assert names(album, find_images([album / pattern])) == expected


def test_brackets_in_a_path_are_no_pattern(tmp_path: Path):
    for name in ("album [2023]", "album 2"):
        (tmp_path / name).mkdir()
        draw_noise(0).save(tmp_path / name / "a.jpg")
    draw_noise(0).save(tmp_path / "album 2" / "b.jpg")
    assert find_images([tmp_path / "album [2023]" / "*.jpg"]) == [tmp_path / "album [2023]" / "a.jpg"]
    missing = tmp_path / "album [2023]" / "b.jpg"
    assert find_images([missing]) == [missing]


def test_two_asterisks_mean_folders_of_any_depth(album: Path):
    found = names(album, find_images([album / "**" / "*.*"]))
    assert {"2025/trip/c.JPG", "a.jpg", "z.jpg"} <= set(found)
    assert len(set(found)) == len(found)
    (album / "link.jpg").symlink_to("a.jpg")
    assert names(album, find_images([album / "**" / "link.jpg"])) == ["link.jpg"]
    assert {"a.jpg", "link.jpg"} <= set(names(album, find_images([album / "**" / "*.jpg"])))
    (album / "self").symlink_to(".")
    assert names(album, find_images([album / "**" / "a.jpg"])) == ["a.jpg"]
    assert names(album, find_images([album / "**" / "trip"])) == ["2025/trip/c.JPG"]


def test_a_damaged_tar_file_costs_no_other_image(album: Path):
    with tarfile.open(album / "good.tar", "w") as tar:
        tar.add(album / "a.jpg", "in.jpg")
    whole = (album / "good.tar").read_bytes()
    (album / "bad.tar").write_bytes(whole[:700])
    for paths in ([album], [album / name for name in ("a.jpg", "bad.tar", "good.tar", "z.jpg")]):
        sources = find_images(paths)
        failed = find_unreadable(sources, cache=album / "cache")
        assert [str(source)[len(f"{album}/") :] for source in sources] == [
            "a.jpg",
            "bad.tar",
            "good.tar/in.jpg",
            "z.jpg",
        ]
        assert list(failed) == [1]
        assert str(failed[1]).startswith(f"{album}/bad.tar cannot be read as a tar file (")
    with pytest.raises(InputError, match=r"bad\.tar cannot be read as a tar file"):  # at once, if there is nothing else
        find_images([album / "bad.tar"])


@pytest.mark.parametrize(
    "address", ["https://example.org/photo.jpg", "https://example.org/shard.tar", "https://example.org/photo.jpg?w=3"]
)
def test_a_web_address_is_a_sentence(address: str):
    with pytest.raises(InputError, match=f"^{re.escape(address)} is a web address, and nothing is fetched"):
        stream_images([Path(address)])
