"""Self-critical training: its gradient, its baseline, what it comes to, and how it goes on."""

import functools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draw_noise, run_script, write_split
from test_resume import assert_same_model, at_step
from test_training import judged  # noqa: F401
from torch import Tensor

from captioning import checkpoint, self_critical
from captioning.checkpoint import epochs_saved, load_model, load_resume, read_description
from captioning.decoding import sample
from captioning.errors import InputError
from captioning.hub import write_shared
from captioning.images import ImageDataset, build_transform
from captioning.losses import Batch, CaptioningModel
from captioning.self_critical import SAMPLES_PER_IMAGE, CiderReward, SelfCritical, advantages, reinforce
from captioning.training import TrainingConfig, read_log, train
from captioning.weights import read_state_dict
from data_loader import CaptionDataset
from model import DECODERS, EncoderCNN
from train import resumed_config
from vocabulary import END, START, UNK

Make = Callable[..., TrainingConfig]
LONGEST = 3  # tokens of a caption in the tiny world of five words, two of which can be said


# The gradient


@pytest.fixture
def objective() -> SelfCritical:
    """Of two images with captions of the words 3 and 4."""
    captions = [[START, 3, 4, 3, END], [START, 3, 3, END], [START, 4, END]]
    return SelfCritical(
        SimpleNamespace(
            tokens=np.concatenate(captions), offsets=np.array([0, 5, 9, 12]), image_rows=np.array([0, 0, 1], np.int32)
        )
    )


@pytest.fixture(params=DECODERS)
def model(request: pytest.FixtureRequest, objective: SelfCritical, tiny_backbone: Callable) -> CaptioningModel:
    torch.manual_seed(0)
    decoder = DECODERS[request.param](4, 6, 5)
    for parameter in decoder.parameters():
        parameter.data.mul_(2)
    return CaptioningModel(EncoderCNN(4, weights="random", grid=decoder.attends), decoder, objective)


def sampled(features: Tensor, image_index: np.ndarray) -> Batch:
    """A batch of images whose captions are yet to be sampled."""
    return Batch(features, None, None, None, image_index)


def make_features(model: CaptioningModel, images: int = 1) -> Tensor:
    """Random features of so many images."""
    cells = (2,) if model.decoder.attends else ()
    return torch.rand(images, *cells, 2048, generator=torch.Generator().manual_seed(0))


def every_caption() -> list[list[int]]:
    ended = [[*words, END] for n in range(LONGEST) for words in product((3, 4), repeat=n)]
    return ended + [list(words) for words in product((3, 4), repeat=LONGEST)]


def log_probability(model: CaptioningModel, features: Tensor, caption: list[int]) -> Tensor:
    """Of being drawn: word by word, neither `<start>` nor `<unk>` among the choices."""
    state, last, total = model.decoder.init_state(model.encoder.embed(features)), START, 0.0
    for word in caption:
        logits, state = model.decoder.step(torch.tensor([last]), state)
        choices = [i for i in range(5) if i not in (START, UNK)]
        total = total + logits[0, choices].log_softmax(0)[choices.index(word)]
        last = word
    return total


def gradient(model: CaptioningModel) -> Tensor:
    parameters = [*model.decoder.parameters(), *model.encoder.embed.parameters()]
    actual = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    model.zero_grad()
    return actual


def exact_gradient(model: CaptioningModel, features: Tensor) -> Tensor:
    """Of the expected reward of the first photo, over all captions that there can be."""
    captions = every_caption()
    rewards = model.objective.reward(np.zeros(len(captions), int), captions)
    logs = torch.stack([log_probability(model, features, caption) for caption in captions])
    assert logs.exp().sum().item() == pytest.approx(1, abs=1e-5)
    (logs.exp() * torch.from_numpy(rewards)).sum().backward()
    return gradient(model)


