"""What the parsers are called, and the tokens that they read."""

PARSER_NAME = "step3p5"
"""The name for `--reasoning-parser` and `--tool-parser`; vLLM and SGLang use it as well."""

TAGS = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})
"""Tokens of the format. They reach the parsers even where a tokenizer marks them as special."""
