"""Memory of a run, computed from model configs before any weights are loaded (`rlmt plan`)."""