def test_the_expected_gradient_is_that_of_the_expected_reward(model: CaptioningModel):
    """Over all pairs of draws, each weighed with its probability: no more is left to chance."""
    model.double()
    features = make_features(model).double()
    captions = every_caption()
    rewards = torch.from_numpy(model.objective.reward(np.zeros(len(captions), int), captions))
    with torch.no_grad():
        p = [log_probability(model, features, caption).exp() for caption in captions]
    expected_reward = sum(x * r for x, r in zip(p, rewards, strict=True))
    total = 0.0
    for i, j in product(range(len(captions)), repeat=2):
        pair = [captions[i], captions[j]]
        lengths = torch.tensor([1 + len(words) for words in pair])
        padded = torch.tensor([[START, *words, *[END] * (LONGEST - len(words))] for words in pair])
        embedded, padded = model.encoder.embed(features)[[0, 0]], padded[:, : lengths.max()]
        hidden, _ = model.decoder.unroll(embedded, padded, lengths)
        both = rewards[torch.tensor([[i, j]])]
        total = total + p[i] * p[j] * reinforce(hidden, model.decoder.linear, padded, lengths, both)
    total.backward()
    assert total.item() == pytest.approx(-2 * expected_reward.item(), rel=1e-5)
    actual, exact = gradient(model), exact_gradient(model, features)
    assert exact.norm() > 0.1
    torch.testing.assert_close(actual, -2 * exact, rtol=1e-4, atol=1e-4 * exact.norm().item())


@pytest.mark.slow
def test_the_gradient_of_what_is_drawn_tends_to_it(model: CaptioningModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(self_critical, "sample", functools.partial(sample, max_length=LONGEST))
    features, count = make_features(model), 4000
    exact = exact_gradient(model, features)
    torch.manual_seed(0)
    copies = features.expand(count, *features.shape[1:])
    loss, _ = model(sampled(copies, np.zeros(count, np.int64)))
    loss.backward()
    actual = gradient(model) / (count * SAMPLES_PER_IMAGE)
    assert (actual + exact).norm() < 0.1 * exact.norm()


def test_the_advantages_of_an_image_sum_to_zero_and_no_draw_is_in_its_own_baseline():
    rewards = torch.rand(7, SAMPLES_PER_IMAGE) * 10
    actual = advantages(rewards)
    torch.testing.assert_close(actual.sum(1), torch.zeros(7), atol=1e-5, rtol=0)
    torch.testing.assert_close(actual[:, 0], rewards[:, 0] - rewards[:, 1:].mean(1))
    assert (advantages(torch.ones(1, SAMPLES_PER_IMAGE)) == 0).all()


def test_the_references_are_the_captions_with_their_end(objective: SelfCritical):
    whole, broken_off = objective.reward(np.array([1, 1]), [[4, END], [4]])
    assert whole > broken_off
    assert whole == max(objective.reward(np.ones(len(every_caption()), int), every_caption()))


@pytest.mark.parametrize(
    ("captions", "times"),
    [
        ([1, 5, *18 * [1]], {1: 5}),
        ([5, 6, 5, 6, 12, 5], {4: 2}),
        ([2, 1, 2], {}),
    ],
)
def test_an_image_is_drawn_as_often_as_it_has_more_captions_than_most(captions: list[int], times: dict[int, int]):
    rows = np.repeat(np.arange(len(captions)), captions)
    offsets = 3 * np.arange(len(rows) + 1)
    data = SimpleNamespace(tokens=np.tile([START, 7, END], len(rows)), offsets=offsets, image_rows=rows)
    sampler = SelfCritical(data).build_sampler(data, 2 * SAMPLES_PER_IMAGE, seed=3, frozen=True)
    orders = [[rows[batch].tolist() for batch in sampler] for _ in range(3)]
    for batches in orders:
        assert len(batches) == len(sampler)
        assert all(len(set(batch)) == len(batch) <= 2 for batch in batches)
        assert Counter(chain(*batches)) == {i: times.get(i, 1) for i in range(len(captions))}
    assert orders[0] != orders[1] != orders[2]


def test_one_image_gives_no_reward_to_learn_from(tmp_path: Path, cache: Path):
    write_split(tmp_path, "train", {"0.png": ["a dog runs.", "a red dog."]})
    draw_noise(0).save(tmp_path / "images" / "train" / "0.png")
    with pytest.raises(InputError, match="--objective cider needs at least two training images"):
        CiderReward(CaptionDataset(tmp_path, "train", vocab_threshold=1, cache=cache))


def test_an_image_with_more_captions_than_there_are_batches_is_drawn_once_in_each():
    rows = np.repeat([0, 1, 2], [9, 1, 1])
    data = SimpleNamespace(tokens=np.tile([START, 7, END], 11), offsets=3 * np.arange(12), image_rows=rows)
    sampler = SelfCritical(data).build_sampler(data, 6 * SAMPLES_PER_IMAGE, seed=0, frozen=True)
    batches = [rows[batch].tolist() for batch in sampler]
    assert len(batches) == 2
    assert all(batch.count(0) == 1 for batch in batches)


def test_in_bfloat16_every_weight_learns_that_learns_in_float32(model: CaptioningModel):
    learns = []
    for enabled in (False, True):  # oneDNN's LSTM has bfloat16 on some processors only
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), torch.backends.mkldnn.flags(enabled=False):
            loss, _ = model(sampled(make_features(model, 2), np.array([0, 1])))
        loss.backward()
        learns.append({name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()})
        model.zero_grad()
    assert learns[0] == learns[1]
    assert "decoder.linear.weight" in learns[0]


