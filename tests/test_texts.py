"""A user's texts as int8 vectors, decays and a tail."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import texts


def unit(seed: int, dim: int = 384) -> np.ndarray:
    vector = np.random.default_rng(seed).standard_normal(dim).astype(np.float32)
    return vector / np.linalg.norm(vector)


@given(st.integers(0, 10_000))
def test_a_quantized_vector_keeps_its_direction(seed: int) -> None:
    vector = unit(seed)
    back = texts.dequantize(*texts.quantize(vector))
    assert back @ vector / np.linalg.norm(back) > 0.9999


def test_a_zero_vector_stays_zero() -> None:
    scale, vector = texts.quantize(np.zeros(5, np.float32))
    assert scale == 0 and not vector.any()


@pytest.mark.parametrize("kept", [0, 1, 5])
@pytest.mark.parametrize("older", [0, 1, 7])
def test_the_mean_is_the_decayed_mean_of_all_texts(kept: int, older: int) -> None:
    vectors = [unit(n) for n in range(kept + older)]  # oldest first
    tail, tail_weight = np.zeros(384, np.float32), 0.0
    for vector in vectors[:older]:
        tail, tail_weight = texts.push_tail(tail, tail_weight, *texts.quantize(vector))
    quantized = [texts.quantize(v) for v in vectors[older:]][::-1]
    scales = np.array([s for s, _ in quantized], np.float32)
    ints = np.stack([q for _, q in quantized]) if quantized else np.zeros((0, 384), np.int8)
    weight, mean = texts.visible_mean(scales, ints, tail, tail_weight)
    decays = 0.9 ** np.arange(kept + older)[::-1]
    assert weight == pytest.approx(decays.sum())
    if vectors:
        expected = decays @ np.stack(vectors) / decays.sum()
        np.testing.assert_allclose(mean, expected, atol=2e-3)
    else:
        assert not mean.any()
