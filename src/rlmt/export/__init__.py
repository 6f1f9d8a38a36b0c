"""Exports checkpoints to Hugging Face folders (`rlmt export`)."""

from rlmt.export.checkpoints import export

__all__ = ["export"]
