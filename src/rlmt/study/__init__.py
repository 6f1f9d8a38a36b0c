"""Studies: many runs from one file, with seeds, compared in a report. `rlmt.study.command` is where to begin."""
