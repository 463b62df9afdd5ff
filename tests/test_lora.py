"""Training inside the encoder: the gradient is exact, it learns what is there, and goes on as if never interrupted."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from model.encoder import Encoder, EncoderConfig
from model.lora import (
    ANCHOR,
    PAIRS,
    PARTS,
    LoraTraining,
    LoraTrainingConfig,
    TextProblem,
    TrainingData,
    TrainingError,
    TrainingSet,
    _alike,
    require_targets,
)
from tests import tiny_model

TONGUES = (("river", "stone", "cloud", "forest", "mountain", "desert", "island", "valley"),
           ("guitar", "piano", "violin", "trumpet", "drums", "flute", "organ", "harp"))  # fmt: skip
FILLERS = ("the", "a small", "this old", "one more", "my", "that very", "your", "some")
CONFIG = LoraTrainingConfig(
    layers=0, steps=40, lr=1e-2, lr_weights=0.02, pairs=8, chunk_texts=8, max_tokens=16, anchor=0.1
)
STRENGTH = 4.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_model.make(tmp_path_factory.mktemp("tiny") / "tiny"))


@pytest.fixture(scope="module")
def data(base: str) -> TrainingData:
    """Who writes the n-th word of one tongue chooses the item of the n-th word of the other."""
    texts = [f"{filler} {word}" for words in TONGUES for word in words for filler in FILLERS]
    size, fillers = len(TONGUES[0]), len(FILLERS)
    vectors = Encoder(base, "cpu", EncoderConfig(precision="float32")).encode(texts)

    def text(tongue: int, word: int, filler: int) -> int:
        return (tongue * size + word) * fillers + filler

    def side(chosen: range) -> TrainingSet:
        problems = []
        for f in chosen:
            told = np.array([[text(0, w, f), text(0, w, f)] for w in range(size)], np.int32)
            weight = np.tile(np.array([STRENGTH, 0], np.float32), (size, 1))
            items = np.array([text(1, w, f) for w in range(size)], np.int32)
            offset = np.where(np.eye(size), -np.inf, 0).astype(np.float32)
            words = (STRENGTH * vectors[told[:, 0]]).astype(np.float32)
            problems.append(TextProblem(words, told, weight, items, items, offset, np.zeros(size, np.float32), 0.0))
        rows = [(text(0, w, f), text(1, w, f), w) for f in chosen for w in range(size)]
        turns = [(text(0, w, f), text(0, w, chosen[0]), w) for f in chosen[1:] for w in range(size)]
        neighbours = [(text(1, w, f), text(1, w, chosen[0]), -1) for f in chosen[1:] for w in range(size)]
        pairs = dict(zip(PAIRS, (np.array(some, np.int64) for some in (rows, turns, neighbours)), strict=True))
        return TrainingSet(problems, pairs, np.array([row[0] for row in rows], np.int64))

    return TrainingData(texts, side(range(6)), side(range(6, 8)))


def _weights(training: LoraTraining) -> dict[str, Any]:
    return {name: p.detach().numpy().copy() for name, p in training._named}


def _gradients(training: LoraTraining) -> list[Any]:
    return [p.grad.numpy().copy() for _, p in training._named if p.grad is not None]


def _run(training: LoraTraining, steps: int) -> list[dict[str, float]]:
    return [step.losses for _, step in zip(range(steps), training.steps(), strict=False)]


def test_cached_gradient_is_that_of_one_whole_graph(base: str, data: TrainingData) -> None:
    training = LoraTraining(base, data, CONFIG, "cpu")
    _run(training, 3)  # before that one factor is 0, and with it the other's gradient
    training._optimizer.zero_grad()
    losses, texts = training._accumulate(7, 1.0)
    cached = _gradients(training)
    training._optimizer.zero_grad()
    plain_losses, plain_texts = training._accumulate(7, 1.0, cached=False)
    assert set(losses) == {*PARTS, ANCHOR} and texts == plain_texts
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    for one, other in zip(cached, _gradients(training), strict=True):
        assert np.abs(other).max() > 0
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5 * np.abs(other).max())


def test_accumulated_gradient_is_the_mean_over_batches(base: str, data: TrainingData) -> None:
    training = LoraTraining(base, data, CONFIG, "cpu")
    _run(training, 2)
    apart = []
    for number in (4, 5):
        training._optimizer.zero_grad()
        training._accumulate(number, 1.0)
        apart.append(_gradients(training))
    training._optimizer.zero_grad()
    for number in (4, 5):
        training._accumulate(number, 0.5)
    for first, second, mean in zip(*apart, _gradients(training), strict=True):
        np.testing.assert_allclose((first + second) / 2, mean, rtol=1e-4, atol=1e-6)


def test_training_lowers_what_is_held_out(base: str, data: TrainingData) -> None:
    """Two tongues whose words are synonyms by clicks; held out are texts that were never seen."""
    training = LoraTraining(base, data, CONFIG, "cpu")
    before = training.held_out()
    assert before[ANCHOR] < 1e-9, "an adapter that is not trained changes nothing"
    _run(training, CONFIG.steps)
    after = training.held_out()
    for part in ("rec", "comment_item"):
        assert after[part] < 0.8 * before[part], (part, before, after)
    assert all(0 < weight <= 1 for weight in training.weights.values())


def test_a_strong_anchor_keeps_the_vectors(base: str, data: TrainingData) -> None:
    away = []
    for anchor in (0.0, 100.0):
        training = LoraTraining(base, data, replace(CONFIG, anchor=anchor, steps=12), "cpu")
        _run(training, 12)
        away.append(training.held_out()[ANCHOR])
    assert away[1] < 0.5 * away[0]


def test_training_that_goes_on_is_the_one_never_interrupted(base: str, data: TrainingData) -> None:
    config = replace(CONFIG, steps=8, accumulate=2)
    whole = LoraTraining(base, data, config, "cpu")
    losses = _run(whole, 8)
    for stop in (0, 3, 7):
        torch.manual_seed(stop)  # what else the process draws makes no difference
        first = LoraTraining(base, data, config, "cpu")
        told = _run(first, stop)
        second = LoraTraining(base, data, config, "cpu")
        second.load(first.save())
        assert told + _run(second, 8) == losses
        for name, weights in _weights(whole).items():
            assert weights.tobytes() == _weights(second)[name].tobytes(), name
        assert (second.first, second.last, second.weights) == (whole.first, whole.last, whole.weights)
    other = LoraTraining(base, data, replace(config, seed=2), "cpu")
    assert _run(other, 8) != losses


def test_a_saved_state_that_is_damaged_is_refused(base: str, data: TrainingData) -> None:
    training = LoraTraining(base, data, CONFIG, "cpu")
    with pytest.raises(TrainingError, match="saved state"):
        training.load(training.save()[:100])


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_written_encoder_gives_the_trained_vectors(tmp_path: Path, data: TrainingData, pooling: str) -> None:
    base = str(tiny_model.make(tmp_path / "tiny", pooling))
    training = LoraTraining(base, data, replace(CONFIG, steps=4), "cpu")
    _run(training, 4)
    places = range(0, len(data.texts), 5)
    trained = training.encode(places)
    out = tmp_path / "trained"
    out.mkdir()
    training.write(out)
    plain = EncoderConfig(precision="float32")
    encoder, frozen = Encoder(str(out), "cpu", plain), Encoder(base, "cpu", plain)
    texts = [data.texts[i] for i in places]
    np.testing.assert_allclose(encoder.encode(texts), trained, atol=1e-5)
    assert np.abs(frozen.encode(texts) - trained).max() > 1e-2
    assert encoder.name.startswith("trained:") and encoder.name.split(":")[1] != frozen.name.split(":")[1]
    apart = PeftModel.from_pretrained(AutoModel.from_pretrained(base), str(out / "adapter"))
    merged = apart.merge_and_unload().state_dict()
    for name, weights in AutoModel.from_pretrained(out).state_dict().items():
        torch.testing.assert_close(merged[name], weights, msg=name)


def test_bfloat16_passes_learn_the_same_thing(base: str, data: TrainingData) -> None:
    losses = []
    for precision in ("float32", "bfloat16"):
        config = replace(CONFIG, steps=4, precision=precision)
        training = LoraTraining(base, data, config, "cpu")
        losses.append(_run(training, 4))
        assert all(p.dtype == torch.float32 for _, p in training._named)
    assert losses[0] != losses[1]
    for exact, rough in zip(*losses, strict=True):
        assert rough["rec"] == pytest.approx(exact["rec"], rel=0.05)


def test_pairs_that_share_a_text_or_a_group_are_no_negatives() -> None:
    rows = np.array([(0, 1, 7), (0, 2, 8), (3, 1, 9), (4, 5, 7), (6, 8, -1), (9, 10, -1)])
    told = {(int(a), int(b)) for a, b in np.argwhere(_alike(rows)) if a < b}
    assert told == {(0, 1), (0, 2), (0, 3)}


def test_adapters_are_in_the_chosen_layers_alone(base: str, data: TrainingData) -> None:
    for targets, modules in ((("all-linear",), 6), (("query", "value"), 2), (("output.dense",), 2)):
        config = replace(CONFIG, layers=1, targets=targets, steps=1)
        require_targets(base, config)
        names = {name.split(".lora_")[0] for name, _ in LoraTraining(base, data, config, "cpu")._named}
        assert len(names) == modules and all(".layer.1." in name for name in names), "no pooler among them"


def test_a_training_that_diverges_is_told(base: str, data: TrainingData) -> None:
    training = LoraTraining(base, data, replace(CONFIG, lr=1e30, steps=2), "cpu")
    assert len(_run(training, 1)) == 1
    with pytest.raises(TrainingError, match=r"diverged: before step 2 .*--lr"):
        _run(training, 1)
    with pytest.raises(TrainingError, match="diverged: on what is held out, after 1 steps"):
        training.held_out()


def test_what_cannot_be_trained_is_told(base: str, data: TrainingData, monkeypatch: pytest.MonkeyPatch) -> None:
    for layers in (0, 1):
        with pytest.raises(TrainingError, match=r"no linear modules.*w_qkv.*query.*all-linear"):
            require_targets(base, replace(CONFIG, targets=("w_qkv",), layers=layers))
    nothing = TrainingSet([], {kind: np.zeros((0, 3), np.int64) for kind in PAIRS}, np.zeros(0, np.int64))
    with pytest.raises(TrainingError, match="nothing to train"):
        LoraTraining(base, TrainingData([], nothing, nothing), CONFIG, "cpu")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(TrainingError, match=r"headwater\[lora\]"):
        LoraTraining(base, data, CONFIG, "cpu")
