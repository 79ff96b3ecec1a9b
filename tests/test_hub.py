"""Sharing and fetching, through the real library against a Hub that runs here."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import pickle
import shutil
import socket
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import huggingface_hub
import pytest
import torch
import torchvision
import yaml
from conftest import KINDS, HTTPServer, build_kind, build_tiny, write_kind
from huggingface_hub import constants

import caption
from captioning import hub
from captioning.captioner import Captioner, Decoding
from captioning.checkpoint import load_model, read_description, write_description
from captioning.errors import InputError
from captioning.training import TrainingConfig, train
from captioning.weights import read_state_dict
from model import DECODERS

pytestmark = pytest.mark.slow

COMMIT = "0123456789012345678901234567890123456789"


class Hub:
    """Repositories as folders, served and filled as the Hub does; `asked` lists the files downloaded."""

    def __init__(self, root: Path):
        self.root, self.asked, self.status = root, [], 0
        self.storage: dict[str, bytes] = {}
        self.commits: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self, status: int, content: bytes = b"", **headers: str) -> None:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def do_GET(self) -> None:
                path = urlsplit(self.path).path.removeprefix("/api/models").strip("/").split("/")
                folder = hub.root / "/".join(path[:2])
                if hub.status:
                    return self.answer(hub.status)
                if not folder.is_dir():
                    return self.answer(404, X_Error_Code="RepoNotFound")
                files = sorted(file for file in folder.iterdir())
                if path[2:3] == ["resolve"]:
                    content = (folder / path[4]).read_bytes()
                    if self.command == "GET":
                        hub.asked.append(path[4])
                    etag = f'"{hashlib.sha1(content).hexdigest()}"'
                    return self.answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)
                if path[2:3] == ["tree"]:
                    answer = [
                        {"type": "file", "path": file.name, "size": hub.size(file), "oid": file.name} for file in files
                    ]
                else:
                    siblings = [{"rfilename": file.name, "size": hub.size(file)} for file in files]
                    answer = {"id": "/".join(path[:2]), "sha": COMMIT, "siblings": siblings}
                return self.answer(200, json.dumps(answer).encode(), Content_Type="application/json")

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if hub.status:
                    return self.answer(hub.status)
                status, reply = hub.take(urlsplit(self.path).path, [json.loads(line) for line in body.splitlines()])
                return self.answer(status, json.dumps(reply).encode(), Content_Type="application/json")

            def do_PUT(self) -> None:
                content = self.rfile.read(int(self.headers["Content-Length"]))
                assert hashlib.sha256(content).hexdigest() == self.path.removeprefix("/storage/")
                hub.storage[self.path.removeprefix("/storage/")] = content
                return self.answer(200)

        self.server = HTTPServer(Handler)
        self.address = self.server.url

    def size(self, file: Path) -> int:
        return 9 << 30 if file.name == "encoder-9.pkl" else file.stat().st_size

    def take(self, path: str, lines: list[dict]) -> tuple[int, dict]:
        """Answer what is sent: a repository to make, a card to check, files to store, a commit to make of them."""
        [first, *operations] = lines
        if path == "/api/repos/create":
            name = f"{first['organization']}/{first['name']}"
            (self.root / name).mkdir(parents=True, exist_ok=True)
            return 200, {"url": f"{self.address}/{name}"}
        if path == "/api/validate-yaml":
            about = yaml.safe_load(first["content"].split("---\n")[1])
            if about["license"] in ("mit", "cc-by-4.0"):
                return 200, {"warnings": [], "errors": []}
            return 400, {"errors": [{"message": '"license" must be one of [mit, cc-by-4.0]'}]}
        if path.endswith("/info/lfs/objects/batch"):
            for file in first["objects"]:
                file["actions"] = {"upload": {"href": f"{self.address}/storage/{file['oid']}"}}
            return 200, {"transfer": "basic", "objects": first["objects"]}
        if path.endswith("/preupload/main"):
            large = (".pkl", ".safetensors")
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(large) else "regular"}
                for f in first["files"]
            ]
            return 200, {"files": [{**mode, "shouldIgnore": False} for mode in modes]}
        assert path.endswith("/commit/main"), path
        name = path.removeprefix("/api/models/").removesuffix("/commit/main")
        folder = self.root / name
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "deletedFile":
                (folder / value["path"]).unlink()
            else:
                content = self.storage[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
                (folder / value["path"]).write_bytes(content)
        self.commits.append(first["value"]["summary"])
        return 200, {"commitUrl": f"{self.address}/{name}/commit/{COMMIT}", "commitOid": COMMIT}


@pytest.fixture(scope="module", autouse=True)
def _small_backbone() -> Iterator[None]:
    """Sharing takes as long as the backbone is large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torchvision.models, "resnet50", build_tiny)
        yield


