"""Which tokens can be drafted, and that their rows lie beside their ids."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from max.driver import CPU, Buffer
from max.dtype import DType

from step3p5.byte_account import draft_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_fields import ConfigError
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.speculation import draft_heads
from step3p5.speculation.draft_heads import DraftHeads
from step3p5.speculation.draft_vocabulary import MOST_NEW, SIZE_VARIABLE, DraftVocabulary, draft_vocabulary_size

FLASH = parse_model_config(hub_config(PRESETS["flash"], 6, CheckpointDtype.BFLOAT16))


def test_one_token_alone_takes_the_slot_not_seen_for_the_longest_time() -> None:
    vocabulary = DraftVocabulary(10, 4)
    vocabulary.see(np.array([9, 1]))
    assert admitted(vocabulary) == {3: 9}  # of what was never seen the highest id goes first
    for token, slot in ((7, 2), (8, 0), (5, 1), (6, 3)):
        vocabulary.see(np.array([token]))
        assert admitted(vocabulary) == {slot: token}
    vocabulary.see(np.array([7]))
    vocabulary.see(np.array([4]))
    assert admitted(vocabulary) == {0: 4}
    assert vocabulary.ids.tolist() == [4, 5, 7, 6]
    assert admitted(vocabulary) == {}


def test_new_tokens_take_neighbouring_slots() -> None:
    vocabulary = DraftVocabulary(20, 8)
    vocabulary.see(np.array([17, 19, 18]))
    changed = admitted(vocabulary)
    assert sorted(changed) == [3, 4, 5]  # the last whole run of three: 6 and 7 are in none
    assert set(changed.values()) == {17, 18, 19}
    vocabulary.see(np.array([11, 12]))
    assert sorted(admitted(vocabulary)) == [6, 7]


def test_a_run_with_a_token_seen_just_now_is_not_chosen_while_another_is_older() -> None:
    vocabulary = DraftVocabulary(20, 6)
    vocabulary.see(np.array([0, 2, 3]))
    vocabulary.see(np.array([4]))
    vocabulary.see(np.array([10, 11]))
    # 5 was never seen and goes first when one makes room, but its neighbour 4 was seen after 0, 2 and 3.
    assert sorted(admitted(vocabulary)) == [0, 1]
    vocabulary.see(np.array([12]))
    assert admitted(vocabulary) == {5: 12}


@given(st.integers(1, 15), st.lists(st.lists(st.integers(0, 39), max_size=12), max_size=12))
def test_a_slot_and_its_token_lead_to_each_other(size: int, texts: list[list[int]]) -> None:
    vocabulary = DraftVocabulary(40, size)
    for text in texts:
        before = vocabulary.ids.tolist()
        vocabulary.see(np.array(text, dtype=np.int64))
        changed = admitted(vocabulary)
        assert not set(changed.values()) & set(before)
        assert vocabulary.ids.tolist() == [changed.get(slot, token) for slot, token in enumerate(before)]
        assert vocabulary._slots[vocabulary.ids].tolist() == list(range(size))
        assert np.count_nonzero(vocabulary._slots >= 0) == size


def test_a_long_prompt_enters_bit_by_bit_and_each_token_once(rng: np.random.Generator) -> None:
    vocabulary = DraftVocabulary(1000, 400)
    prompt = rng.permutation(np.arange(500, 500 + 2 * MOST_NEW))
    vocabulary.see(np.concatenate([prompt, prompt]))
    assert [len(admitted(vocabulary)) for _ in range(3)] == [MOST_NEW, MOST_NEW, 0]
    assert len(set(vocabulary.ids.tolist())) == 400
    assert set(prompt.tolist()) < set(vocabulary.ids.tolist())


def admitted(vocabulary: DraftVocabulary) -> dict[int, int]:
    """The slots that changed, each with its token."""
    slots, tokens = vocabulary.admit()
    return dict(zip(range(slots.start, slots.stop), tokens.tolist(), strict=True))


@pytest.mark.parametrize("dtype", [np.float32, np.uint16])
def test_every_row_is_that_of_its_token(rng: np.random.Generator, dtype: type) -> None:
    whole: list[npt.NDArray[Any]] = [rng.integers(1, 1 << 16, size=(50, 8)).astype(dtype) for _ in range(2)]
    buffers = [Buffer.from_numpy(head.copy()) for head in whole]
    if dtype is np.uint16:
        buffers = [buffer.view(DType.bfloat16, (50, 8)) for buffer in buffers]
    heads = DraftHeads(buffers, 12, CPU())
    for _ in range(6):
        heads.see(rng.integers(50, size=5))
        heads.refresh()
        for depth, head in enumerate(whole):
            rows, ids = heads.inputs(depth)
            assert (rows.dtype, tuple(rows.shape)) == (buffers[0].dtype, (12, 8))
            bits = (rows.view(DType.uint16, (12, 8)) if dtype is np.uint16 else rows).to_numpy()
            assert ids.to_numpy().tolist() == heads.vocabulary.ids.tolist()
            assert np.array_equal(bits, head[heads.vocabulary.ids])
    assert heads.vocabulary.ids.max() > 12


def test_on_a_device_one_copy_brings_the_ids_and_one_a_head_the_rows(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [rng.random((50, 8), dtype=np.float32) for _ in range(3)]
    heads = DraftHeads([Buffer.from_numpy(head.copy()) for head in whole], 12, CPU())
    copied: list[list[int]] = []

    def copy(to: Sequence[Buffer], source: Sequence[Buffer]) -> None:
        for kept, new in zip(to, source, strict=True):
            kept.to_numpy()[:] = new.to_numpy()  # `inplace_copy_from` on a CPU outlives its source
        copied.append([kept.num_elements for kept in to])

    monkeypatch.setattr(draft_heads, "batch_inplace_copy", copy)
    monkeypatch.setattr(heads, "_device", SimpleNamespace(is_host=False))
    for tokens in ([30, 31, 32, 33, 34], [40], [41, 42], [40]):
        heads.see(np.array(tokens))
        heads.refresh()
    assert copied == [[count, *3 * [8 * count]] for count in (5, 1, 2)]
    for depth, head in enumerate(whole):
        rows, ids = heads.inputs(depth)
        assert ids.to_numpy().tolist() == heads.vocabulary.ids.tolist()
        assert np.array_equal(rows.to_numpy(), head[heads.vocabulary.ids])


def test_the_size_is_an_eighth_of_the_released_vocabulary_or_what_the_variable_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    assert draft_vocabulary_size(FLASH) == 16384
    monkeypatch.setenv(SIZE_VARIABLE, "1000000")
    assert draft_vocabulary_size(FLASH) == FLASH.vocab_size
    monkeypatch.setenv(SIZE_VARIABLE, "none")
    with pytest.raises(ConfigError, match="STEP3P5_DRAFT_VOCABULARY: found 'none', expected a whole number from 1 on"):
        draft_vocabulary_size(FLASH)


def test_a_draft_reads_the_rows_of_its_vocabulary() -> None:
    whole, part = (draft_bytes(FLASH, 3, CheckpointDtype.BFLOAT16, size) for size in (1 << 20, 16384))
    assert whole - part == 3 * (FLASH.vocab_size - 16384) * FLASH.hidden_size * 2
