"""Studies: many runs from one file, over several seeds, compared in one report. Start at `rlmt.study.command`."""
