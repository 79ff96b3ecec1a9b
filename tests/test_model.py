import json
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from conftest import run_code
from torch import Tensor
from torchvision.models import resnet50

from captioning.decoding import beam_search, greedy
from captioning.errors import InputError
from captioning.sequences import pack_tokens
from captioning.weights import read_state_dict
from model import DECODERS, AttentionDecoder, DecoderRNN, EncoderCNN

EMBED, HIDDEN, WORDS, CELLS = 8, 12, 30, 4


def make_decoder(name: str, num_layers: int = 1) -> torch.nn.Module:
    torch.manual_seed(1)
    decoder = DECODERS[name](EMBED, HIDDEN, WORDS, num_layers).eval()
    for parameter in decoder.parameters():
        parameter.data.mul_(4)  # opinions strong enough that images differ
    return decoder


def make_features(name: str, batch: int) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(batch, *((CELLS,) if DECODERS[name].attends else ()), EMBED) * 3


# The encoder


def test_state_dict_keys_and_shapes_are_the_published_ones(shared: Path):
    published = json.loads((shared / "published_checkpoint_keys.json").read_text())
    with torch.device("meta"):
        encoder = EncoderCNN(published["embed_size"], weights="random")
        decoder = DecoderRNN(published["embed_size"], published["hidden_size"], published["vocabulary_size"])
    for name, module in (("encoder", encoder), ("decoder", decoder)):
        ours = {key: list(value.shape) for key, value in module.state_dict().items()}
        assert ours == published[f"{name}-3.pkl"]


def test_the_encoder_maps_an_image_to_its_embedding_or_its_grid():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 64, 96)
    encoder = EncoderCNN(EMBED, weights="random")
    assert encoder(images).shape == (2, EMBED)
    assert encoder.features(images).shape == (2, 2048)
    encoder.grid = True
    assert encoder(images).shape == (2, 2 * 3, EMBED)


def test_the_grid_s_mean_is_the_pooled_feature(tiny_backbone: Callable):
    encoder = EncoderCNN(EMBED, weights="random").eval()
    images = torch.randn(2, 3, 64, 64)
    pooled = encoder.features(images)
    encoder.grid = True
    torch.testing.assert_close(encoder.features(images).mean(1), pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_integers_are_normalized_as_the_recipe_s_transform_does(tiny_backbone: Callable, dtype: torch.dtype):
    encoder = EncoderCNN(EMBED, weights="random").eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=dtype)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(encoder(pixels), encoder((pixels / 255 - mean) / std), rtol=1e-4, atol=1e-4)


def test_the_copy_for_inference_sees_the_same(tiny_backbone: Callable):
    encoder = EncoderCNN(EMBED, weights="random", fine_tune=5)
    images = torch.randn(8, 3, 64, 64)
    encoder.features(images)  # moves the batch norms' statistics away from 0 and 1
    encoder.eval()
    fast = encoder.for_inference(torch.float32)
    torch.testing.assert_close(fast.features(images), encoder.features(images), rtol=1e-3, atol=1e-4)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fast.modules())


@pytest.mark.gpu
def test_a_gpu_computes_the_features_of_the_cpu(tiny_backbone: Callable):
    encoder = EncoderCNN(EMBED, weights="random").eval()
    images = torch.randn(8, 3, 64, 64)
    expected = encoder.features(images)
    features = encoder.cuda().features(images.cuda()).cpu()
    torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("fine_tune", range(6))
def test_as_many_parts_learn_as_were_asked_for_counted_from_the_last(tiny_backbone: Callable, fine_tune: int):
    encoder = EncoderCNN(EMBED, weights="random", fine_tune=fine_tune)
    learns = [
        {parameter.requires_grad for i in part for parameter in encoder.resnet[i].parameters()}
        for part in ([0, 1], [4], [5], [6], [7])
    ]
    assert learns == [{False}] * (5 - fine_tune) + [{True}] * fine_tune
    assert encoder.embed.weight.requires_grad


@pytest.mark.parametrize("fine_tune", [0, 2])
def test_frozen_parts_and_batch_norm_statistics_never_change(tiny_backbone: Callable, fine_tune: int):
    encoder = EncoderCNN(EMBED, weights="random", fine_tune=fine_tune).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], 0.1)
    for _ in range(3):
        encoder(torch.randn(4, 3, 64, 64)).square().sum().backward()
        optimizer.step()
    after = encoder.state_dict()
    frozen = [f"resnet.{i}." for i in range(8 if fine_tune == 0 else 6)]
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert "embed.weight" in changed
    assert not [key for key in changed if key.startswith(tuple(frozen)) or "running" in key or "num_b" in key]
    assert fine_tune == 0 or any(key.startswith("resnet.7.") for key in changed)


