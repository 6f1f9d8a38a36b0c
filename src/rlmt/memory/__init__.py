"""Memory of a run, estimated from model configs before any weights are loaded (`rlmt plan`)."""