@pytest.fixture(scope="module")
def trained(small_to_keep: Callable[..., TrainingConfig]) -> Path:
    return train(small_to_keep(num_epochs=2, image_size=32))


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a model that was not trained, of each decoder with its weights tied and not."""
    words = ["<start>", "<end>", "<unk>", *(f"w{i}" for i in range(9))]
    (tmp_path / "kind").mkdir()
    return write_kind(tmp_path / "kind", request.param, *build_kind(request.param, len(words)), words)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with a user who is logged in, and an empty cache."""
    fake = Hub(tmp_path / "hub")
    fake.root.mkdir()
    monkeypatch.setattr(constants, "ENDPOINT", fake.address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", fake.address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage speaks a protocol of its own
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.chdir(tmp_path)
    yield fake
    fake.server.stop()


def share(served: Hub, model: Path, name: str = "ada/scenes") -> Path:
    Captioner.load(model).push_to_hub(name, licence="cc-by-4.0")
    return served.root / name


def test_a_shared_model_captions_as_the_original_does(served, trained, image_path):
    share(served, trained)
    captioner = Captioner.load("ada/scenes")
    assert {Path(name).suffix for name in served.asked} == {".json", ".safetensors"}
    ours, theirs = Captioner.load(trained)([image_path] * 2, beam_size=3), captioner([image_path] * 2, beam_size=3)
    assert [(c.text, c.log_probability) for c in theirs] == [(c.text, c.log_probability) for c in ours]


def test_a_model_of_any_kind_is_shared_whole_and_shared_on(served, kind):
    share(served, kind)
    Captioner.load("ada/scenes").push_to_hub("bob/scenes", "mit")
    original = load_model(kind)
    for suffix in (".safetensors", ".pkl"):
        fetched = load_model(hub.find_model("bob/scenes"))
        for network, other in zip(original[:2], fetched[:2], strict=True):
            torch.testing.assert_close(network.state_dict(), other.state_dict(), atol=0, rtol=0)
        for file in (served.root / "bob/scenes").glob(f"*{suffix}"):
            file.unlink()
        shutil.rmtree("cache")


def test_what_is_shared_is_one_epoch_twice_and_a_card(served, trained):
    repository = share(served, trained)
    best = read_description(trained).best_epoch
    parts = [f"decoder-{best}", f"encoder-{best}", *(["backbone"] if (trained / "backbone.pkl").exists() else [])]
    weights = {f"{part}{suffix}" for part in parts for suffix in (".pkl", ".safetensors")}
    assert {file.name for file in repository.iterdir()} == {"README.md", "captioner.json", *weights}
    for part in parts:
        original = read_state_dict(trained / f"{part}.pkl")
        for suffix in (".pkl", ".safetensors"):
            state = read_state_dict(repository / f"{part}{suffix}")
            assert state.keys() == original.keys()
            assert all(torch.equal(state[key], original[key]) for key in original)


def test_a_backbone_that_is_not_the_models_is_not_shared(tmp_path):
    folder, shared = tmp_path / "model", tmp_path / "shared"
    folder.mkdir()
    shared.mkdir()
    words = ["<start>", "<end>", "<unk>", "a"]
    write_kind(folder, "lstm", *build_kind("lstm", len(words)), words)  # whose backbone is in encoder-1.pkl
    torch.save({"private": torch.ones(3)}, folder / "backbone.pkl")
    hub.write_shared(folder, shared, "me/mine", "mit")
    assert not list(shared.glob("backbone.*"))
    assert Captioner.load(shared).vocab.words == words


def test_no_folder_of_the_sharers_computer_goes_along(served, trained):
    repository = share(served, trained)
    training = read_description(trained).training
    assert "/" in training["models"]
    for name in ("captioner.json", "README.md"):
        assert str(Path(training["models"])) not in (repository / name).read_text()


@pytest.mark.parametrize("separator", ["/", "\\"], ids=["Linux", "Windows"])
def test_paths_of_either_system_are_shortened(trained, tmp_path, separator):
    shared = tmp_path / "shared"
    shared.mkdir()
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    description = read_description(folder)
    path = separator.join(["C:", "Users", "me", "coco"])
    description.training |= {"data": path, "before": {"data": path}}
    write_description(folder, description)
    hub.write_shared(folder, shared, "me/mine", "mit")
    training = read_description(shared).training
    assert (training["data"], training["before"]) == ("coco", {"data": "coco"})


def test_the_card_says_data_metrics_licence_and_use(served, trained):
    card = (share(served, trained) / "README.md").read_text()
    _, metadata, text = card.split("---\n", 2)
    about = yaml.safe_load(metadata)
    assert about["license"] == "cc-by-4.0"
    assert about["pipeline_tag"] == "image-to-text"
    described = read_description(trained)
    measured = described.epochs[described.best_epoch - 1]
    results = {r["type"]: r["value"] for r in about["model-index"][0]["results"][0]["metrics"]}
    assert results["cider"] == measured["CIDEr"]
    assert f"| CIDEr | {measured['CIDEr']:.3f} |" in text
    assert f"| training captions | {described.data['train_captions']} |" in text
    assert 'Captioner.load("ada/scenes")' in text
    assert "python caption.py photo.jpg --model ada/scenes" in text


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_card_names_the_backbone_and_the_decoder_and_says_where_nothing_is_recorded(decoder, trained):
    description = read_description(trained)
    description.architecture.decoder, description.architecture.backbone = decoder, "convnext_tiny.fb_in1k"
    description.data, description.epochs = {}, []
    card = hub.model_card(description, "ada/scenes", "mit")
    assert "| backbone | `convnext_tiny.fb_in1k`; " in card
    assert f"| decoder | `{decoder}`: " in card
    assert "ResNet" not in card
    assert "Its training data is not recorded." in card
    assert "No metrics were recorded." in card
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"


def test_the_card_of_averaged_epochs_claims_no_epoch_s_scores(trained):
    description = read_description(trained)
    assert "(epoch " in hub.model_card(description, "ada/scenes", "mit")
    description.training["averaged_epochs"] = [1, 2]
    card = hub.model_card(description, "ada/scenes", "mit")
    assert "(mean of epochs 1, 2)" in card
    assert "No metrics were recorded." in card


def test_the_card_names_the_model_that_training_started_from(trained):
    description = read_description(trained)
    assert "trained from" not in hub.model_card(description, "ada/scenes", "mit")
    description.training["start_from"] = "/home/ada/models/photos"
    assert "| trained from the model | photos |" in hub.model_card(description, "ada/scenes", "mit")


def test_a_model_of_the_hub_that_training_started_from_keeps_its_name(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    document = json.loads((tmp_path / "model" / "captioner.json").read_text())
    for cached in (
        "/home/ada/.cache/hub/models--ben--birds-2/snapshots/4f1c0a",
        "C:\\hub\\models--ben--birds-2\\snapshots\\4f",
    ):
        document["training"]["start_from"] = cached
        (tmp_path / "model" / "captioner.json").write_text(json.dumps(document))
        (tmp_path / "shared").mkdir(exist_ok=True)
        hub.write_shared(tmp_path / "model", tmp_path / "shared", "ada/scenes", "mit")
        assert read_description(tmp_path / "shared").training["start_from"] == "ben/birds-2"
        assert "| trained from the model | ben/birds-2 |" in (tmp_path / "shared" / "README.md").read_text()


@pytest.mark.parametrize("is_private", [False, True])
def test_a_public_repository_is_not_taken_for_a_private_one(served, trained, monkeypatch, is_private: bool):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_: SimpleNamespace(private=is_private))
    uploaded = []
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda *_, **keywords: uploaded.append(keywords))
    with contextlib.nullcontext() if is_private else pytest.raises(InputError, match="ada/scenes on the Hub is public"):
        hub.push(trained, "ada/scenes", "mit", private=True)
    assert bool(uploaded) == is_private


