"""The rows of the depths' heads for the tokens that can be drafted, on the device beside those tokens' ids.

New tokens are neighbours: one copy brings their ids and one a head their rows, however many they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from max.driver import Buffer, Device, batch_inplace_copy
from max.dtype import DType

from .draft_vocabulary import DraftVocabulary
from .rows import Int64
from .transfers import OneCopy


class DraftHeads:
    """Keeps the heads with their vocabulary.

    Args:
        heads: Each depth's whole head `[vocab_size, hidden_size]` on the host, mapped from the checkpoint's files.
        size: Tokens that can be drafted, fewer than `vocab_size`.
        device: Where the depths run.
    """

    def __init__(self, heads: Sequence[Buffer], size: int, device: Device) -> None:
        vocab_size, self._width = heads[0].shape
        self.vocabulary = DraftVocabulary(vocab_size, size)
        self._dtype = heads[0].dtype
        # numpy has no bfloat16: rows are moved as bits.
        self._whole = [_bits(head) for head in heads]
        self._rows = [Buffer.from_numpy(head[:size].copy().reshape(-1)).to(device) for head in self._whole]
        self._ids = Buffer.from_numpy(self.vocabulary.ids.copy()).to(device)
        self._device, self._copies = device, OneCopy(device)

    def see(self, tokens: Int64) -> None:
        """Takes note of tokens of a text: they can be drafted soon."""
        self.vocabulary.see(tokens)

    def refresh(self) -> None:
        """Brings rows and ids up to date before a pass."""
        slots, tokens = self.vocabulary.admit()
        if not len(tokens):
            return
        if self._device.is_host:
            for kept, new in zip((self._ids, *self._rows), (tokens, *(h[tokens] for h in self._whole)), strict=True):
                kept.to_numpy().reshape(len(self.vocabulary.ids), -1)[slots] = new.reshape(len(tokens), -1)
            return
        ids, *rows = self._copies.send(tokens, *(head[tokens].reshape(-1) for head in self._whole))
        numbers = slice(slots.start * self._width, slots.stop * self._width)
        batch_inplace_copy([self._ids[slots], *(head[numbers] for head in self._rows)], [ids, *rows])
        self._sent = ids, rows  # the copies go on when this returns

    def inputs(self, depth: int) -> tuple[Buffer, Buffer]:
        """What `mtp.DraftHead` takes: rows `[size, hidden_size]` of the head of `depth`, and their ids `[size]`."""
        return self._rows[depth].view(self._dtype, (len(self.vocabulary.ids), self._width)), self._ids


def _bits(head: Buffer) -> npt.NDArray[Any]:
    """The head as numpy sees it, without a copy; bfloat16 as its bits."""
    return np.asarray((head.view(DType.uint16, head.shape) if head.dtype == DType.bfloat16 else head).to_numpy())
