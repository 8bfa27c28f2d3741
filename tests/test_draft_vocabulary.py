"""Which tokens can be drafted, and that their rows lie beside their ids."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from max.driver import CPU, Buffer
from max.dtype import DType

from step3p5.byte_account import draft_bytes
from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.config_fields import ConfigError
from step3p5.config_parser import parse_model_config
from step3p5.random_checkpoint.hub_config import hub_config
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.speculation.draft_heads import DraftHeads
from step3p5.speculation.draft_vocabulary import MOST_NEW, SIZE_VARIABLE, DraftVocabulary, draft_vocabulary_size

FLASH = parse_model_config(hub_config(PRESETS["flash"], 6, CheckpointDtype.BFLOAT16))


def test_what_is_seen_takes_the_place_of_what_was_not_seen_for_longest() -> None:
    vocabulary = DraftVocabulary(10, 4)
    vocabulary.see(np.array([9, 1]))
    assert admitted(vocabulary) == {3: 9}  # of what was never seen the highest id goes first
    vocabulary.see(np.array([7, 8]))
    assert set(admitted(vocabulary).values()) == {7, 8}
    assert set(vocabulary.ids.tolist()) == {1, 7, 8, 9}
    vocabulary.see(np.array([1]))
    vocabulary.see(np.array([5]))
    assert set(admitted(vocabulary)) == {3}
    assert set(vocabulary.ids.tolist()) == {1, 5, 7, 8}
    assert admitted(vocabulary) == {}


def test_a_long_prompt_enters_bit_by_bit_and_each_token_once(rng: np.random.Generator) -> None:
    vocabulary = DraftVocabulary(1000, 400)
    prompt = rng.permutation(np.arange(500, 500 + 2 * MOST_NEW))
    vocabulary.see(np.concatenate([prompt, prompt]))
    assert [len(vocabulary.admit()[0]) for _ in range(3)] == [MOST_NEW, MOST_NEW, 0]
    assert len(set(vocabulary.ids.tolist())) == 400
    assert set(prompt.tolist()) < set(vocabulary.ids.tolist())


def admitted(vocabulary: DraftVocabulary) -> dict[int, int]:
    slots, tokens = vocabulary.admit()
    return dict(zip(slots.tolist(), tokens.tolist(), strict=True))


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
