import builtins
import copy
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from torchvision import transforms

import caption
import evaluate
from captioning import checkpoint
from captioning.captioner import Captioner, Decoding
from captioning.errors import InputError
from captioning.images import build_transform, read_image
from captioning.original_weights import MAX_PICKLE_BYTES, read_vocab_pickle
from importers import import_weights
from model import DecoderRNN
from vocabulary import Vocabulary

DATA = Path(__file__).parents[2] / "shared" / "data"


class Hostile:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def vocabulary_pickle(path: Path, attributes: dict) -> Path:
    """A pickle of `vocabulary.Vocabulary` with these attributes, as the original writes it."""
    state = pickle.dumps(attributes, protocol=3)[2:-1]  # without PROTO and STOP
    path.write_bytes(b"\x80\x03cvocabulary\nVocabulary\n)\x81" + state + b"b.")
    return path


def test_vocab_pickle_gives_the_words_in_index_order(tmp_path):
    indices = {"dog": 3, "<end>": 1, "<start>": 0, "<unk>": 2}
    path = vocabulary_pickle(tmp_path / "vocab.pkl", {"word2idx": indices, "idx": 4})
    assert read_vocab_pickle(path) == ["<start>", "<end>", "<unk>", "dog"]


def test_the_published_vocab_pickle():
    if not (DATA / "published_vocab.pkl").exists():
        pytest.skip("../shared/data/published_vocab.pkl is not here")
    words = read_vocab_pickle(DATA / "published_vocab.pkl")
    assert len(words) == len(set(words)) == 9955
    assert words[:5] == ["<start>", "<end>", "<unk>", "a", "very"]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_vocab_pickle_is_refused_and_runs_nothing(tmp_path, protocol):
    planted = tmp_path / "planted"
    path = tmp_path / "vocab.pkl"
    path.write_bytes(pickle.dumps({"word2idx": Hostile(f"touch {planted}")}, protocol=protocol))
    with pytest.raises(InputError, match=r"vocab.pkl is not a vocabulary .* it asks for \w+\.system"):
        read_vocab_pickle(path)
    assert not planted.exists()


@pytest.mark.parametrize("what", [builtins.eval, getattr, pickle.loads])
def test_no_other_name_is_admitted(tmp_path, what):
    (tmp_path / "vocab.pkl").write_bytes(pickle.dumps(what))
    with pytest.raises(InputError, match="it asks for"):
        read_vocab_pickle(tmp_path / "vocab.pkl")


def test_a_pickle_that_would_fill_the_memory_is_refused(tmp_path):
    (tmp_path / "vocab.pkl").write_bytes(b"\x80\x03}r\xff\xff\xff\x7f.")
    with pytest.raises(InputError, match="a memo index is out of range"):
        read_vocab_pickle(tmp_path / "vocab.pkl")


def test_a_huge_vocab_pickle_is_not_even_read(tmp_path):
    with (tmp_path / "vocab.pkl").open("wb") as file:
        file.truncate(MAX_PICKLE_BYTES + 1)
    with pytest.raises(InputError, match=r"at most .* are read"):
        read_vocab_pickle(tmp_path / "vocab.pkl")


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ({"<start>": 0, "<end>": 1, "<unk>": 2, "dog": 4}, "indices are not 0 to 3"),
        ({"<start>": 0, "<end>": 1, "<unk>": 2, "dog": "3"}, "indices are not 0 to 3"),
        ({"<pad>": 0, "<start>": 1, "<end>": 2, "<unk>": 3}, "begins with"),
        ({"<start>": 0, "<end>": 1, "<unk>": 2, "": 3}, "word 3 is empty"),
        ("not a dict", "holds no vocabulary"),
    ],
)
def test_an_incomplete_vocabulary_is_one_sentence(tmp_path, indices, message):
    path = vocabulary_pickle(tmp_path / "vocab.pkl", {"word2idx": indices})
    with pytest.raises(InputError, match=message):
        read_vocab_pickle(path)


def test_a_pipe_is_no_vocabulary(tmp_path):
    os.mkfifo(tmp_path / "vocab.pkl")
    with pytest.raises(InputError, match=r"vocab\.pkl is not a regular file"):
        read_vocab_pickle(tmp_path / "vocab.pkl")


@pytest.mark.parametrize("content", [b"", b"\x80\x03", b"not a pickle", pickle.dumps([1, 2])])
def test_a_damaged_vocabulary_is_one_sentence(tmp_path, content):
    (tmp_path / "vocab.pkl").write_bytes(content)
    with pytest.raises(InputError, match=r"vocab.pkl"):
        read_vocab_pickle(tmp_path / "vocab.pkl")


class OriginalEncoder(torch.nn.Module):
    """The published encoder, restated from its description and the names of its weights."""

    def __init__(self, embed_size: int):
        super().__init__()
        resnet = torchvision.models.resnet50(weights=None)
        self.resnet = torch.nn.Sequential(*list(resnet.children())[:-1])
        self.embed = torch.nn.Linear(2048, embed_size)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.embed(self.resnet(images).flatten(1))


