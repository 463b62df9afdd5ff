"""Another encoder's vectors in the space of those that are there."""

from pathlib import Path

import numpy as np
import pytest

from model import align
from model.align import Alignment, AlignmentError


def _units(count: int, dim: int, seed: int = 1) -> align.Array:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    units: align.Array = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return units


def _rotation(dim: int, seed: int = 2) -> align.Array:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((dim, dim)))[0].astype(np.float32)


def _texts(count: int) -> list[str]:
    return [f"text {n}" for n in range(count)]


def test_a_turned_space_is_turned_back_to_the_last_bits() -> None:
    old = _units(500, 24)
    turned = old @ _rotation(24)
    matrix, fidelity = align.fit(old, turned, _texts(500))
    assert np.abs(turned @ matrix - old).max() < 1e-5
    assert fidelity.cosine > 0.9999 and fidelity.neighbours == fidelity.neighbours_new == 1
    assert abs(fidelity.cosine_others) < 0.2 and (fidelity.texts, fidelity.held_out) == (450, 50)


@pytest.mark.parametrize("dim", [12, 40])
def test_a_map_between_dimensions_is_orthonormal_along_the_shorter_side(dim: int) -> None:
    old = _units(600, 24)
    new = old[:, :12] if dim == 12 else np.concatenate([old, 0.1 * _units(600, 16, 5)], axis=1)
    matrix, fidelity = align.fit(old, new / np.linalg.norm(new, axis=1, keepdims=True), _texts(600))
    gram = matrix @ matrix.T if dim == 12 else matrix.T @ matrix
    assert matrix.shape == (dim, 24) and np.abs(gram - np.eye(min(dim, 24))).max() < 1e-5
    assert fidelity.cosine > (0.6 if dim == 12 else 0.99)


def test_angles_between_new_vectors_stay_as_they_are() -> None:
    old, new = _units(4000, 24), _units(4000, 24, 7)  # nothing in common: the map is as good as any
    matrix, fidelity = align.fit(old, new, _texts(4000))
    moved = new @ matrix
    assert np.abs(moved @ moved.T - new @ new.T).max() < 1e-5
    assert fidelity.cosine < 0.5 and fidelity.neighbours < 2 * fidelity.neighbours_chance == 20 / 399


def test_what_a_map_is_fitted_to_tells_nothing_of_how_good_it_is() -> None:
    """A map of as many numbers as the texts have fits them whatever they are."""
    old, new = _units(1000, 384), _units(1000, 384, 7)
    _, fidelity = align.fit(old, new, _texts(1000))
    assert fidelity.neighbours < 2 * fidelity.neighbours_chance and abs(fidelity.cosine) < 0.1


def test_a_text_under_several_ids_is_fitted_or_held_out_and_counts_once() -> None:
    old = np.repeat(_units(300, 8), 3, axis=0)
    new, texts = old @ _rotation(8), [text for text in _texts(300) for _ in range(3)]
    matrix, fidelity = align.fit(old, new, texts)
    assert (fidelity.texts, fidelity.held_out) == (270, 30)
    draw = np.random.default_rng(3).permutation(900)
    again, told = align.fit(old[draw], new[draw], [texts[at] for at in draw])
    assert told == fidelity and (again == matrix).all()  # whatever the order


def test_a_folder_holds_what_was_written(tmp_path: Path) -> None:
    matrix, fidelity = align.fit(_units(300, 8), _units(300, 8, 3), _texts(300))
    written = Alignment("intfloat/e5@1", "e5:1", "minilm:2", matrix, fidelity)
    written.write(tmp_path / "made")
    found = Alignment.read(tmp_path / "made")
    assert (found.model, found.of, found.to, found.fidelity) == ("intfloat/e5@1", "e5:1", "minilm:2", fidelity)
    assert (found.matrix == matrix).all() and found.digest == written.digest
    assert Alignment("m", "e5:1", "other:2", matrix).digest != written.digest
    assert align.is_aligned(tmp_path / "made") and not align.is_aligned(tmp_path)
    (tmp_path / "made" / align.WEIGHTS).unlink()
    with pytest.raises(AlignmentError, match="holds no alignment"):
        Alignment.read(tmp_path / "made")


def test_too_few_texts_are_refused() -> None:
    with pytest.raises(AlignmentError, match=r"199 different texts .* 200 at least"):
        align.fit(_units(200, 8), _units(200, 8), [*_texts(199), "text 0"])
    with pytest.raises(AlignmentError, match=r"300 different texts .* 384 at least"):
        align.fit(_units(300, 384), _units(300, 500), _texts(300))
