"""rlmt: train language models that think before they chat (RLMT, arXiv 2509.20357).

Importing this package imports nothing heavy; `rlmt.types` is the place to start reading.
"""

__version__ = "0.2.0"
