"""The name that `--reasoning-parser` and `--tool-parser` know the parsers by; vLLM and SGLang use it as well."""

PARSER_NAME = "step3p5"
