"""Pictures of a run. matplotlib takes a second to import, so callers import these modules when they draw."""
