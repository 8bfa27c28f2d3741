"""Parsers of the model's text, registered with MAX under `PARSER_NAME`: thinking, and tool calls.

Importing the package registers both; `step3p5.arch` does so. MAX looks them up in the process of the API server.
"""

from .names import PARSER_NAME, TAGS
from .reasoning import Step3p5ReasoningParser, think_token_ids
from .tools import Step3p5ToolParser

__all__ = ["PARSER_NAME", "TAGS", "Step3p5ReasoningParser", "Step3p5ToolParser", "think_token_ids"]