# Training


@pytest.fixture
def config(small: Make, tiny_backbone: Callable) -> Make:
    """One epoch of cross-entropy on 24 photos."""

    def make(**fields: object) -> TrainingConfig:
        return small(**{"image_size": 32, "dropout": 0.3, **fields})

    return make


def go_on(folder: Path, **fields: object) -> Path:
    """Train the model on CIDEr-D, for two epochs of 8 steps."""
    resumed = resumed_config(folder, "cider")
    for name, value in {"num_epochs": 2, **fields}.items():
        setattr(resumed, name, value)
    return train(resumed)


@pytest.mark.parametrize("decoder", DECODERS)
def test_training_raises_the_mean_cider_d(config: Make, cache: Path, decoder: str):
    settings = config(decoder=decoder, num_epochs=12, learning_rate=5e-3, patience=99)
    folder = train(settings)

    def measure(epoch: int) -> float:
        encoder, network, vocab, _ = load_model(folder, epoch=epoch)
        data = CaptionDataset(settings.data, "train", vocab=vocab, cache=cache)
        dataset = ImageDataset(data.paths, build_transform(False, 32, normalize=False))
        with torch.no_grad():
            features = encoder(torch.stack([dataset[i] for i in range(len(dataset))]))
        drawn = sample(network, features, seed=0, n=60)
        ids = np.arange(len(dataset)).repeat(60)
        return CiderReward(data)(ids, [hypothesis.tokens for hypothesis in drawn]).mean()

    before = measure(read_description(folder).best_epoch)  # that it starts from
    go_on(folder, num_epochs=40, learning_rate=3e-3, batch_size=60, patience=99)
    assert measure(52) > 1.1 * before  # a random backbone's features say little
    log = read_log(folder / "training_log.txt")
    rewards = -log[log[:, 0] > 12, 2]
    assert rewards.shape == (40 * 2,)
    assert rewards[-8:].mean() > rewards[:8].mean()
    assert rewards.min() >= 0


@pytest.mark.parametrize("fields", [{}, {"decoder": "attention", "views": 2}, {"fine_tune": 5}], ids=str)
@pytest.mark.parametrize("step", [0, 4])
def test_a_training_that_was_stopped_ends_as_one_that_was_not(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fields: dict, step: int
):
    stopped = train(config(**fields))
    undisturbed = go_on(shutil.copytree(stopped, tmp_path / "undisturbed"), num_epochs=3)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            go_on(stopped, num_epochs=3)
    assert train(resumed_config(stopped)) == stopped
    assert epochs_saved(stopped) == [1, 2, 3, 4]
    assert_same_model(stopped, undisturbed)
    before = (stopped / "decoder-4.pkl").read_bytes(), (stopped / "training_log.txt").read_bytes()
    train(resumed_config(stopped))  # it has ended
    assert before == ((stopped / "decoder-4.pkl").read_bytes(), (stopped / "training_log.txt").read_bytes())


