"""Demonstrations from a teacher: `rlmt distill`."""
