"""Generated demo data: `tiny` (small random models) and `mini` (a task on which thinking improves the reward)."""
