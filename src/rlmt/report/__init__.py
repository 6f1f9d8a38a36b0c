"""Figures of a run. matplotlib takes a second to import, so callers import these modules only when they draw."""