def test_paths_in_any_setting_are_shortened():
    settings = {"mine": [{"x": "/home/ada/a"}, "C:\\ada\\b", 5], "cache": {"folder": "cache/c"}, "seed": None}
    assert hub._without_folders(settings) == {"mine": [{"x": "a"}, "b", 5], "cache": {"folder": "c"}, "seed": None}


def test_a_second_sharing_replaces_another_epoch(served, trained):
    repository = share(served, trained)
    best = read_description(trained).best_epoch
    other = 3 - best
    Captioner.load(trained, epoch=other).push_to_hub("ada/scenes", "mit")
    assert not list(repository.glob(f"*-{best}.*"))
    assert read_description(repository).best_epoch == other
    assert served.commits == ["Share scenes"] * 2
    Captioner.load(repository)


def test_a_fetched_model_is_there_without_a_network(served, trained):
    share(served, trained)
    first = hub.find_model("ada/scenes")
    served.server.stop()
    assert hub.find_model("ada/scenes") == first
    Captioner.load("ada/scenes")


def test_the_command_line_takes_a_name(served, trained, image_path, capsys):
    share(served, trained)
    caption.main((image_path,), Decoding(), model=(Path("ada/scenes"),), json_=True)
    assert json.loads(capsys.readouterr().out)[0]["caption"] == Captioner.load(trained)(image_path)[0].text


def test_a_folder_goes_before_the_hub(served, trained):
    shutil.copytree(trained, "ada/scenes")
    assert hub.find_model("ada/scenes") == Path("ada/scenes")
    with pytest.raises(InputError, match=r"ada/other does not exist"):
        Captioner.load("ada/other")
    with pytest.raises(InputError, match=r"one/two/three does not exist"):
        Captioner.load("one/two/three")
    assert served.asked == []


