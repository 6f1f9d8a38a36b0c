r"""Equality of short LaTeX answers as text, as the code of MATH defines it (https://arxiv.org/abs/2103.03874).

It is a definition: every step is the published one, with its oddities.
"""

from __future__ import annotations

_REPLACEMENTS = {
    "\n": "", "\\!": "", "\\\\": "\\", "tfrac": "frac", "dfrac": "frac", "\\left": "", "\\right": "", "^{\\circ}": "",
    "^\\circ": "", "\\$": "",
}  # fmt: skip


def equal_text(gold: str, answer: str) -> bool:
    r"""Whether two answers have one normal form.

    The normal form has \frac{a}{b} for \dfrac, a/b and 0.5, and no units, degrees, dollars, per cent or spaces. Where
    a step does not apply to one of the two, as to x/2 or to a text with two units, they are compared as they are.

    Args:
        gold: The right answer.
        answer: The content of a \boxed{}.
    """
    try:
        return _normalize(gold) == _normalize(answer)
    except (IndexError, ValueError):
        return gold == answer


def _normalize(text: str) -> str:
    for old, new in _REPLACEMENTS.items():
        text = text.replace(old, new)
    if "\\text{ " in text:  # a unit
        text, _ = text.split("\\text{ ")
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if not text:
        return text
    text = "0" + text if text[0] == "." else text
    if text.count("=") == 1 and text.index("=") <= 2:  # a name, as in x = 5
        text = text.partition("=")[2]
    head, *parts = text.split("\\sqrt")
    text = head + "".join(f"\\sqrt{part if part[0] == '{' else f'{{{part[0]}}}{part[1:]}'}" for part in parts)
    text = _with_braces(text.replace(" ", ""))
    text = "\\frac{1}{2}" if text == "0.5" else text
    if text.count("/") != 1:
        return text
    above, below = map(int, text.split("/"))
    return f"\\frac{{{above}}}{{{below}}}" if text == f"{above}/{below}" else text


def _with_braces(text: str) -> str:
    r"""\frac12 and \frac1{72} with braces around both parts; \frac{7}2 stays as it is."""
    head, *parts = text.split("\\frac")
    if any(part[0] != "{" and len(part) < 2 for part in parts):
        return text
    return head + "".join(f"\\frac{part if part[0] == '{' else _two_braces(part)}" for part in parts)


def _two_braces(part: str) -> str:
    above, below, rest = part[0], part[1], part[2:]
    return f"{{{above}}}" + (f"{{{rest}" if below == "{" else f"{{{below}}}{rest}")
