import errno
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import threading
import time
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import HTTPServer
from PIL import EpsImagePlugin, Image

import download
import importers
from captioning import checkpoint, fetching
from captioning.errors import InputError
from captioning.files import lock_output

SPLITS = ("train", "val", "test")
IMAGES = 6
NAMES = ("captions_train2017.json", "captions_val2017.json", "image_info_test2017.json")


class Server:
    """Serves `files` (path -> bytes) on 127.0.0.1, with ranges, and misbehaves as told."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.ranges = True
        self.cut_after: dict[str, list[int]] = {}  # path -> bytes sent before the cut, a number a request
        self.status: dict[str, list[int]] = {}  # path -> statuses of the next requests
        self.pause = 0.0  # seconds before each piece of 64 kB
        self.requests: list[tuple[str, str | None]] = []
        self.sent: dict[str, int] = {}
        self.at_once = self.max_at_once = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                server.requests.append((self.path, asked))
                statuses = server.status.get(self.path, [])
                if statuses or self.path not in server.files:
                    self.send_error(statuses.pop(0) if statuses else 404)
                    return
                data = server.files[self.path]
                start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and server.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start))
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.end_headers()
                server.at_once += 1
                server.max_at_once = max(server.max_at_once, server.at_once)
                cuts = server.cut_after.get(self.path, [])
                end = start + cuts.pop(0) if cuts else len(data)
                for at in range(start, min(end, len(data)), 1 << 16):
                    piece = data[at : min(at + (1 << 16), end)]
                    time.sleep(server.pause)
                    server.sent[self.path] = server.sent.get(self.path, 0) + len(piece)
                    try:
                        self.wfile.write(piece)
                    except OSError:
                        break
                server.at_once -= 1

        self.http = HTTPServer(Handler)
        self.url = self.http.url


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.002)
    server = Server()
    yield server
    server.http.stop()


def zipped(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def jpeg(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.frombytes("RGB", (width, height), os.urandom(3 * width * height)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture
def coco(server, monkeypatch):
    """COCO 2017 in small, file for file: five archives, and every photo by itself."""
    annotations: dict[str, bytes] = {"annotations/instances_train2017.json": b"{}"}
    archives: dict[str, bytes] = {}
    for s, split in enumerate(SPLITS):
        images, captions, files = [], [], {}
        for i in range(IMAGES):
            name, width, height = f"{100 * s + i:012d}.jpg", 90 + i, 80
            files[f"{split}2017/{name}"] = server.files[f"/{split}2017/{name}"] = jpeg(width, height)
            url = f"{server.url}/{split}2017/{name}"
            image_id = 100 * s + i
            images.append({"id": image_id, "file_name": name, "width": width, "height": height, "coco_url": url})
            captions += [{"id": 10 * image_id + k, "image_id": image_id, "caption": "A dog."} for k in range(5)]
        archives[f"zips/{split}2017.zip"] = zipped({f"{split}2017/": b"", **files})
        document = {"info": {"year": 2017}, "licenses": [], "images": images}
        if split == "test":
            text = json.dumps(document | {"categories": []}).encode()
            archives["annotations/image_info_test2017.zip"] = zipped(
                {
                    "annotations/image_info_test2017.json": text,
                    "annotations/image_info_test-dev2017.json": b"{}",
                }
            )
        else:
            document["annotations"] = captions
            annotations[f"annotations/captions_{split}2017.json"] = json.dumps(document).encode()
    archives["annotations/annotations_trainval2017.zip"] = zipped(annotations)
    monkeypatch.setattr(download, "COCO_SERVER", server.url)
    monkeypatch.setattr(download, "COCO_ARCHIVES", {})
    for name, data in archives.items():
        publish(server, name, data)
    return server


def publish(server: Server, name: str, data: bytes) -> None:
    server.files[f"/{name}"] = data
    download.COCO_ARCHIVES[name] = (len(data), hashlib.sha256(data).hexdigest())


def document(root: Path, name: str) -> dict:
    return json.loads((root / "annotations" / name).read_text())


def files_below(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def whole() -> set[str]:
    images = {f"images/{s}2017/{100 * n + i:012d}.jpg" for n, s in enumerate(SPLITS) for i in range(IMAGES)}
    return images | {f"annotations/{name}" for name in NAMES}


def test_all_of_coco(coco, tmp_path, capsys):
    root = tmp_path / "data" / "coco"
    download.coco(root)
    assert files_below(root) == whole()
    image = root / "images" / "val2017" / "000000000103.jpg"
    assert image.read_bytes() == coco.files["/val2017/000000000103.jpg"]
    assert len(document(root, "captions_train2017.json")["annotations"]) == 5 * IMAGES
    assert not (root / ".download").exists()
    assert "is ready" in capsys.readouterr().out


def test_the_table_names_every_archive_of_both_years():
    for year in (2014, 2017):
        names = [f"annotations/{a}{year}.zip" for a in ("annotations_trainval", "image_info_test")]
        names += [f"zips/{split}{year}.zip" for split in SPLITS]
        for name in names:
            size, sha256 = download.COCO_ARCHIVES[name]
            assert size > 500_000
            assert len(bytes.fromhex(sha256)) == 32


def test_existing_files_are_not_downloaded(coco, tmp_path):
    download.coco(tmp_path)
    coco.requests.clear()
    download.coco(tmp_path)
    assert coco.requests == []
    shutil.rmtree(tmp_path / "images" / "val2017")
    download.coco(tmp_path)
    assert coco.requests == [("/zips/val2017.zip", None)]


def test_a_connection_cut_in_mid_file_goes_on_where_it_broke(coco, tmp_path):
    name = "/zips/train2017.zip"
    size = len(coco.files[name])
    coco.cut_after[name] = [size // 3, size // 3]
    download.coco(tmp_path)
    assert [r for p, r in coco.requests if p == name] == [
        None,
        f"bytes={size // 3}-",
        f"bytes={2 * (size // 3)}-",
    ]
    assert coco.sent[name] == size
    assert files_below(tmp_path) == whole()


def test_the_next_run_goes_on_where_an_interrupted_one_stopped(coco, tmp_path):
    name = "/zips/train2017.zip"
    real = coco.files[name]
    half = len(real) // 2
    coco.cut_after[name] = [half, *[0] * fetching.ATTEMPTS]
    with pytest.raises(InputError, match=r"train2017.zip cannot be downloaded: .* run the same command"):
        download.coco(tmp_path)
    assert (tmp_path / ".download" / "train2017.zip.part").read_bytes() == real[:half]
    assert not (tmp_path / "images" / "train2017").exists()
    coco.cut_after.clear()
    coco.requests.clear()
    download.coco(tmp_path)
    assert (name, f"bytes={half}-") in coco.requests
    assert coco.sent[name] == len(real)
    assert files_below(tmp_path) == whole()


def test_a_server_without_ranges_sends_the_whole_file(coco, tmp_path):
    coco.ranges = False
    coco.cut_after["/zips/val2017.zip"] = [1000]
    download.coco(tmp_path)
    assert files_below(tmp_path) == whole()


def test_a_busy_server_is_retried(coco, tmp_path):
    coco.status["/zips/val2017.zip"] = [503, 429]
    download.coco(tmp_path)
    assert files_below(tmp_path) == whole()


def test_an_absent_server_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "COCO_SERVER", "http://127.0.0.1:9")
    monkeypatch.setattr(fetching, "RETRY_SECONDS", 0.0)
    monkeypatch.setattr(download, "require_space", lambda *_args: None)
    with pytest.raises(InputError, match=r"http://127.0.0.1:9/\S+ cannot be downloaded: the server cannot be reached"):
        download.coco(tmp_path)


def test_a_wrong_checksum_is_refused_and_the_file_deleted(coco, tmp_path):
    name = "zips/val2017.zip"
    right = coco.files[f"/{name}"]
    coco.files[f"/{name}"] = right[:-1] + bytes([right[-1] ^ 1])
    with pytest.raises(InputError, match=r"val2017.zip has the SHA-256 \w+ instead of .* was deleted"):
        download.coco(tmp_path)
    assert not list((tmp_path / ".download").glob("val2017.zip*"))
    assert not (tmp_path / "images" / "val2017").exists()
    coco.files[f"/{name}"] = right
    download.coco(tmp_path)
    assert files_below(tmp_path) == whole()


def test_a_wrong_size_is_refused_before_it_is_downloaded(coco, tmp_path):
    coco.files["/zips/val2017.zip"] += b"more"
    with pytest.raises(InputError, match=r"val2017.zip is not the published file of [\d,]+ bytes"):
        download.coco(tmp_path)
    assert not (tmp_path / ".download" / "val2017.zip.part").exists()


def test_disk_space_is_checked_before_the_first_byte(coco, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _path: usage._replace(free=10_000))
    with pytest.raises(InputError, match=r"needs 1\d\d\.\d MB of free disk space and has 0.0 MB"):
        download.coco(tmp_path / "coco")
    with pytest.raises(InputError, match="free disk space"):
        download.coco(tmp_path / "coco", limit=2)
    assert coco.requests == []
    assert not (tmp_path / "coco").exists()


def test_the_space_that_all_of_coco_needs(tmp_path, monkeypatch):
    asked = []

    def refuse(_folder, needed):
        asked.append(needed)
        raise InputError("enough")

    monkeypatch.setattr(download, "require_space", refuse)
    with pytest.raises(InputError, match="enough"):
        download.coco(tmp_path / "coco")
    archives = sum(size for name, (size, _) in download.COCO_ARCHIVES.items() if "2017" in name)
    assert asked[0] > archives + download.COCO_ARCHIVES["zips/train2017.zip"][0]


def test_a_folder_that_lacks_images_is_not_called_ready(coco, tmp_path, capsys):
    download.coco(tmp_path)
    capsys.readouterr()
    next((tmp_path / "images" / "val2017").iterdir()).unlink()
    with pytest.raises(InputError, match=rf"val2017 holds {IMAGES - 1} of {IMAGES} photos; delete it"):
        download.coco(tmp_path)
    assert "is ready" not in capsys.readouterr().out


def test_a_root_that_is_a_file_is_not_to_be_tried_again(coco, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/coco cannot be written: .*; name another folder\.$"):
        download.coco(tmp_path / "file" / "coco")


def test_a_disk_that_fills_up_while_downloading_is_one_sentence(coco, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # no file can grow beyond
    try:
        with pytest.raises(InputError, match=r"cannot be written: .* run the same command again"):
            download.coco(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "images").exists()
    download.coco(tmp_path)
    assert files_below(tmp_path) == whole()


def test_a_disk_that_fills_up_while_unpacking_leaves_nothing_half_unpacked(coco, tmp_path, monkeypatch):
    full = True

    def copy(source, target, _length):
        if full and source.name == f"train2017/{IMAGES - 1:012d}.jpg":
            raise OSError(28, "No space left on device")
        target.write(source.read())

    monkeypatch.setattr(fetching.shutil, "copyfileobj", copy)
    with pytest.raises(InputError, match="No space left on device"):
        download.coco(tmp_path)
    assert not (tmp_path / "images" / "train2017").exists()
    assert not list(tmp_path.rglob("*.unpacking"))
    full = False
    sent = coco.sent["/zips/train2017.zip"]
    download.coco(tmp_path)
    assert coco.sent["/zips/train2017.zip"] == sent
    assert files_below(tmp_path) == whole()


@pytest.mark.parametrize("name", ["../../outside.jpg", "/tmp/outside.jpg", "val2017/../../outside.jpg"])
def test_a_zip_that_writes_outside_of_its_folder_is_refused(coco, tmp_path, name):
    image = jpeg(8, 8)
    publish(coco, "zips/val2017.zip", zipped({"val2017/000000000100.jpg": image, name: image}))
    root = tmp_path / "a" / "b" / "coco"
    with pytest.raises(InputError, match=r"val2017.zip has an entry that would be written outside of its folder"):
        download.coco(root)
    assert not (root / "images" / "val2017").exists()
    assert not list(tmp_path.rglob("outside.jpg"))


def test_a_damaged_zip_leaves_nothing(coco, tmp_path):
    data = bytearray(coco.files["/zips/val2017.zip"])
    data[200] ^= 255  # inside the first photo: its CRC no longer agrees
    publish(coco, "zips/val2017.zip", bytes(data))
    with pytest.raises(InputError, match=r"val2017.zip is not an intact zip archive: .*CRC"):
        download.coco(tmp_path)
    assert not (tmp_path / "images" / "val2017").exists()


def test_a_zip_without_what_it_should_hold_is_one_sentence(coco, tmp_path):
    publish(coco, "zips/val2017.zip", zipped({"something.txt": b"else"}))
    with pytest.raises(InputError, match=r"val2017.zip holds no val2017/"):
        download.coco(tmp_path)


def test_ctrl_c_stops_at_once_and_keeps_what_came(coco, tmp_path):
    publish(coco, "zips/train2017.zip", zipped({"train2017/a.jpg": os.urandom(4 << 20)}))
    coco.pause = 0.2  # a second for 5 of its 64 pieces
    part = tmp_path / ".download" / "train2017.zip.part"
    interrupted_at = []

    def interrupt():
        while not (part.exists() and part.stat().st_size):
            time.sleep(0.01)
        interrupted_at.append(time.monotonic())
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        download.coco(tmp_path)
    assert time.monotonic() - interrupted_at[0] < 2
    assert 0 < part.stat().st_size < 4 << 20


def test_the_first_images_of_each_split(coco, tmp_path):
    download.coco(tmp_path, limit=2)
    images = {f"images/{s}2017/{100 * n + i:012d}.jpg" for n, s in enumerate(SPLITS) for i in range(2)}
    assert files_below(tmp_path) == images | {f"annotations/{name}" for name in NAMES}
    train = document(tmp_path, "captions_train2017.json")
    assert [image["id"] for image in train["images"]] == [0, 1]
    assert {a["image_id"] for a in train["annotations"]} == {0, 1}
    assert len(train["annotations"]) == 10
    assert train["info"] == {"year": 2017, "limit": 2}
    test = document(tmp_path, "image_info_test2017.json")
    assert "annotations" not in test
    assert len(test["images"]) == 2
    assert not [path for path, _ in coco.requests if path.startswith("/zips")]


def test_a_limit_beyond_the_split_takes_all_of_it(coco, tmp_path, monkeypatch):
    needed = []
    monkeypatch.setattr(download, "require_space", lambda _, size: needed.append(size))
    download.coco(tmp_path, limit=1000)
    assert needed[-1] == 3 * IMAGES * download.IMAGE_BYTES
    assert files_below(tmp_path) == whole()


def test_images_are_downloaded_many_at_once(coco, tmp_path):
    coco.pause = 0.1
    download.coco(tmp_path, limit=IMAGES)
    assert coco.max_at_once >= 8


def test_an_image_that_is_gone_is_named_and_the_others_stay(coco, tmp_path):
    del coco.files["/train2017/000000000001.jpg"]
    with pytest.raises(InputError, match=r"1 photos could not .*/train2017/000000000001.jpg \(.*404"):
        download.coco(tmp_path, limit=3)
    train = document(tmp_path, "captions_train2017.json")
    assert [image["id"] for image in train["images"]] == [0, 2]
    assert {a["image_id"] for a in train["annotations"]} == {0, 2}
    assert len(list((tmp_path / "images" / "train2017").iterdir())) == 2
    assert len([p for p, _ in coco.requests if p == "/train2017/000000000001.jpg"]) == 1


def test_an_image_that_is_something_else_is_named(coco, tmp_path):
    coco.files["/val2017/000000000100.jpg"] = b"<html>Not found</html>"
    coco.files["/val2017/000000000101.jpg"] = jpeg(5, 5)
    with pytest.raises(InputError, match=r"2 photos could not .*it is not a photo.*it has 5 x 5 pixels"):
        download.coco(tmp_path, limit=3)
    assert len(document(tmp_path, "captions_val2017.json")["images"]) == 1


def test_an_image_whose_connection_breaks_is_retried(coco, tmp_path):
    coco.cut_after["/val2017/000000000100.jpg"] = [100, 100]
    coco.status["/val2017/000000000101.jpg"] = [500]
    download.coco(tmp_path, limit=3)
    image = tmp_path / "images" / "val2017" / "000000000100.jpg"
    assert image.read_bytes() == coco.files["/val2017/000000000100.jpg"]


def test_an_image_that_came_damaged_once_is_asked_for_again(coco, tmp_path, monkeypatch):
    answers = iter([b"\xff\xd8\xff cut off"])

    async def read_damaged(*arguments, **options):
        return next(answers, None) or await fetching.read(*arguments, **options)

    monkeypatch.setattr(download, "read", read_damaged)
    download.coco(tmp_path, limit=3)
    assert len(list((tmp_path / "images").rglob("*.jpg"))) == 9


def test_images_downloaded_before_the_network_failed_serve_the_next_run(coco, tmp_path):
    coco.status["/test2017/000000000202.jpg"] = [500] * fetching.ATTEMPTS
    with pytest.raises(InputError, match=r"000000000202.jpg cannot be downloaded: .*500.* run the same"):
        download.coco(tmp_path, limit=3)
    assert not (tmp_path / "annotations").exists()
    assert not (tmp_path / "images").exists()
    came = {p.name for p in (tmp_path / ".download" / "images").rglob("*.jpg")}
    coco.requests.clear()
    download.coco(tmp_path, limit=3)
    assert {path.rsplit("/")[-1] for path, _ in coco.requests}.isdisjoint(came)
    assert not [path for path, _ in coco.requests if path.endswith(".zip")]
    assert len(document(tmp_path, "image_info_test2017.json")["images"]) == 3


def test_photos_that_could_not_be_downloaded_are_tried_again(coco, tmp_path):
    content = coco.files.pop("/val2017/000000000100.jpg")
    for _ in range(2):
        with pytest.raises(InputError, match=r"1 photos could not .*00100\.jpg .*; run the same command again"):
            download.coco(tmp_path, limit=3)
        assert len(document(tmp_path, "captions_val2017.json")["images"]) == 2
    coco.files["/val2017/000000000100.jpg"] = content
    coco.requests.clear()
    download.coco(tmp_path, limit=3)
    assert coco.requests == [("/val2017/000000000100.jpg", None)]
    assert len(document(tmp_path, "captions_val2017.json")["images"]) == 3
    assert not (tmp_path / ".download").exists()


def test_two_downloads_into_one_folder_are_one_too_many(coco, tmp_path):
    with (
        lock_output(tmp_path / "coco" / ".download"),
        pytest.raises(InputError, match="being written by another process; wait for it or name another --root"),
    ):
        download.coco(tmp_path / "coco")
    assert coco.requests == []


@pytest.mark.parametrize("options", [{"limit": 2}, {"year": 2014}])
def test_an_unfinished_download_is_not_deleted_by_one_with_other_options(coco, tmp_path, options):
    coco.cut_after["/zips/train2017.zip"] = [1000, *[0] * fetching.ATTEMPTS]
    with pytest.raises(InputError, match="cannot be downloaded"):
        download.coco(tmp_path)
    shutil.rmtree(tmp_path / "annotations", ignore_errors=True)
    for path in (tmp_path / ".download").glob("annotations*"):
        path.unlink()
    with pytest.raises(InputError, match=r"2017\.zip.* is of an unfinished download with other options; finish it, or"):
        download.coco(tmp_path, **options)
    assert (tmp_path / ".download" / "train2017.zip.part").exists()


@pytest.mark.parametrize("options", [{}, {"limit": 3}])
def test_images_may_lie_on_another_disk(coco, tmp_path, monkeypatch, options):
    replace = os.replace

    def replace_on_one_disk(source, target):
        if ".download" in str(source) and "/images/" in str(target) and ".download" not in str(target):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(source, target)

    monkeypatch.setattr(fetching.os, "replace", replace_on_one_disk)
    download.coco(tmp_path, **options)
    expected = {name for name in whole() if not options or name.endswith(".json") or int(name[-6:-4]) < 3}
    assert files_below(tmp_path) == expected


def test_a_limited_download_does_not_pass_for_another(coco, tmp_path):
    download.coco(tmp_path, limit=2)
    for limit in (None, 3):
        with pytest.raises(InputError, match="holds the first 2 photos of each split"):
            download.coco(tmp_path, limit=limit)
    coco.requests.clear()
    download.coco(tmp_path, limit=2)
    assert coco.requests == []


@pytest.mark.parametrize("content", ["[1]", '{"info": 5}', "[" * 100_000, "\0"])
def test_annotations_of_another_shape_are_one_sentence(tmp_path, content):
    path = tmp_path / "annotations" / "captions_train2017.json"
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(InputError, match=r"captions_train2017\.json is not an annotation file of COCO"):
        download.coco(tmp_path)


def test_all_images_do_not_pass_for_a_limited_download(coco, tmp_path):
    download.coco(tmp_path)
    with pytest.raises(InputError, match="holds all photos"):
        download.coco(tmp_path, limit=2)


def test_an_unfinished_limited_download_is_not_taken_for_a_whole_one(coco, tmp_path):
    coco.status["/test2017/000000000200.jpg"] = [500] * fetching.ATTEMPTS
    with pytest.raises(InputError, match="cannot be downloaded"):
        download.coco(tmp_path, limit=1)
    with pytest.raises(InputError, match="unfinished download with --limit"):
        download.coco(tmp_path)


def test_another_data_set_s_folder_is_refused(coco, tmp_path):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_train.json").write_text("{}")
    with pytest.raises(InputError, match=r"holds another data set \(captions_train\.json\); name another --root"):
        download.coco(tmp_path)


def test_a_data_set_is_of_one_year(coco, tmp_path):
    download.coco(tmp_path, limit=1)
    with pytest.raises(InputError, match="holds COCO 2017"):
        download.coco(tmp_path, year=2014)


def test_command_line(coco, tmp_path, run_here):
    run = partial(run_here, "download.py", download.main)
    root = str(tmp_path / "coco")
    code, out, err = run("coco", "--root", root, "--year", "2017", "--limit", "2")
    assert (code, out, err) == (0, f"{root} is ready: python train.py --data {root}\n", "")
    code, _, err = run("coco", "--root", root, "--limit", "0")
    assert (code, err) == (2, "error: --limit must be at least 1, not 0.\n")
    del coco.files["/val2017/000000000100.jpg"]
    code, out, err = run("coco", "--root", str(tmp_path / "other"), "--limit", "2")
    assert code == 2
    assert "is ready" in out
    assert err.count("\n") == 1


def test_an_image_of_another_format_is_not_opened(coco, tmp_path, monkeypatch):
    ghostscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 90 80\n%%EndComments\nshowpage\n%%EOF\n"
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_args, **_keywords: pytest.fail("Ghostscript runs"))
    png = io.BytesIO()
    Image.new("RGB", (91, 80)).save(png, "PNG")
    progressive = io.BytesIO()
    Image.new("RGB", (92, 80)).save(progressive, "JPEG", progressive=True)
    coco.files["/val2017/000000000100.jpg"] = ghostscript
    coco.files["/val2017/000000000101.jpg"] = png.getvalue()
    scan = progressive.getvalue().partition(b"\xff\xda")
    coco.files["/val2017/000000000102.jpg"] = scan[0] + (scan[1] + scan[2]) * 200
    coco.files["/val2017/000000000103.jpg"] = jpeg(65_000, 8)
    coco.files["/val2017/000000000104.jpg"] += b"x" * download.MAX_IMAGE_BYTES
    with pytest.raises(InputError, match="5 photos could not") as error:
        download.coco(tmp_path, limit=6)
    for reason in (
        "100.jpg (it is not",
        "101.jpg (it is not",
        "102.jpg (it is not",
        "103.jpg (it has 65000 x 8 pixels",
    ):
        assert reason in str(error.value)
    assert "104.jpg (the server sends more than 4,000,000 bytes" in str(error.value)
    assert [image["id"] for image in document(tmp_path, "captions_val2017.json")["images"]] == [105]


# Published weights


@pytest.fixture(scope="module")
def triple() -> tuple[dict, dict, list[str]]:
    """Encoder and decoder as the original names them, with random weights, and words."""
    torch.manual_seed(0)
    words = ["<start>", "<end>", "<unk>", *(f"w{i}" for i in range(37))]
    children = list(torchvision.models.resnet50(weights=None).children())[:-1]
    encoder = torch.nn.ModuleDict({"resnet": torch.nn.Sequential(*children), "embed": torch.nn.Linear(2048, 16)})
    decoder = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(len(words), 16),
            "lstm": torch.nn.LSTM(16, 24, 1, batch_first=True),
            "linear": torch.nn.Linear(24, len(words)),
        }
    )
    return encoder.state_dict(), decoder.state_dict(), words


def saved(state: dict) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def vocab_pickle(words: list[str]) -> bytes:
    state = pickle.dumps({"word2idx": {w: i for i, w in enumerate(words)}}, protocol=3)[2:-1]
    return b"\x80\x03cvocabulary\nVocabulary\n)\x81" + state + b"b."


@pytest.fixture
def published(server, triple, monkeypatch):
    pytest.importorskip("gdown")
    encoder, decoder, words = triple
    inside = {
        "captioning_models/encoder-3.pkl": saved(encoder),
        "captioning_models/decoder-3.pkl": saved(decoder),
    }
    server.files["/weights"] = zipped({"captioning_models/": b"", **inside, "captioning_models/notes.txt": b""})
    vocab = server.files["/vocab.pkl"] = vocab_pickle(words)
    monkeypatch.setattr(download, "WEIGHTS_URL", f"{server.url}/weights")
    monkeypatch.setattr(download, "VOCAB_URL", f"{server.url}/vocab.pkl")
    monkeypatch.setattr(download, "VOCAB_BYTES", len(vocab))
    monkeypatch.setattr(download, "VOCAB_SHA256", hashlib.sha256(vocab).hexdigest())
    return server


@pytest.mark.slow
def test_published_weights_become_a_models_folder(published, triple, tmp_path):
    folder = tmp_path / "models" / "published"
    download.weights(folder)
    assert files_below(folder) == {"captioner.json", "encoder-3.pkl", "decoder-3.pkl"}
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["published"]
    encoder, decoder, vocabulary, _ = checkpoint.load_model(folder)
    assert vocabulary.words == triple[2]
    for module, state in ((encoder, triple[0]), (decoder, triple[1])):
        assert set(module.state_dict()) == set(state)
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())


def test_weights_whose_connection_is_cut_go_on_in_the_next_run(published, tmp_path):
    published.cut_after["/weights"] = [200_000]
    folder = tmp_path / "published"
    with pytest.raises(InputError, match="/weights cannot be downloaded"):
        download.weights(folder)
    assert not folder.exists()
    download.weights(folder)
    assert (folder / "captioner.json").exists()


def test_a_page_instead_of_the_weights_is_one_sentence(published, tmp_path):
    published.files["/weights"] = b"<html>Quota exceeded</html>"
    with pytest.raises(InputError, match="did not return an intact zip archive"):
        download.weights(tmp_path / "published")
    assert not (tmp_path / "published").exists()


def test_another_vocabulary_than_the_published_one_is_refused(published, tmp_path):
    data = published.files["/vocab.pkl"]
    published.files["/vocab.pkl"] = data.replace(b"w7", b"v7")
    with pytest.raises(InputError, match=r"vocab.pkl has the SHA-256"):
        download.weights(tmp_path / "published")


def test_weights_that_unpack_to_more_than_is_due_are_refused(published, tmp_path, monkeypatch):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("encoder-3.pkl", "decoder-3.pkl"):
            archive.writestr(name, bytes(1_000_000))
    published.files["/weights"] = buffer.getvalue()
    monkeypatch.setattr(download, "WEIGHTS_BYTES", 100_000)
    with pytest.raises(InputError, match=r"weights.zip unpacks to [\d,]+ bytes, more than the 100,000 expected"):
        download.weights(tmp_path / "published")


@pytest.mark.slow
def test_weights_that_are_larger_or_slower_than_is_due_are_not_downloaded_whole(published, tmp_path, monkeypatch):
    published.files["/weights"] = bytes(50_000_000)
    monkeypatch.setattr(download, "WEIGHTS_BYTES", 1_000_000)
    with pytest.raises(InputError, match="/weights cannot be downloaded: it has more than 1,000,000 bytes"):
        download.weights(tmp_path / "published")
    assert published.sent["/weights"] < 20_000_000  # what the connection holds is sent, too
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(download, "WEIGHTS_SECONDS", 1)
    published.pause = 0.7
    with pytest.raises(InputError, match="cannot be downloaded: it takes more than 1 seconds; run the same command"):
        download.weights(tmp_path / "published")


def test_an_old_gdown_is_one_sentence(published, tmp_path, monkeypatch):
    import gdown

    monkeypatch.setattr(gdown, "download", lambda url, output, quiet, resume: None)
    with pytest.raises(InputError, match=r"the installed gdown is older than 6\.5: pip install --upgrade gdown"):
        download.weights(tmp_path / "published")


def test_without_gdown_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gdown", None)
    with pytest.raises(InputError, match="pip install gdown"):
        download.weights(tmp_path / "published")


def test_an_existing_model_is_not_touched(published, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        download.weights(tmp_path)
    assert published.requests == []


@pytest.mark.parametrize("function", [download.coco, download.weights, importers.import_weights])
def test_every_command_is_documented(function):
    assert "Args:" in function.__doc__