def test_killed_as_the_objective_changes_it_goes_on_with_the_new_one(
    config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    killed = train(config())
    undisturbed = go_on(shutil.copytree(killed, tmp_path / "undisturbed"))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_resume", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go_on(killed)
    train(resumed_config(killed))
    assert_same_model(killed, undisturbed)
    assert read_description(killed).training == {**read_description(undisturbed).training}


def test_it_starts_from_the_best_epoch_and_the_best_of_all_is_chosen(config: Make, judged: Callable):  # noqa: F811
    judged([0.1, 0.5, 0.4, 0.3, 0.6, 0.2])
    folder = train(config(num_epochs=3, batch_size=120))
    frozen = {"learning_rate": 1e-12, "num_epochs": 3, "batch_size": 120}
    go_on(folder, **frozen)
    description = read_description(folder)
    assert [epoch["epoch"] for epoch in description.epochs] == [1, 2, 3, 4, 5, 6]
    assert description.best_epoch == 5
    states = {epoch: read_state_dict(folder / f"decoder-{epoch}.pkl")["linear.weight"] for epoch in (2, 3, 6)}
    torch.testing.assert_close(states[6], states[2], atol=1e-9, rtol=0)
    assert not torch.allclose(states[6], states[3], atol=1e-6, rtol=0)


def test_patience_counts_from_where_the_objective_changed(config: Make, judged: Callable):  # noqa: F811
    judged([0.5, 0.4, 0.3, 0.2, 0.1, 0.9])
    folder = train(config(num_epochs=3, patience=2, batch_size=120))
    assert len(read_description(folder).epochs) == 3
    go_on(folder, num_epochs=3)
    assert len(read_description(folder).epochs) == 5


def test_the_description_says_what_was_done(config: Make, tmp_path: Path):
    folder = train(config(learning_rate=2e-3))
    go_on(folder, num_epochs=1)
    training = read_description(folder).training
    assert (training["objective"], training["learning_rate"], training["num_epochs"]) == ("cider", 5e-4, 1)
    before = training["before"]
    assert (before["objective"], before["learning_rate"], before["num_epochs"]) == ("cross-entropy", 2e-3, 1)
    lines = (folder / "training_log.txt").read_text().splitlines()
    assert "Perplexity: " in lines[0]
    assert lines[-1].startswith("Epoch [2/2], Step [8/8], Loss: -")
    assert "CIDEr-D: " in lines[-1]
    (tmp_path / "shared").mkdir()
    write_shared(folder, tmp_path / "shared", "someone/model", "mit")
    assert before["models"] not in (tmp_path / "shared" / "captioner.json").read_text()


def test_the_state_of_a_training_that_knew_one_objective_goes_on(config: Make):
    folder = train(config())
    state = load_resume(folder, print)
    torch.save({k: v for k, v in state.items() if k not in ("objective", "first_epoch")}, folder / "resume.pt")
    (folder / "resume-previous.pt").unlink()
    resumed = resumed_config(folder)
    resumed.num_epochs = 2
    assert epochs_saved(train(resumed)) == [1, 2]
    assert epochs_saved(go_on(folder, num_epochs=1)) == [1, 2, 3]


def test_without_a_model_to_start_from_it_says_what_to_do(config: Make, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"needs a trained model to start from; add --resume"):
        config(objective="cider")
    settings = config()
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            train(settings)
    with pytest.raises(InputError, match=r"small has no completed epoch; train it"):
        go_on(settings.models / settings.name)


@pytest.mark.slow
def test_the_command_goes_on_with_the_objectives_own_learning_rate(trained: Path, tmp_path: Path):
    shutil.copytree(trained, tmp_path / "model")
    done = run_script("train.py", "--resume", "model", "--objective=cider", "--num-epochs", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "epoch 3: train loss -" in done.stdout
    assert read_description(tmp_path / "model").training["learning_rate"] == 5e-4
    done = run_script("train.py", "--resume", "model", "--objective", "bleu", cwd=tmp_path)
    assert done.returncode == 2
    assert "bleu" in done.stderr
    assert "captioner.json" not in done.stderr