class OriginalDecoder(torch.nn.Module):
    """The published decoder, restated likewise: greedy, one photo at a time."""

    def __init__(self, embed_size: int, hidden_size: int, words: int, num_layers: int):
        super().__init__()
        self.embed = torch.nn.Embedding(words, embed_size)
        self.lstm = torch.nn.LSTM(embed_size, hidden_size, num_layers, batch_first=True)
        self.linear = torch.nn.Linear(hidden_size, words)

    def sample(self, feature: torch.Tensor) -> list[int]:
        inputs, state, tokens = feature.view(1, 1, -1), None, []
        while len(tokens) < 20 and 1 not in tokens:
            output, state = self.lstm(inputs, state)
            token = self.linear(output[0, 0]).argmax()
            tokens.append(int(token))
            inputs = self.embed(token).view(1, 1, -1)
        return tokens


WORDS = ["<start>", "<end>", "<unk>", *(f"w{i}" for i in range(57))]


@pytest.fixture(scope="module")
def original() -> tuple[OriginalEncoder, OriginalDecoder]:
    """Random weights, wide enough apart that photos get captions of their own."""
    torch.manual_seed(0)
    encoder, decoder = OriginalEncoder(32).eval(), OriginalDecoder(32, 48, len(WORDS), 2).eval()
    with torch.no_grad():
        encoder.embed.weight.mul_(40)
        for weight in decoder.parameters():
            weight.mul_(4)
    return encoder, decoder


@pytest.fixture
def triple(original, tmp_path) -> tuple[Path, Path, Path]:
    paths = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl", tmp_path / "vocab.pkl"
    for module, path in zip(original, paths, strict=False):
        torch.save(module.state_dict(), path)
    vocabulary_pickle(paths[2], {"word2idx": {word: index for index, word in enumerate(WORDS)}})
    return paths


@pytest.fixture
def image_paths() -> list[Path]:
    """Ten photos of COCO."""
    paths = sorted((DATA / "coco-mini" / "images" / "val2017").glob("*.jpg"))[:10]
    if not paths:
        pytest.skip("../shared/data/coco-mini is not here")
    return paths


