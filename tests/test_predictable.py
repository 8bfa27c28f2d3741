"""Predictable random checkpoints: one ring of tokens that the heads of target and MTP layers follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from reference import Array, Reference, SafetensorsFolder

from step3p5.checkpoint_tensors import CheckpointDtype
from step3p5.random_checkpoint import RandomCheckpointError, write_random_checkpoint
from step3p5.random_checkpoint.predictable import TokenRing
from step3p5.random_checkpoint.presets import PRESETS
from step3p5.random_checkpoint.tokenizer import CONTROL_TOKENS

SEED, RATE, DEPTHS = 5, 0.8, 3
RING = TokenRing(len(CONTROL_TOKENS), PRESETS["tiny"].first_role_token_id)
HEADS = [f"model.layers.{6 + depth}.transformer.shared_head.output.weight" for depth in range(DEPTHS)]


def write(folder: Path, dtype: CheckpointDtype, predictable: float | None) -> Mapping[str, Array]:
    write_random_checkpoint(folder, "tiny", dtype=dtype, seed=SEED, predictable=predictable)
    return SafetensorsFolder(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("predictable") / "tiny"
    write(folder, CheckpointDtype.FLOAT32, RATE)
    return folder


def test_the_ring_goes_through_every_text_token_once() -> None:
    token, seen = RING.first, set()
    for _ in range(RING.size):
        seen.add(token)
        following = RING.following(token)
        assert RING.preceding(np.array([following])).tolist() == [token]
        token = following
    assert seen == set(range(RING.first, RING.first + RING.size))


def test_only_heads_and_projections_differ_from_the_random_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    predictable, random = SafetensorsFolder(checkpoint), write(tmp_path / "r", CheckpointDtype.FLOAT32, None)
    changed = {name for name in random if not np.array_equal(random[name], predictable[name])}
    projections = {f"model.layers.{6 + depth}.eh_proj.weight" for depth in range(DEPTHS)}
    assert changed == {"lm_head.weight", *HEADS, *projections}


def test_a_bfloat16_checkpoint_follows_the_same_ring(checkpoint: Path, tmp_path: Path) -> None:
    exact, rounded = SafetensorsFolder(checkpoint), write(tmp_path / "b", CheckpointDtype.BFLOAT16, RATE)
    for name in ["lm_head.weight", *HEADS]:
        np.testing.assert_allclose(rounded[name], exact[name], rtol=2**-6)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_each_depth_shares_the_targets_row_for_the_given_share_of_tokens(tmp_path: Path, rate: float) -> None:
    tensors = write(tmp_path / "t", CheckpointDtype.FLOAT32, rate)
    for head in HEADS:
        same = (tensors[head] == tensors["lm_head.weight"]).all(axis=1).sum()
        assert abs(same - rate * RING.size) <= 5 * math.sqrt(rate * (1 - rate) * RING.size)


def test_the_drafts_agree_with_the_target_at_about_the_rate(checkpoint: Path) -> None:
    reference = Reference.from_checkpoint(checkpoint)
    tokens = [RING.first + 17]
    for _ in range(400):
        tokens.append(RING.following(tokens[-1]))
    target = reference.logits(tokens).argmax(axis=-1)
    follows = np.array([RING.following(token) for token in tokens])
    assert (target == follows).mean() > 0.9
    for depth, logits in enumerate(reference.mtp_logits(tokens, DEPTHS)):
        agreement = (logits.argmax(axis=-1) == target[depth + 1 :]).mean()
        assert RATE - 0.15 < agreement < RATE + 0.1


def test_a_rate_beyond_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RandomCheckpointError, match=r"--predictable is 1\.5, but it is a rate"):
        write(tmp_path / "t", CheckpointDtype.FLOAT32, 1.5)
    assert not list(tmp_path.iterdir())
