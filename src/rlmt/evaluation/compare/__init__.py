"""`rlmt compare`: which of two policies answers a set of prompts better."""
