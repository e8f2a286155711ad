"""Windows of whole documents: every token a target once, nothing cut that fits, and the same whatever reads them."""

import itertools
import json
from typing import Any

import numpy as np
import pytest

from bigmac_jax.config import ConfigError
from bigmac_jax.data.batch import NO_TARGET, PADDING, number_documents
from bigmac_jax.data.encoding import Counts
from bigmac_jax.data.packing import PackedDocuments, best_fit, cut_documents
from bigmac_jax.data.pipeline import TrainIterator, eval_batches, open_stream
from bigmac_jax.data.token_cache import MemoryStream
from bigmac_jax.data.tokenizer import ByteTokenizer

END = 9


def stream_of(*lengths: int, seed: int = 0) -> MemoryStream:
    """Documents of so many tokens of 0 to 8, as the cache lays them out."""
    draw = np.random.default_rng(seed)
    tokens = np.concatenate([[END], *(np.append(draw.integers(0, END, n), END) for n in lengths)])
    return MemoryStream(tokens, Counts(tokens=len(tokens)), END)


def test_pieces_by_hand() -> None:
    """Documents of 2, 0 and 7 tokens: with the end-of-text token before them they have 3, 1 and 8 inputs."""
    start_N, size_N, number_N = cut_documents(stream_of(2, 0, 7), 5, stride=0)
    assert (start_N.tolist(), size_N.tolist(), number_N.tolist()) == ([0, 3, 4, 9], [3, 1, 5, 3], [0, 0, 0, 1])
    start_N, size_N, number_N = cut_documents(stream_of(2, 0, 7), 5, stride=2)
    assert (start_N.tolist(), size_N.tolist(), number_N.tolist()) == ([0, 3, 4, 6, 8], [3, 1, 5, 5, 4], [0, 0, 0, 1, 2])


def test_best_fit_by_hand() -> None:
    """8 | 7 | 5 opens a third; 3 goes where 3 are left, not where 5 are; 1 and 1 where 1 is left, then into what is
    open."""
    assert best_fit(np.array([1, 8, 3, 7, 5, 1]), 8) == [[1], [3, 0], [4, 2], [5]]
    assert best_fit(np.array([6, 5, 2]), 8) == [[0, 2], [1]]  # and not where more room is left


def test_pieces_of_one_size_are_taken_in_their_order() -> None:
    """200 windows with room for one; the last that was opened is filled first."""
    windows = best_fit(np.array([3, 1] * 200), 4)
    assert windows == [[2 * i, 2 * (199 - i) + 1] for i in range(200)]


def test_a_stream_without_ends_is_one_document() -> None:
    """Its padding is a token that there is."""
    stream = MemoryStream(np.array([5, 6, 7, 8, 9]), Counts(tokens=5))
    packed = PackedDocuments(stream, 3)
    assert [window.tolist() for window in packed] == [  # type: ignore[attr-defined]
        [[5, 6, 7], [6, 7, 8], [0, 0, 0]],
        [[8, 0, 0], [9, NO_TARGET, NO_TARGET], [0, PADDING, PADDING]],
    ]
    assert packed.padding == pytest.approx(2 / 6)
    assert PackedDocuments(MemoryStream(np.array([5, 6]), Counts(tokens=2)), 1).padding == 0


def test_a_window_by_hand() -> None:
    stream = MemoryStream(np.array([9, 1, 2, 9, 3, 9, 4, 5, 6, 7, 9]), Counts(tokens=11), END)
    packed = PackedDocuments(stream, 6)
    assert len(packed) == 2
    assert packed[0].tolist() == [[9, 1, 2, 9, 3, 9], [1, 2, 9, 3, 9, NO_TARGET], [0, 0, 0, 1, 1, PADDING]]
    assert packed[1].tolist() == [[9, 4, 5, 6, 7, 9], [4, 5, 6, 7, 9, NO_TARGET], [0, 0, 0, 0, 0, PADDING]]
    assert packed.describe() == "2 windows of whole documents, 16.67% padding, 0 cuts in longer documents"


