"""Photos and captions in tar files, for captioning and for training."""

import io
import json
import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from conftest import EIGHT, draw_noise, write_split
from PIL import Image
from test_images import png_header

from captioning import shards
from captioning.captioner import Captioner
from captioning.captions import MAX_CAPTION
from captioning.errors import InputError, warn_once
from captioning.images import find_unreadable, read_image
from captioning.listing import find_images
from captioning.pixels import MAX_ASPECT
from captioning.preparation import warn_of_shared_images
from captioning.reports import Report
from captioning.shards import index_shards, list_images, read_captions_of, read_samples
from captioning.training import TrainingConfig, train
from data_loader import CaptionDataset
from vocabulary import Vocabulary


def encoded(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    draw_noise(seed).save(file, form)
    return file.getvalue()


def write_shard(path: Path, samples: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    samples = [{"__key__": f"some/{i:03}", "png": encoded(i), "txt": f"picture {i}"} for i in range(5)]
    samples.insert(2, {"__key__": "about", "json": {"no": "photo"}})
    samples.append({"__key__": "last", "JPG": encoded(9, "JPEG"), "cls": 3, "mask.png": encoded(8)})
    return write_shard(tmp_path / "a.tar", samples)


def pack(path: Path, files: list[tuple[str, bytes]]) -> Path:
    """Write a tar file of these names and contents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_samples_are_webdataset_s_own(shard: Path):
    expected = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    samples = list(read_samples(shard, Report()))
    assert len(samples) == len(expected) == 7
    for (image, texts), whole in zip(samples, expected, strict=True):
        for member in [*([image] if image else []), *texts.values()]:
            assert member.name.startswith(whole["__key__"])
            assert member.read() == whole[member.name.split(".", 1)[1].lower()]


def test_validation_images_in_tar_files_that_are_trained_on_are_warned_of(
    tmp_path: Path, capsys: pytest.CaptureFixture
):
    for split, images in (("train", (0, 1, 2)), ("val", (3, 1))):
        samples = [{"__key__": f"{key:06}", "png": encoded(key), "txt": "a dog"} for key in images]
        write_shard(tmp_path / f"{split}-0.tar", samples)
    vocab = Vocabulary.build(["a dog"], 1)
    data, val = (CaptionDataset(tmp_path, split, vocab=vocab, cache=tmp_path / "cache") for split in ("train", "val"))
    warn_once.cache_clear()
    warn_of_shared_images(data, val)
    assert (
        f"validation images such as {tmp_path}/val-0.tar/000001.png are also training images" in capsys.readouterr().err
    )


def test_tars_that_are_left_out_of_a_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    for i, name in enumerate(("train-000", "train-001", "trainval-000", "train_val-000", "val-000")):
        write_shard(tmp_path / f"{name}.tar", [{"__key__": str(i), "png": encoded(i), "txt": f"picture {i}"}])
    (tmp_path / "train-001.tar").rename(tmp_path / "train-001.TAR")
    write_shard(tmp_path / "trainers.tar", [{"__key__": "a", "png": encoded(9), "txt": "shoes"}])
    (tmp_path / "train-002.tar.gz").write_bytes(b"")
    warn_once.cache_clear()
    data = CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=tmp_path / "cache")
    assert [Path(path.shard).name for path in data.paths] == ["train-000.tar", "train-001.TAR"]
    error = capsys.readouterr().err
    assert "train_val-000.tar is left out of the train split, because its name contains more than one split" in error
    assert "trainers.tar is left out of the train split, because its name is another word" in error
    assert "train-002.tar.gz is left out of the train split; unpack it" in error
    write_shard(tmp_path / "value-0.tar", [{"__key__": "a", "png": encoded(8), "txt": "a number"}])
    (tmp_path / "val-000.tar").unlink()
    assert len(CaptionDataset(tmp_path, "val", vocab=data.vocab, cache=tmp_path / "cache")) == 1
    assert "value-0.tar is taken as the val split, though its name is another word" in capsys.readouterr().err


def test_tars_beside_an_annotation_file_of_their_split_are_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    write_shard(tmp_path / "train-000.tar", [{"__key__": "a", "png": encoded(0), "txt": "a ball"}])
    (tmp_path / "annotations").mkdir()
    captions = [{"id": 1, "image_id": 1, "caption": "a cat"}]
    document = {"images": [{"id": 1, "file_name": "0.png"}], "annotations": captions}
    (tmp_path / "annotations" / "captions_train.json").write_text(json.dumps(document))
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache", must_exist=False)
    assert list(data.references().values()) == [["a cat"]]
    assert "train-000.tar is not read, because" in capsys.readouterr().err


def test_a_shard_s_images_are_read_where_they_lie(shard: Path):
    images = list(list_images(shard))
    assert [image.name for image in images] == [*(f"some/{i:03}.png" for i in range(5)), "last.JPG"]
    for i in range(5):
        assert np.array_equal(read_image(images[i]), draw_noise(i))
    assert str(images[0]) == f"{shard}/some/000.png"
    shard.write_bytes(shard.read_bytes().replace(encoded(1), bytes(len(encoded(1)))))
    with pytest.raises(InputError, match=r"a\.tar/some/001\.png cannot be read as an image"):
        read_image(images[1])


PNG = encoded(0)
BALL = b"a red ball"
LONG = b"a" * (MAX_CAPTION + 1)
BESIDE = [("a.png", PNG), ("a.txt", b"a kite")]  # packed beside each of the following


@pytest.mark.parametrize(
    ("files", "expected", "message"),
    [
        pytest.param(
            [("0.txt", b"a dog\n\n two  cats \r\na cow\rx")], ["a dog", "two cats", "a cow", "x"], "", id="lines"
        ),
        pytest.param([("0.json", b'{"caption": "a cat"}')], ["a cat"], "", id="json"),
        pytest.param(
            [("0.json", b'{"captions": ["a", "", "b", null]}')],
            ["a", "b"],
            r"left out 2 empty captions, the first is '.*train-0\.tar/0\.json, caption 2'",
            id="json with several",
        ),
        pytest.param([("0.json", b'{"captions": "a\\r\\nb"}')], ["a", "b"], "", id="captions in lines"),
        pytest.param([("0.json", b'{"captions": null, "caption": "x"}')], ["x"], "", id="null captions"),
        pytest.param([("0.json", b'{"captions": [""], "caption": "x"}')], ["x"], "", id="empty captions"),
        pytest.param([("0.txt", b"0 0.5 0.5\n"), ("0.json", b'{"caption": "x"}')], ["x"], "", id="labels"),
        pytest.param([("0.txt", b"a dog\na cat"), ("0.json", b"{")], ["a dog", "a cat"], "", id="broken json"),
        pytest.param(
            [("0.txt", b"a dog\n\nnan\na cat")],
            ["a dog", "a cat"],
            r"left out 1 empty caption: '.*train-0\.tar/0\.txt, line 3'",
            id="a missing line",
        ),
        pytest.param([("0.caption", BALL)], ["a red ball"], "", id="another suffix"),
        pytest.param([("0.TXT", BALL)], ["a red ball"], "", id="upper case"),
        pytest.param(
            [("0.json", b'{"caption": "a cat"}'), ("0.txt", BALL)],
            ["a red ball"],
            r"left out 1 file of captions, since another file of the same image is used: .*train-0\.tar/0\.json",
            id="text before json",
        ),
        pytest.param([("0.json", b'{"caption": "a red ball"}'), ("0.txt", BALL)], ["a red ball"], "", id="both"),
        pytest.param([("0.txt", b" \n"), ("0.json", b'{"caption": "a cat"}')], ["a cat"], "", id="empty text"),
        pytest.param([("0.txt", "a café".encode("utf-8-sig"))], ["a café"], "", id="byte order mark"),
        pytest.param([("0.txt", "a café".encode("utf-16"))], ["a café"], "", id="UTF-16"),
        pytest.param([("0.json", '{"caption": "a café"}'.encode("utf-8-sig"))], ["a café"], "", id="json with a mark"),
        pytest.param([("0.json", '{"caption": "a café"}'.encode("utf-16"))], ["a café"], "", id="json in UTF-16"),
        *(
            pytest.param([("0.txt", f"a{mark}dog".encode())], ["a dog"], "", id=f"U+{ord(mark):04X}")
            for mark in "\u2028\u2029\u0085\u000b\u000c\u001c"
        ),
        pytest.param([("about.json", b"{}"), ("0.txt", BALL)], ["a red ball"], "", id="json of nothing"),
        pytest.param([], [], r"left out 1 image without captions: .*/0\.png", id="no captions"),
        pytest.param([("0.json", b"[]")], [], "left out 1 image without captions", id="json without captions"),
        pytest.param([("0.json", b'{"caption": null}')], [], "left out 1 image without captions", id="null"),
        pytest.param(
            [("0.cls", b"3"), ("0.txt", BALL)], ["a red ball"], r"left out 1 \.cls file: .*/0\.cls", id="class"
        ),
        pytest.param([("0.txt", BALL), ("1.txt", BALL)], ["a red ball"], r"without an image: .*/1\.txt", id="no image"),
        pytest.param([("0.txt", BALL), ("0.TXT", b"a")], ["a red ball"], r"name of another: .*0\.TXT", id="two texts"),
        pytest.param([("0.jpg", PNG), ("0.txt", BALL)], ["a red ball"], r"name of another: .*/0\.jpg", id="same name"),
        pytest.param(
            [("0.mask.png", PNG), ("0.txt", BALL)], ["a red ball"], r"further image of a sample: .*0\.mask", id="mask"
        ),
        pytest.param([("._0.png", b"Mac"), ("0.txt", BALL)], ["a red ball"], "", id="macOS"),
        pytest.param([("../b.png", PNG), ("0.txt", BALL)], ["a red ball"], r"leads out .*\.\./b\.png", id="parent"),
        pytest.param([("/b.png", PNG), ("0.txt", BALL)], ["a red ball"], r"leads out .*/b\.png", id="absolute"),
        pytest.param(
            [(".", PNG), ("0.txt", BALL)], ["a red ball"], r"left out 1 file without a name: .*/\.'", id="dot"
        ),
        pytest.param(
            [("", PNG), ("0.txt", BALL)], ["a red ball"], r"left out 1 file without a name: .*/'", id="no name"
        ),
        pytest.param([("b\n.png", PNG), ("0.txt", BALL)], ["a red ball"], r"line break: .*/b\\n\.png", id="line break"),
    ],
)
def test_captions_of_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture, files: list[tuple[str, bytes]], expected: list[str], message: str
):
    """What is used is right, and what is skipped is said, the second time from the cache."""
    shard = pack(tmp_path / "train-0.tar", [("0.png", PNG), *files, *BESIDE])
    for _ in range(2):
        warn_once.cache_clear()
        data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
        assert list(data.references().values()) == ([expected] if expected else []) + [["a kite"]]
        errors = capsys.readouterr().err
        assert re.search(message, errors) if message else not errors, errors
        assert errors.count("\n") == bool(message)
    assert [image.name for image in list_images(shard)] == ["0.png", "a.png"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["IMG_1.05.0.png", "IMG_1.05.0.txt", "IMG_1.05.1.png", "IMG_1.05.1.txt"], 2),
        (["0.png", "0.txt", "a.b.png", "a.b.txt"], 2),
        (["0.png", "0.txt", "0.b.png", "0.b.txt"], 2),
        (["0.png", "1.png", "0.txt", "1.txt"], 2),
        (["s0.input.png", "s0.outputs.txt", "s1.input.png", "s1.outputs.txt"], 2),
        (["./v1.0/a/0.png", "./v1.0/a/0.txt", "./v1.0/b/0.png", "./v1.0/b/0.txt"], 2),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_names_of_every_form(tmp_path: Path, capsys: pytest.CaptureFixture, files: list[str], expected: int):
    images = [name for name in files if name.endswith("png")]
    pack(tmp_path / "train-0.tar", [(n, PNG if n in images else f"of {Path(n).stem}".encode()) for n in files])
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert len(data.paths) == expected
    captions = [text for (text,) in data.references().values()]
    assert captions == [f"of {Path(name).stem}".replace("input", "outputs") for name in images]
    assert not capsys.readouterr().err


def test_texts_of_which_any_may_be_the_image_s_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture):
    files = [
        ("2024.01.png", PNG),
        ("2024.02.txt", b"a kite"),
        ("2024.03.txt", b"a boat"),
        ("1.png", PNG),
        ("1.txt", BALL),
    ]
    pack(tmp_path / "train-0.tar", files)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(data.references().values()) == [["a red ball"]]
    error = capsys.readouterr().err
    assert "left out 1 image without captions" in error
    assert "2024.01.png" in error


@pytest.mark.parametrize(("image", "caption"), [("frame_0.5", "frame_0.5.en"), ("a.1024x768", "a.0"), ("0.b", "0.c")])
def test_the_only_text_with_an_image_s_key_is_its_caption(tmp_path: Path, image: str, caption: str):
    pack(tmp_path / "train-0.tar", [(f"{image}.png", PNG), (f"{caption}.txt", BALL)])
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(data.references().values()) == [["a red ball"]]


@pytest.mark.parametrize(
    ("image", "other"),
    [
        ("frame_0.5", "frame_0.7"),
        ("2020.01.02", "2020.01.03"),
        ("a 10.45.00", "a 10.11.12"),
        ("photo.v1", "photo.v2"),
        ("frame_٠.٥", "frame_٠.٧"),
    ],
)
def test_the_text_of_another_number_is_not_the_image_s(
    image: str, other: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    files = [(f"{image}.png", PNG), (f"{other}.txt", b"a kite"), ("1.png", PNG), ("1.txt", BALL)]
    pack(tmp_path / "train-0.tar", files)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(data.references().values()) == [["a red ball"]]
    error = capsys.readouterr().err
    assert f"{image}.png" in error
    assert f"{other}.txt" in error


def test_missing_values_and_line_breaks_as_img2dataset_writes_them(tmp_path: Path):
    whole = json.dumps({"caption": "Vintage lamp\nby Philips"}).encode()
    files = [("0.png", PNG), ("0.txt", b"Vintage lamp\nby Philips"), ("0.json", whole)]
    files += [("1.png", PNG), ("1.txt", b"nan"), ("2.png", PNG), ("2.json", b'{"caption": NaN}')]
    pack(tmp_path / "train-0.tar", files)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(data.references().values()) == [["Vintage lamp by Philips"]]


def test_a_name_in_another_encoding(tmp_path: Path):
    files = [("caf\udce9.png", PNG), ("caf\udce9.txt", BALL)]
    pack(tmp_path / "train-0.tar", files)
    data = CaptionDataset(tmp_path, vocab_threshold=1, cache=tmp_path / "cache")
    assert data.paths[0].name == "caf\\xe9.png"
    assert read_image(data.paths[0]).size == (80, 60)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0.txt", "a café".encode("cp1252"), r"a\.tar/0\.txt, line 1, is not UTF-8 text \(byte 5\)"),
        ("0.json", '{"caption": "a café"}'.encode("cp1252"), r"a\.tar/0\.json is not UTF-8 text"),
        ("0.txt", "一只狗 在跑".encode("utf-16-le"), r"a\.tar/0\.txt"),
        ("0.txt", b"a " * (1 << 20), r"a\.tar/0\.txt has 2,097,152 bytes; captions of at most 1,048,576"),
        ("0.json", b" " * (2 << 20), r"a\.tar/0\.json has 2,097,152 bytes"),
        ("0.json", b"{", r"a\.tar/0\.json is not JSON"),
        ("0.json", b'{"caption": "a", "caption": "b"}', r"a\.tar/0\.json is not JSON \('caption' occurs twice"),
        ("0.json", b"[" * 100_000, r"a\.tar/0\.json is not JSON"),
        ("0.txt", b"{'caption': 'a ball'}", r"0\.txt, line 1, has a caption that is not text: \{'caption'"),
        ("0.json", b'{"captions": ["a", 3]}', r"0\.json, caption 2, has a caption that is not text: 3"),
        ("0.json", rb'{"caption": "a \ud800"}', r"0\.json, caption 1, has a caption with half of a surrogate pair"),
        ("0.txt", b"a dog\n" + LONG, r"a\.tar/0\.txt, line 2, has a caption of more than 5,000 characters; shorten it"),
        ("0.json", b'{"captions": ["a", "%b"]}' % LONG, r"a\.tar/0\.json, caption 2, has a caption of more than"),
    ],
)
def test_captions_that_cannot_be_read_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    ((_, texts),) = read_samples(pack(tmp_path / "a.tar", [("0.png", PNG), (name, content)]), Report())
    with pytest.raises(InputError, match=message):
        read_captions_of(texts, Report())


def test_names_of_another_unicode_form_are_of_one_sample(tmp_path: Path):
    shard = pack(tmp_path / "a.tar", [("cafe\u0301.png", PNG), ("caf\u00e9.txt", BALL)])
    ((image, texts),) = read_samples(shard, Report())
    assert image is not None
    assert read_captions_of(texts, Report()) == ["a red ball"]


def test_links_in_a_tar_file_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture):
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
        shard = pack(tmp_path / f"{kind.decode()}.tar", BESIDE)
        with tarfile.open(shard, "a") as tar:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = kind, "a.png"
            tar.addfile(link)
        assert [image.name for image in list_images(shard)] == ["a.png"]
        assert re.search(r"left out 1 link or special file: .*/link\.png", capsys.readouterr().err)


@pytest.mark.parametrize("harm", ["in a header", "after a header", "in a file", "no end", "a damaged header", "joined"])
def test_a_tar_file_that_is_not_whole_is_an_error(tmp_path: Path, harm: str):
    shard = pack(tmp_path / "a.tar", [(f"{i}.txt", b"x" * 600) for i in range(3)])  # each 512 + 1024 bytes
    data = shard.read_bytes()
    assert len(list(read_samples(shard, Report()))) == 3
    cuts = {"in a header": 3072 + 100, "after a header": 3072 + 512, "in a file": 3072 + 700, "no end": 4608}
    if harm == "a damaged header":
        data = data[: 3072 + 100] + b"damage" + data[3072 + 106 :]
    elif harm == "joined":
        data += data
    shard.write_bytes(data[: cuts.get(harm)])
    with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar file \(.+\)\.$"):
        list(read_samples(shard, Report()))


def test_a_negative_size_in_a_tar_file_is_an_error(tmp_path: Path):
    first, second = tarfile.TarInfo("a.jpg"), tarfile.TarInfo("b.jpg")
    second.size = -512  # tarfile, which starts again at the same header, would never end
    shard = tmp_path / "a.tar"
    shard.write_bytes(first.tobuf() + second.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar file \(.+\)\.$"):
        list(read_samples(shard, Report()))


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_in_a_tar_file_that_would_fill_the_memory_is_an_error(tmp_path: Path, kind: bytes):
    header, shard = tarfile.TarInfo("a"), tmp_path / "a.tar"
    header.type, header.size = kind, 2 << 30
    with open(shard, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(3 << 30)
    with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar file \(the header of 'a' has 2,147,483,648"):
        list(read_samples(shard, Report()))


def test_tar_files_are_used_without_a_cache(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    data = CaptionDataset(packed, "val", vocab_threshold=1, cache=tmp_path / "file" / "cache")
    assert len(data.references()) == len(data.paths) == 3
    assert len(re.findall("cannot be written", capsys.readouterr().err)) == 1


def test_shards_are_captioned_like_their_images(trained: Path, shard: Path, tmp_path: Path):
    loose = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(loose):
        draw_noise(i).save(path)
    captioner = Captioner.load(trained)
    assert [c.text for c in captioner(find_images([shard]))][:5] == [c.text for c in captioner(loose)]
    assert find_images([tmp_path]) == [*loose, *list_images(shard)]  # 0.png ... 4.png, a.tar


COMPRESSIONS = {"gz": "a gzip archive", "bz2": "a bzip2 archive", "xz": "an xz archive"}


@pytest.mark.parametrize("harm", ["text", "torn", "gone", *COMPRESSIONS, "empty"])
def test_what_is_no_shard_is_named(shard: Path, harm: str):
    data = shard.read_bytes()
    reason = ".+"
    if harm == "text":
        shard.write_text("no tar")
    elif harm == "torn":
        shard.write_bytes(data[:1700])
    elif harm == "gone":
        shard.unlink()
    elif harm in COMPRESSIONS:
        reason = f"it is {COMPRESSIONS[harm]}; unpack it first"
        with tarfile.open(shard, f"w:{harm}") as tar:
            tar.addfile(tarfile.TarInfo("a.png"))
    else:
        with tarfile.open(shard, "w") as tar:
            for _ in range(2 if harm == "twice" else 0):
                tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(InputError, match=rf"a\.tar (cannot be read as a tar file \({reason}\)|holds no images; .+)\.$"):
        find_images([shard])


# Training


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Eight pictures with a caption each, in two tar files, and three to validate on; beside them what is neither."""
    texts = list(EIGHT.values())
    samples = [{"__key__": f"{i}", "png": encoded(i), "txt": f"{texts[i]}\n{texts[i]}"} for i in range(8)]
    samples.insert(3, {"__key__": "without", "png": encoded(20)})
    samples.insert(5, {"__key__": "about", "json": {"caption": "no photo"}})
    write_shard(tmp_path / "packed" / "train-000000.tar", samples[:4])
    write_shard(tmp_path / "packed" / "train-000001.tar", samples[4:])
    held_out = [{"__key__": f"{i}", "png": encoded(i), "json": {"captions": texts[i : i + 2]}} for i in range(3)]
    write_shard(tmp_path / "packed" / "val-000000.tar", held_out)
    return tmp_path / "packed"


@pytest.fixture
def loose(packed: Path, tmp_path: Path) -> Path:
    """The same as `packed`, laid out as COCO is."""
    folder = tmp_path / "loose"
    texts = list(EIGHT.values())
    write_split(folder, "train", {f"{i}.png": [texts[i]] * 2 for i in range(8)})
    write_split(folder, "val", {f"{i}.png": texts[i : i + 2] for i in range(3)})
    for split, count in (("train", 8), ("val", 3)):
        for i in range(count):
            draw_noise(i).save(folder / "images" / split / f"{i}.png")
    return folder


def test_a_data_set_in_shards_is_the_same_data_set(packed: Path, loose: Path, tmp_path: Path):
    for mode in ("train", "val"):
        a, b = (CaptionDataset(folder, mode, vocab_threshold=1, cache=tmp_path / "cache") for folder in (loose, packed))
        assert [Path(path.name).name for path in b.paths] == [path.name for path in a.paths]
        for one, other in zip(a.paths, b.paths, strict=True):
            assert np.array_equal(read_image(one), read_image(other))
        assert a.vocab.words == b.vocab.words
        assert (a.tokens.tolist(), a.image_rows.tolist()) == (b.tokens.tolist(), b.image_rows.tolist())
        assert list(a.references().values()) == list(b.references().values())
    a.drop([1])
    b.drop([1])
    assert [path.name for path in b.paths] == [path.name for path in a.paths] == ["0.png", "2.png"]
    assert b.paths[-1].read() == encoded(2)


def test_shards_are_indexed_once(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        second = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    assert list(second.paths) == list(first.paths)
    write_shard(packed / "train-000001.tar", [{"__key__": "new", "png": encoded(0), "txt": "a kite"}])
    assert [path.name for path in CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache").paths][3:] == [
        "new.png"
    ]


def test_an_image_in_a_shard_that_cannot_be_read_is_named(packed: Path, tmp_path: Path):
    write_shard(packed / "val-000000.tar", [{"__key__": "bad", "png": b"no photo", "txt": "a dog"}])
    data = CaptionDataset(packed, "val", vocab_threshold=1, cache=tmp_path / "cache")
    for _ in range(2):  # the second time from what was kept
        assert "val-000000.tar/bad.png" in str(find_unreadable(data.paths, cache=tmp_path / "cache")[0])


def test_images_in_a_shard_have_the_limits_of_image_files(tmp_path: Path):
    thin = io.BytesIO()
    Image.new("L", (65_000, 1)).save(thin, "PNG")
    pack(tmp_path / "val.tar", [("large.png", png_header(13_000, 12_000, 0)), ("thin.png", thin.getvalue())])
    large, thin = list_images(tmp_path / "val.tar")
    assert read_image(thin, 64).size == (MAX_ASPECT, 1)
    with pytest.raises(InputError, match=r"val\.tar/large\.png .* more than 125 million"):
        read_image(large)


@pytest.mark.slow
@pytest.mark.parametrize("fine_tune", [0, 5])
def test_training_on_shards_is_training_on_the_images(
    small: Callable[..., TrainingConfig],
    packed: Path,
    loose: Path,
    tmp_path: Path,
    tiny_backbone: Callable,
    fine_tune: int,
):
    fields = {
        "vocab_threshold": 1,
        "batch_size": 4,
        "image_size": 32,
        "fine_tune": fine_tune,
        "cache": tmp_path / "cache",
    }
    logs = [train(small(data=data, **fields)) / "training_log.txt" for data in (loose, packed)]
    assert len(logs[0].read_text().splitlines()) >= 4
    assert logs[0].read_bytes() == logs[1].read_bytes()


def test_shards_without_captions_are_refused(tmp_path: Path):
    write_shard(tmp_path / "in" / "train-0.tar", [{"__key__": "a", "png": encoded(0)}])
    with pytest.raises(InputError, match=r"train\*\.tar hold no images with captions"):
        CaptionDataset(tmp_path / "in", cache=tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    with pytest.raises(InputError, match=r"and no val\*\.tar"):
        CaptionDataset(tmp_path / "in", "val", cache=tmp_path / "cache")


@pytest.mark.parametrize("name", ["train-0.tar.gz", "train-0.tgz"])
def test_a_compressed_tar_file_is_named(tmp_path: Path, name: str):
    (tmp_path / name).touch()
    with pytest.raises(InputError, match=rf"no train\*\.tar; unpack {name} to a plain tar file first\.$"):
        CaptionDataset(tmp_path, cache=tmp_path)


def test_what_a_folder_names_is_what_its_index_says(packed: Path, tmp_path: Path):
    data = CaptionDataset(packed, vocab_threshold=1, cache=tmp_path / "cache")
    content = json.loads(data.annotation_file.read_text())
    assert [image["file_name"] for image in content["images"]][2:4] == [
        "train-000000.tar/2.png",
        "train-000001.tar/3.png",
    ]
    assert content["annotations"][1] == {"id": 2, "image_id": 1, "caption": EIGHT["0.png"]}


def test_an_index_is_the_same_wherever_its_folder_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "data"):
        (tmp_path / name).mkdir()
        files = [("0.png", PNG), ("0.txt", BALL), ("0.cls", b"3"), ("0.json", b'{"caption": "a kite"}')]
        files += [("1.png", PNG), ("1.json", b'{"caption": "no", "is_rejected": true}')]
        pack(tmp_path / name / "train-0.tar", [(f"data/{file}", content) for file, content in files])
    folders = (tmp_path / "a", tmp_path / "data", Path("data"))
    one, other, relative = (
        index_shards([folder / "train-0.tar"], "train", Path("cache") / str(i)) for i, folder in enumerate(folders)
    )
    assert one.read_bytes() == other.read_bytes() == relative.read_bytes()
    assert "left out 1 .cls file: 'train-0.tar/data/0.cls'" in one.read_text()
    assert "another file of the same image is used" in one.read_text()


def test_images_are_indexed_again_once_their_format_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    samples = [{"__key__": str(i), "jpg" if i else "heic": encoded(i), "txt": f"picture {i}"} for i in range(3)]
    write_shard(tmp_path / "train-0.tar", samples)
    monkeypatch.setattr(shards, "image_suffixes", lambda: {".jpg"})
    with_cache = {"vocab_threshold": 1, "cache": tmp_path / "cache", "must_exist": False}
    assert len(CaptionDataset(tmp_path, "train", **with_cache).paths) == 2
    document = json.loads(index_shards([tmp_path / "train-0.tar"], "train", tmp_path / "cache").read_text())
    assert "left out 1 .heic file, which `pip install pillow-heif` makes readable" in document["warnings"][0]
    monkeypatch.setattr(shards, "image_suffixes", lambda: {".jpg", ".heic"})
    assert len(CaptionDataset(tmp_path, "train", **with_cache).paths) == 3


def test_marks_in_the_captions_of_tars_are_reported(tmp_path: Path):
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "png": encoded(0), "txt": "<start> a ball &amp; a cat"}])
    document = json.loads(index_shards([tmp_path / "train-0.tar"], "train", tmp_path / "cache").read_text())
    assert any("1 caption with marks such as <start>" in line for line in document["warnings"])


def test_numbered_captions_of_a_json_file_are_read(tmp_path: Path):
    content = json.dumps({"caption": "a ball", "caption_1": 0.93, "caption_2": "one ball", "url": "x"}).encode()
    write_shard(tmp_path / "train-0.tar", [{"__key__": "a", "png": encoded(0), "json": content}])
    document = json.loads(index_shards([tmp_path / "train-0.tar"], "train", tmp_path / "cache").read_text())
    assert [row["caption"] for row in document["annotations"]] == ["a ball", "one ball"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README.txt", "Photos by José".encode("cp1252")),
        ("LICENSE.txt", b"word " * 2000),
        ("meta.json", b"{"),
        ("dataset.json", b'{"caption": 3}'),
    ],
)
def test_files_of_no_image_need_not_be_captions(tmp_path: Path, name: str, content: bytes):
    pack(tmp_path / "train-0.tar", [("0.png", PNG), ("0.txt", BALL), (name, content)])
    document = json.loads(index_shards([tmp_path / "train-0.tar"], "train", tmp_path / "cache").read_text())
    assert [row["caption"] for row in document["annotations"]] == [BALL.decode().strip()]
    assert any(f"left out 1 file of no image: 'train-0.tar/{name}'" in line for line in document["warnings"])