def test_the_statistics_of_a_backbone_trained_whole_do_move(tiny_backbone: Callable):
    encoder = EncoderCNN(EMBED, weights="random", fine_tune=5).train()
    before = encoder.resnet[1].running_mean.clone()
    encoder(torch.randn(4, 3, 64, 64))
    assert not torch.equal(before, encoder.resnet[1].running_mean)


def test_a_backbone_without_bfloat16_is_a_sentence(tiny_backbone: Callable, monkeypatch: pytest.MonkeyPatch):
    def fail(_: Tensor) -> None:
        raise RuntimeError("\"pool\" not implemented for 'BFloat16'")

    encoder = EncoderCNN(EMBED, weights="random")
    monkeypatch.setattr(encoder, "run_backbone", fail)
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with pytest.raises(InputError, match=r"^resnet50 does not run in bfloat16; use --precision fp32\.$"):
        encoder.to(torch.bfloat16).features(images)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(InputError, match="does not run in bfloat16"):
        encoder.float().features(images)
    with pytest.raises(RuntimeError, match="not implemented"):
        encoder.float().features(images)


def test_without_network_the_error_names_the_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object, **__: object) -> None:
        raise URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(
        InputError,
        match=r"no route to host.*without a network, use --backbone tf_efficientnet_lite2, or --weights FILE",
    ):
        EncoderCNN(EMBED, weights="pretrained")


@pytest.mark.parametrize("form", ["torchvision", "without fc", "encoder"])
def test_the_backbone_s_weights_come_from_a_file(tiny_backbone: Callable, tmp_path: Path, form: str):
    original = tiny_backbone()
    state = original.state_dict()
    if form == "without fc":
        state = {key: value.half() for key, value in state.items() if not key.startswith("fc.")}
    elif form == "encoder":
        encoder = EncoderCNN(EMBED + 1, weights="random")
        encoder.resnet.load_state_dict(torch.nn.Sequential(*list(original.children())[:-1]).state_dict())
        state = encoder.state_dict()
    torch.save(state, tmp_path / "weights.pth")
    encoder = EncoderCNN(EMBED, weights=tmp_path / "weights.pth")
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if form == "without fc" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(encoder.resnet[7][0].conv1.weight, original.layer4[0].conv1.weight, **tolerance)
    torch.testing.assert_close(encoder.resnet[0].weight, original.conv1.weight, **tolerance)
    assert encoder.resnet[0].weight.dtype == torch.float32


def test_torchvision_s_own_state_dict_fits(tmp_path: Path):
    original = resnet50(weights=None)
    torch.save(original.state_dict(), tmp_path / "resnet50.pth")
    encoder = EncoderCNN(EMBED, weights=tmp_path / "resnet50.pth").eval()
    images = torch.randn(1, 3, 64, 64)
    original.fc = torch.nn.Identity()
    torch.testing.assert_close(encoder.features(images), original.eval()(images), rtol=1e-4, atol=1e-4)


