"""Files that are written atomically."""

import bz2
import lzma
import tarfile
from pathlib import Path

import pytest

from captioning.annotations import read_annotations
from captioning.errors import InputError, warn_once
from captioning.files import check_output, read_text, write_cache
from captioning.reports import Report
from vocabulary import Vocabulary


def test_a_cache_file_is_written_whole_or_not_at_all(tmp_path: Path):
    assert write_cache(tmp_path, "kind/file", lambda file: file.write(b"first"))

    def fail(file: object) -> None:
        file.write(b"torn")
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        write_cache(tmp_path, "kind/file", fail)
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "kind").iterdir()] == [("file", b"first")]


@pytest.mark.parametrize("cache", ["file", "file/in/it", "a" * 300])
def test_a_cache_that_cannot_be_written_causes_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture, cache: str):
    (tmp_path / "file").touch()
    for name in ("captions/a", "captions/b", "unreadable/c"):
        assert not write_cache(tmp_path / cache, name, lambda file: file.write(b""))
    errors = capsys.readouterr().err
    assert errors.count("\n") == errors.count("cannot be written") == 1


def test_a_full_disk_leaves_no_cache_file(tmp_path: Path, capsys: pytest.CaptureFixture):
    def fail(file: object) -> None:
        file.write(b"torn")
        raise OSError(28, "No space left on device")

    assert not write_cache(tmp_path, "kind/file", fail)
    assert "No space left" in capsys.readouterr().err
    assert not list((tmp_path / "kind").iterdir())


def test_a_report_counts_by_kind_and_names_the_first():
    report = Report()
    for kind, entry in (("cat{s}", "1"), ("dog{s}", "2"), ("cat{s}", "3")):
        report.add(kind, entry)
    assert report.lines() == ["left out 2 cats, the first is 1", "left out 1 dog: 2"]


def test_a_warning_is_printed_once(capsys: pytest.CaptureFixture):
    for _ in range(2):
        warn_once("something of this test")
    assert capsys.readouterr().err == "warning: something of this test\n"


def test_a_pointer_of_git_lfs_is_named(tmp_path: Path):
    (tmp_path / "a.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for read in (read_text, Vocabulary.load, lambda path: read_annotations(path, tmp_path)):
        with pytest.raises(InputError, match=r"a\.json is a Git LFS pointer; `git lfs pull` fetches the file itself"):
            read(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (tarfile.TarInfo("a").tobuf() + bytes(1024), "a tar archive"),
        (bz2.compress(b"a"), "a bzip2 archive"),
        (lzma.compress(b"a"), "an xz archive"),
        (b"ARROW1\0\0", "an Arrow file"),
        (b"\xff\xff\xff\xff\x78\0", "an Arrow file"),
        (b"(\xb5/\xfd", "a zstd archive"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a RAR archive"),
        (b"%PDF-1.7\n", "a PDF file"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, content: bytes, kind: str):
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(InputError, match=rf"a\.csv is {kind}, not a text file; unpack an archive and name its folder"):
        read_text(tmp_path / "a.csv")


def test_checking_an_output_touches_no_file(tmp_path: Path):
    (tmp_path / "a.json.new").write_text("mine")
    check_output(tmp_path / "a.json")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
    with pytest.raises(InputError, match="cannot be written"):
        check_output(tmp_path / f"{250 * 'a'}.json")
