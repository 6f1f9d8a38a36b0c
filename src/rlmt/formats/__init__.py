"""Thinking formats: how prompts are rendered, and how thought and response are written and split."""

from rlmt.formats.thinking import FormatName, ThinkingFormat

__all__ = ["FormatName", "ThinkingFormat"]