RECIPE = transforms.Compose(
    [
        transforms.Resize(256),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


@pytest.mark.slow
def test_imported_weights_give_the_originals_token_sequences(original, triple, image_paths, tmp_path):
    import_weights(*triple, tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == [
        "captioner.json",
        "decoder-3.pkl",
        "encoder-3.pkl",
    ]
    encoder, decoder, vocabulary, description = checkpoint.load_model(tmp_path / "model")
    assert vocabulary.words == WORDS

    with torch.no_grad():
        images = [RECIPE(Image.open(path).convert("RGB")) for path in image_paths]
        expected = [original[1].sample(original[0](image[None])) for image in images]
        ours = build_transform(image_size=description.preprocessing.image_size)
        actual = decoder.sample(encoder(torch.stack([ours(read_image(path)) for path in image_paths])))
    assert len({tuple(tokens) for tokens in expected}) > 3
    assert actual == expected


@pytest.mark.slow
def test_a_trained_model_says_what_the_original_code_says_word_for_word(image_paths, tmp_path):
    document = json.loads((DATA / "coco-mini" / "annotations" / "captions_val2017.json").read_text())
    ids = {image["file_name"]: image["id"] for image in document["images"]}
    caption_of = {a["image_id"]: a["caption"] for a in document["annotations"]}
    sentences = [caption_of[ids[path.name]] for path in image_paths]
    vocabulary = Vocabulary.build(sentences, 1)
    torch.manual_seed(0)
    encoder, decoder = OriginalEncoder(32).eval(), DecoderRNN(32, 64, len(vocabulary))
    with torch.no_grad():
        pooled = encoder.resnet(torch.stack([RECIPE(Image.open(path).convert("RGB")) for path in image_paths])).flatten(
            1
        )
        embedded = encoder.embed(pooled)
        encoder.embed.weight /= embedded.std(0)[:, None]
        encoder.embed.bias.copy_((encoder.embed.bias - embedded.mean(0)) / embedded.std(0))
        features = encoder.embed(pooled)
    captions = [torch.tensor(vocabulary.encode(sentence)) for sentence in sentences]
    captions = torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-100)
    optimizer = torch.optim.Adam(decoder.parameters(), 1e-2)
    for _ in range(150):
        logits = decoder(features, captions.clamp(min=0))
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), captions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    restated = OriginalDecoder(32, 64, len(vocabulary), 1)
    restated.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        expected = [restated.sample(feature) for feature in features]
    assert all(tokens[0] == 0 and tokens[-1] == 1 for tokens in expected)
    assert len({tuple(tokens) for tokens in expected}) == len(image_paths)

    files = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl", tmp_path / "vocab.pkl"
    torch.save(encoder.state_dict(), files[0])
    torch.save(restated.state_dict(), files[1])
    vocabulary_pickle(files[2], {"word2idx": vocabulary.index})
    import_weights(*files, tmp_path / "model")
    captions = Captioner.load(tmp_path / "model")(image_paths)
    assert [c.tokens for c in captions] == [[vocabulary.words[i] for i in tokens[1:-1]] for tokens in expected]


@pytest.mark.slow
def test_a_triple_as_large_as_the_published_one_is_used_like_any_model(image_paths, tmp_path, monkeypatch, capsys):
    if not (DATA / "published_vocab.pkl").exists():
        pytest.skip("../shared/data/published_vocab.pkl is not here")
    sizes = json.loads((DATA / "published_checkpoint_keys.json").read_text())
    torch.manual_seed(0)
    modules = OriginalEncoder(256), OriginalDecoder(256, 512, 9955, 1)
    files = tmp_path / "encoder-3.pkl", tmp_path / "decoder-3.pkl"
    for module, path in zip(modules, files, strict=True):
        state = module.state_dict()
        assert {key: list(value.shape) for key, value in state.items()} == sizes[path.name]
        torch.save(state, path)
    import_weights(*files, DATA / "published_vocab.pkl", tmp_path / "published")

    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    caption.main(tuple(image_paths[:2]), Decoding(beam_size=2), model=(Path("published"),), json_=True, workers=0)
    [first, second] = json.loads(capsys.readouterr().out)
    assert first["caption"]
    assert second["log_probability"] < 0
    evaluate.main(
        Decoding(), (Path("published"),), data=DATA / "coco-mini", split="val", limit=2, json_=True, workers=0
    )
    assert json.loads(capsys.readouterr().out)["photos"] == 2


def test_weights_of_another_vocabulary_are_refused_with_both_sizes(triple, tmp_path):
    indices = {word: index for index, word in enumerate(WORDS[:-7])}
    vocabulary_pickle(triple[2], {"word2idx": indices})
    with pytest.raises(InputError, match=r"decoder-3.pkl was trained with 60 words and .*vocab.pkl has 53"):
        import_weights(*triple, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_two_trainings_are_refused_with_both_sizes(triple, tmp_path):
    torch.save({"embed.weight": torch.zeros(8, 2048)}, triple[0])
    with pytest.raises(InputError, match=r"encoder-3.pkl gives 8 numbers an image and .* takes 32"):
        import_weights(*triple, tmp_path / "model")


def test_weights_that_lack_a_part_are_refused(original, triple, tmp_path):
    state = copy.copy(original[1].state_dict())
    del state["lstm.weight_hh_l1"]
    torch.save(state, triple[1])
    with pytest.raises(InputError, match=r"decoder-3.pkl lacks the weight lstm.weight_hh_l1"):
        import_weights(*triple, tmp_path / "model")
    torch.save({}, triple[1])
    with pytest.raises(InputError, match=r"decoder-3.pkl is not from the original recipe: .* embed.weight"):
        import_weights(*triple, tmp_path / "model")


def test_weights_of_more_layers_than_a_model_may_have_are_refused(original, triple, tmp_path):
    encoder, decoder, vocab = triple
    state = torch.load(decoder, weights_only=True)
    state |= {f"lstm.weight_ih_l{i}": state["lstm.weight_ih_l0"].clone() for i in range(1, 17)}
    torch.save(state, tmp_path / "decoder-9.pkl")
    with pytest.raises(InputError, match=r"decoder-9\.pkl is too large for a model here: num_layers: "):
        import_weights(encoder, tmp_path / "decoder-9.pkl", vocab, tmp_path / "out")


def test_weights_without_numbers_are_refused(original, triple, tmp_path):
    state = {**original[1].state_dict(), "linear.weight": torch.zeros(len(WORDS), 0)}
    torch.save(state, triple[1])
    with pytest.raises(InputError, match=r"decoder-3.pkl is not from the original recipe: .* linear.weight"):
        import_weights(*triple, tmp_path / "model")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_weights_that_cannot_be_written_leave_nothing(triple, tmp_path, monkeypatch, error):
    def fail(*_args):
        raise error

    monkeypatch.setattr(checkpoint, "write_description", fail)
    with pytest.raises((InputError, KeyboardInterrupt)):
        import_weights(*triple, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_hostile_weights_are_refused_and_run_nothing(triple, tmp_path):
    planted = tmp_path / "planted"
    triple[1].write_bytes(pickle.dumps(Hostile(f"touch {planted}")))
    with pytest.raises(InputError, match=r"decoder-3.pkl"):
        import_weights(*triple, tmp_path / "model")
    assert not planted.exists()


def test_an_interrupted_import_of_weights_leaves_nothing(triple, tmp_path, monkeypatch):
    def full(*_args):
        raise InputError("the disk is full.")

    monkeypatch.setattr(checkpoint, "write_description", full)
    with pytest.raises(InputError, match="full"):
        import_weights(*triple, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_existing_model_is_not_touched(triple, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty"):
        import_weights(*triple, tmp_path / "model")
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["mine.txt"]
