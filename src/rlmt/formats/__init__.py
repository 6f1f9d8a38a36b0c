"""Thinking formats: rendering of prompts, and writing and splitting of thought and response."""

from rlmt.formats.thinking import FormatName, ThinkingFormat

__all__ = ["FormatName", "ThinkingFormat"]