@pytest.mark.parametrize("stride", [0, 1, 5, 16])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_a_target_once(seed: int, stride: int) -> None:
    lengths = np.random.default_rng(seed).geometric(0.08, size=50) - 1
    stream, length = stream_of(*lengths.tolist(), seed=seed), 16
    packed = PackedDocuments(stream, length, stride)
    whole = stream.tokens(0, stream.num_tokens)
    starts = np.flatnonzero(whole == END)
    found: list[tuple[int, ...]] = []
    for inputs, targets, numbers in (packed[w] for w in range(len(packed))):
        assert (np.diff(np.append(numbers, PADDING)) <= 1).all() and (targets[numbers == PADDING] == NO_TARGET).all()
        for document in range(numbers.max() + 1):
            own = numbers == document
            new = targets[own] != NO_TARGET
            found.append((*inputs[own], -7, *targets[own][new]))
            assert inputs[own][0] == END or not stride or stride == length or not new[0] or new.all()
    # What each document must give, cut from its start on.
    expected: list[tuple[int, ...]] = []
    step = stride or length
    for start, end in itertools.pairwise(starts):
        for at in range(start, max(start + 1, end - length + step), step):
            stop = min(at + length, end)
            again = length - step if at > start else 0
            expected.append((*whole[at:stop], -7, *whole[at + 1 + again : stop + 1]))
    assert sorted(found) == sorted(expected)
    assert sum((packed[w][1] != NO_TARGET).sum() for w in range(len(packed))) == stream.num_tokens - 1


def test_documents_of_the_stream() -> None:
    inputs_BL = np.array([[3, 9, 4, 9, 9, 5], [9, 1, 2, 3, 4, 5]])
    assert number_documents(inputs_BL, END).tolist() == [[0, 1, 1, 2, 3, 3], [1, 1, 1, 1, 1, 1]]


def test_evaluation_by_document_does_not_see_its_neighbours() -> None:
    """The windows of a document are the same wherever it stands."""

    def windows(stream: MemoryStream, marked: int) -> list[Any]:
        """(inputs, targets) of the documents with an odd token, 8, as the first one."""
        found = []
        for inputs_BL, targets_BL, segments_BL, _ in eval_batches(stream, 8, 3, documents="masked"):
            for row in range(3):
                for number in range(segments_BL[row].max() + 1):
                    own = segments_BL[row] == number
                    if marked in inputs_BL[row][own]:
                        found.append((inputs_BL[row][own].tolist(), targets_BL[row][own].tolist()))
        return sorted(found)

    document = [8] * 11
    alone = MemoryStream(np.array([9, *document, 9]), Counts(tokens=13), END)
    among = MemoryStream(np.array([9, 1, 2, 9, *document, 9, 3, 4, 5, 9]), Counts(tokens=20), END)
    assert windows(alone, 8) == windows(among, 8)
    assert sum((t != NO_TARGET).sum() for _, t, *_ in eval_batches(among, 8, 3, documents="masked")) == 19


@pytest.fixture
def notes(tmp_path, make_config):
    """(config, stream) of 300 short documents."""
    path = tmp_path / "notes.jsonl"
    draw = np.random.default_rng(1)
    rows = [{"text": " ".join(f"{i:03}" for i in range(draw.integers(1, 8)))} for _ in range(300)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"sequence_length": 32, "batch_size": 8, "documents": "masked", "validation_source": str(path)}
    return lambda **more: make_config(path, **(fields | more))


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_batches_are_the_same_whatever_reads_them(notes, packing: str) -> None:
    """By halves, after a resume, and by workers."""
    config = notes(packing=packing)
    stream = open_stream(config, "train", ByteTokenizer())

    def take(count: int, rows: Any = None, start: int = 0, config: Any = config) -> list[np.ndarray]:
        iterator = TrainIterator(config, stream, rows)
        iterator.set_state({"batches": start})
        batches = [np.stack(next(iterator)[:3]) for _ in range(count)]
        iterator.close()
        return np.stack(batches)

    whole = take(20)
    assert whole.shape == (20, 3, 8, 32) and whole.dtype == np.int32
    np.testing.assert_array_equal(take(9, start=11), whole[11:])
    np.testing.assert_array_equal(np.concatenate([take(20, range(4)), take(20, range(4, 8))], axis=2), whole)
    np.testing.assert_array_equal(take(4, config=notes(packing=packing, num_workers=1)), whole[:4])
    inputs, targets, numbers = whole.swapaxes(0, 1)
    assert (inputs[..., 0] == 256).all() == (packing == "best_fit")  # no document here is longer than a window
    # A document begins behind its own mark, and ends with the next one.
    begins = np.diff(numbers, axis=-1) != 0
    assert (inputs[..., 1:][begins & (numbers[..., 1:] != PADDING)] == 256).all()
    assert (targets[..., :-1][begins] == 256).all()


def test_best_fit_needs_masked_documents(notes) -> None:
    with pytest.raises(ConfigError, match=r"data.packing=best_fit needs data.documents=masked, not stream"):
        notes(packing="best_fit", documents="stream")
    config = notes(packing="best_fit", batch_size=2000)
    with pytest.raises(ConfigError, match=r"windows of data.sequence_length=32, fewer than data.batch_size=2000"):
        TrainIterator(config, open_stream(config, "train", ByteTokenizer()))