def test_weights_of_another_network_are_refused_by_key(tiny_backbone: Callable, tmp_path: Path):
    torch.save({"conv1.weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"other\.pth has conv1\.weight of size \(3,\)"):
        EncoderCNN(EMBED, weights=tmp_path / "other.pth")


NO_STATE_DICTS = {
    "a list": [1, 2],
    "a number": {"a": 1},
    "a name that is a number": {3: torch.zeros(1)},
    "a sparse tensor": {"a": torch.eye(1).to_sparse()},
    "a tensor without numbers": {"a": torch.zeros(1, device="meta")},
    "a tensor larger than its file": {"a": torch.zeros(1).expand(1 << 40)},
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize("content", NO_STATE_DICTS.values(), ids=NO_STATE_DICTS)
def test_a_file_that_is_no_state_dict_is_refused(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(InputError, match=r"weights\.pth"):
        read_state_dict(tmp_path / "weights.pth")


# The decoders


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_forward_on_padded_captions_is_forward_on_each(name: str, num_layers: int):
    decoder, features = make_decoder(name, num_layers), make_features(name, 4)
    lengths = torch.tensor([5, 9, 7, 5])
    captions = torch.randint(3, WORDS, (4, 9))
    packed = decoder.linear(decoder.unroll(features, captions, lengths)[0])
    alone = [decoder(features[i : i + 1], captions[i : i + 1, :length])[0] for i, length in enumerate(lengths)]
    skip = 1 if decoder.attends else 0
    expected = [row[t] for t in range(9) for row in sorted(alone, key=len, reverse=True) if t < len(row)]
    assert packed.shape == (int(lengths.sum()) - 4 * skip, WORDS)
    # rows of one length may change places, so compare them as sets of rows, time by time
    torch.testing.assert_close(packed.sum(1).sort().values, torch.stack(expected).sum(1).sort().values)
    assert pack_tokens(captions, lengths, skip).shape == packed.shape[:1]


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num_layers", [1, 2])
def test_steps_give_the_logits_that_training_sees(name: str, num_layers: int):
    decoder, features = make_decoder(name, num_layers), make_features(name, 3)
    captions = torch.randint(3, WORDS, (3, 6))
    captions[:, 0] = 0
    logits = decoder(features, captions)[:, 0 if decoder.attends else 1 :]  # of the words after <start>
    state = decoder.init_state(features)
    for t in range(5):
        step_logits, state = decoder.step(captions[:, t], state)
        torch.testing.assert_close(step_logits, logits[:, t], rtol=1e-5, atol=1e-5)
        assert all(len(part) == 3 for part in state)


def test_importing_the_model_imports_torch_and_no_other_large_package():
    imported = run_code("import sys, model; print({name.split('.')[0] for name in sys.modules})").stdout
    assert "'torch'" in imported
    for name in ("accelerate", "gradio", "matplotlib", "nltk", "onnxruntime", "pycocotools", "safetensors", "timm"):
        assert f"'{name}'" not in imported


def test_words_beyond_a_transformer_s_positions_have_its_last_one():
    decoder, features = make_decoder("transformer"), make_features("transformer", 2)
    length = decoder.max_positions + 3
    captions = torch.randint(3, WORDS, (2, length + 1))
    logits, state = decoder(features, captions), decoder.init_state(features)
    for t in range(length):
        step_logits, state = decoder.step(captions[:, t], state)
        torch.testing.assert_close(step_logits, logits[:, t], rtol=1e-4, atol=1e-5)


def test_a_transformer_s_attention_is_the_mean_over_the_heads_of_its_last_layer():
    decoder, features = make_decoder("transformer", 2), make_features("transformer", 3)
    _, (_, image, attention) = decoder.step(torch.tensor([0, 3, 4]), decoder.init_state(features))
    queries: list[Tensor] = []
    hook = decoder.layers[-1].register_forward_hook(lambda _, inputs, outputs: queries.append(outputs[2]))
    decoder.step(torch.tensor([0, 3, 4]), decoder.init_state(features))
    hook.remove()
    heads, size = decoder.layers[-1].heads, features.shape[2] // decoder.layers[-1].heads
    query = queries[0].reshape(3, heads, size)
    key = image[:, :, -1, : features.shape[2]].reshape(3, -1, heads, size)
    expected = torch.einsum("bhs,bchs->bhc", query, key).div(size**0.5).softmax(2).mean(1)
    torch.testing.assert_close(attention, expected)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("decode", [greedy, beam_search])
def test_a_batch_is_decoded_as_its_images_one_at_a_time(name: str, num_layers: int, decode: Callable):
    decoder, features = make_decoder(name, num_layers), make_features(name, 7)

    def tokens(features: Tensor) -> list[list[int]]:
        hypotheses = decode(decoder, features)
        return [(row[0] if isinstance(row, list) else row).tokens for row in hypotheses]

    together = tokens(features)
    assert together == [tokens(features[i : i + 1])[0] for i in range(7)]
    assert len({tuple(row) for row in together}) > 1


def test_sample_is_the_recipe_s_loop():
    decoder, features = make_decoder("lstm"), make_features("lstm", 5)
    for row, tokens in enumerate(decoder.sample(features, max_len=12)):
        inputs, states, expected = features[row].view(1, 1, -1), None, []
        for _ in range(12):
            hidden, states = decoder.lstm(inputs, states)
            word = decoder.linear(hidden.squeeze(1)).max(1)[1]
            expected.append(word.item())
            if word.item() == 1:
                break
            inputs = decoder.embed(word).unsqueeze(1)
        assert tokens == expected


def test_attention_weighs_every_cell_and_sums_to_one():
    decoder, features = make_decoder("attention"), make_features("attention", 3)
    _, state = decoder.step(torch.zeros(3, dtype=torch.int64), decoder.init_state(features))
    assert state[-1].shape == (3, CELLS)
    torch.testing.assert_close(state[-1].sum(1), torch.ones(3))


def test_looked_sums_a_caption_s_attention_over_its_own_words_only():
    decoder, features = make_decoder("attention"), make_features("attention", 3)
    captions, lengths = torch.randint(3, WORDS, (3, 9)), torch.tensor([4, 9, 6])
    _, looked = decoder.unroll(features, captions, lengths)
    separate = [decoder.unroll(features[i : i + 1], captions[i : i + 1, :n])[1][0] for i, n in enumerate(lengths)]
    order = lengths.argsort(descending=True)
    torch.testing.assert_close(looked, torch.stack(separate)[order])
    assert isinstance(decoder, AttentionDecoder)
