"""`rlmt traits`: how two policies plan in their thoughts (RLMT, arXiv 2509.20357, section 4.2 and appendix C).

The only place where a judge sees thoughts. The paper publishes no prompts for this analysis; those here are rlmt's.
"""