def test_a_repository_with_pickles_only_is_read(served, trained):
    repository = share(served, trained)
    for file in repository.glob("*.safetensors"):
        file.unlink()
    Captioner.load("ada/scenes")


def test_no_such_repository_is_one_sentence(served):
    with pytest.raises(InputError, match=r"^ada/none is not an existing folder .* no such repository; check the name"):
        Captioner.load("ada/none")


def test_no_network_is_one_sentence(served):
    served.server.stop()
    with pytest.raises(InputError, match=r"^ada/scenes is not an existing .* check the network and try again\.$"):
        Captioner.load("ada/scenes")


def test_a_host_name_that_is_not_resolved_means_no_network(served, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("connection failed") from socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(InputError, match=r"from the Hub: no network; check the network and try again\.$"):
        hub.download_model("ada/scenes")


def test_a_hub_that_fails_is_one_sentence(served, trained):
    served.status = 500
    with pytest.raises(InputError, match=r"the Hub answers 500"):
        hub.download_model("ada/scenes")


def test_a_cache_that_cannot_be_written_is_one_sentence(served, trained, monkeypatch):
    share(served, trained)
    (served.root.parent / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(served.root.parent / "file" / "cache"))
    with pytest.raises(InputError, match=r"^ada/scenes is not an existing .*file.* cannot be written .*set HF_HOME"):
        Captioner.load("ada/scenes")


def test_another_projects_repository_is_one_sentence(served):
    (served.root / "ada/other").mkdir(parents=True)
    (served.root / "ada/other/config.json").write_text("{}")
    with pytest.raises(InputError, match=r"ada/other on the Hub is not a model of this project"):
        Captioner.load("ada/other")
    assert served.asked == []


def test_a_repository_of_absurd_size_is_not_downloaded(served, trained):
    repository = share(served, trained)
    for file in repository.glob("*.safetensors"):
        file.unlink()
    (repository / "encoder-9.pkl").touch()
    with pytest.raises(InputError, match=r"has 10 GB, and a model may have 9 GB at most"):
        Captioner.load("ada/scenes")
    assert served.asked == []


class Hostile:
    def __init__(self, planted: Path):
        self.planted = planted

    def __reduce__(self):
        return Path.touch, (self.planted,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_hostile_repository_runs_nothing(served, trained, tmp_path):
    repository = share(served, trained)
    for file in repository.glob("*.safetensors"):
        file.unlink()
    weights = next(repository.glob("decoder-*.pkl"))
    torch.save({"embed.weight": Hostile(tmp_path / "planted")}, weights)
    with pytest.raises(InputError, match=r"not a file of weights that can be read safely"):
        Captioner.load("ada/scenes")
    weights.write_bytes(pickle.dumps(Hostile(tmp_path / "planted")))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(InputError, match=r"decoder-\d.pkl"):
        Captioner.load("ada/scenes")
    assert not (tmp_path / "planted").exists()


def test_a_licence_that_the_hub_does_not_know_is_one_sentence(served, trained):
    with pytest.raises(InputError, match=r'"license" must be one of \[mit, cc-by-4.0\]; name the licence as the Hub'):
        Captioner.load(trained).push_to_hub("ada/scenes", "do what you like")
    assert served.commits == []
    with pytest.raises(InputError, match=r"^None is not a name on the Hub; give user/name\.$"):
        Captioner.load(trained).push_to_hub(None, "mit")
    with pytest.raises(TypeError, match="licence"):
        Captioner.load(trained).push_to_hub("ada/scenes")


def test_sharing_needs_a_login_a_name_and_a_folder(served, trained, monkeypatch):
    captioner = Captioner.load(trained)
    with pytest.raises(InputError, match="give user/name"):
        captioner.push_to_hub("scenes", "mit")
    for status, message in ((401, "not logged in|no such repository"), (403, "you may not write there")):
        served.status = status
        with pytest.raises(InputError, match=message):
            captioner.push_to_hub("ada/scenes", "mit")
    monkeypatch.delenv("HF_TOKEN")
    assert huggingface_hub.get_token() is None
    with pytest.raises(InputError, match="you are not logged in; log in with"):
        captioner.push_to_hub("ada/scenes", "mit")
    captioner.folder = None
    with pytest.raises(InputError, match="loaded from a folder"):
        captioner.push_to_hub("ada/scenes", "mit")


def test_a_name_that_the_hub_forbids_is_one_sentence(served, trained):
    with pytest.raises(InputError, match="Choose another name"):
        Captioner.load(trained).push_to_hub("ada/a--b", "mit")
