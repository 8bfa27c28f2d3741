"""A small byte-level BPE tokenizer built from nothing, with the released tokenizer's control tokens.

Ids: 0 to 2 are `CONTROL_TOKENS`, then come the 256 bytes, as many merges of ASCII letters as fit, and from
`first_role_token_id` on the tokens of `RoleToken`. Every id up to the last role token therefore decodes to text. With
`first_role_token_id=128006` the ids in `eos_token_id` are those of the public checkpoint.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from enum import StrEnum
from importlib import resources

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

BOS_ID, EOS_ID, PAD_ID = 0, 1, 2
CONTROL_TOKENS = ("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|pad|>")
"""The tokens of ids `BOS_ID`, `EOS_ID`, `PAD_ID`."""

_SPACE = "Ġ"
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"


class RoleToken(StrEnum):
    """Tokens of the chat format, in id order."""

    IM_START = "<|im_start|>"
    IM_END = "<|im_end|>"
    THINK = "<think>"
    THINK_END = "</think>"
    TOOL_CALL = "<tool_call>"
    TOOL_CALL_END = "</tool_call>"
    TOOL_RESPONSE = "<tool_response>"
    TOOL_RESPONSE_END = "</tool_response>"


# Skipped when special tokens are skipped. The others must reach the text, where parsers look for them.
_HIDDEN_ROLE_TOKENS = frozenset({RoleToken.IM_START, RoleToken.IM_END})


def role_token_id(token: RoleToken, first_role_token_id: int) -> int:
    """The id of `token` in the tokenizer built with `first_role_token_id`."""
    return first_role_token_id + list(RoleToken).index(token)


def build_tokenizer(first_role_token_id: int) -> Tokenizer:
    """The tokenizer, with `first_role_token_id + len(RoleToken)` tokens.

    Raises:
        ValueError: `first_role_token_id` leaves no room for the bytes, or lies beyond the last merge.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    base = [*CONTROL_TOKENS, *alphabet]
    merges = list(itertools.islice(_merges(), max(0, first_role_token_id - len(base))))
    tokens = [*base, *(left + right for left, right in merges), *RoleToken]
    if len(tokens) != first_role_token_id + len(RoleToken):
        raise ValueError(
            f"first_role_token_id is {first_role_token_id}, but the tokens before it number "
            f"{len(tokens) - len(RoleToken)}: choose a value from {len(base)} to that"
        )
    vocabulary = {str(token): index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in CONTROL_TOKENS])
    tokenizer.add_tokens(
        [AddedToken(token.value, special=token in _HIDDEN_ROLE_TOKENS, normalized=False) for token in RoleToken]
    )
    return tokenizer


def tokenizer_files(first_role_token_id: int, model_max_length: int) -> dict[str, str]:
    """Contents by file name of everything `AutoTokenizer` reads; no remote code is involved."""
    chat_template = resources.files(__package__).joinpath("chat_template.jinja").read_text(encoding="utf-8")
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": CONTROL_TOKENS[BOS_ID],
        "eos_token": RoleToken.IM_END.value,
        "pad_token": CONTROL_TOKENS[PAD_ID],
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    return {
        "tokenizer.json": build_tokenizer(first_role_token_id).to_str(),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2) + "\n",
        "chat_template.jinja": chat_template,
    }


def _merges() -> Iterator[tuple[str, str]]:
    """Letter strings of two, three, then four symbols, likelier letters first; every product is a new token.

    A string may open with the byte-level space, since a word carries the space before it.
    """
    rank = {letter: index for index, letter in enumerate(_LETTERS)} | {_SPACE: 0}

    def by_likelihood(pairs: Iterator[tuple[str, str]]) -> list[tuple[str, str]]:
        return sorted(pairs, key=lambda pair: sum(rank[symbol] for symbol in pair[0] + pair[1]))

    pairs = by_likelihood(itertools.product([_SPACE, *_LETTERS], _LETTERS))
    bigrams = [left + right for left, right in pairs]
    yield from pairs
    yield from by_likelihood(itertools.product(bigrams, _LETTERS))
    yield from by_likelihood(itertools.product(bigrams, [text for text in bigrams if text[0] != _SPACE]))
