"""IFBench: verifiable instructions that are not IFEval's (https://arxiv.org/abs/2507.02833)."""

from __future__ import annotations

from typing import Any

from rlmt.evaluation.benchmarks.ifeval import PUNKT, IFEval


class IFBench(IFEval):
    """100 if the response follows every instruction of the prompt.

    `ours` is the prompt-level loose accuracy that the benchmark's paper reports: an instruction is followed if one of
    eight variants of the response follows it (without its first line, its last line, or both; without asterisks).
    `authors` is the prompt-level strict accuracy.
    """

    name = "ifbench"
    title = "IFBench"
    source = "allenai/IFBench_test"
    registry = "if_verifiable.ifbench.instructions_registry"
    nltk_data = {
        "ratio:stop_words": ["corpora/stopwords"],
        "words:start_verb": [PUNKT, "taggers/averaged_perceptron_tagger_eng"],
        "words:keywords_specific_position": [PUNKT],
        "words:words_position": [PUNKT],
        "format:title_case": [PUNKT],
    }

    def follows(self, checker: Any, response: str) -> bool:
        """See `IFEval.follows`."""
        variants = [response] if self.scoring == "authors" else _variants(response)
        try:
            return any(text.strip() and checker.check_following(text) for text in variants)
        except IndexError:  # a text of punctuation alone, which a checker of quotes cannot index
            return False


def _variants(response: str) -> list[str]:
    """The response, and what is left without its first line, its last line and its asterisks."""
    lines = response.split("\n")
    texts = [response, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*texts, *(text.replace("*", "") for text in texts)]
