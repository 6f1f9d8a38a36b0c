"""The table of chat templates in the reference."""

import re

from rlmt.errors import UserError
from rlmt.formats import ThinkingFormat
from rlmt.formats.resolve import resolve_format

from ..chat_templates import SHAPES, Shape
from .pages import ROOT

PAGE = ROOT / "docs" / "reference" / "templates.md"
HEADER = ["| template | ends at | switch | `think` | `no_think` |", "|---|---|---|---|---|"]


def code(text: str) -> str:
    escaped = text.replace("\n", "\\n").replace("|", "\\|")
    return f"`{escaped}`"


def row(name: str, shape: Shape) -> str:
    """The row of one template, from the code."""
    tokenizer, stops, switches, prompts = shape.tokenizer(), [], set(), []
    for format_name in ("think", "no_think"):
        try:
            format = resolve_format(ThinkingFormat(format_name), tokenizer, "m")  # type: ignore[arg-type]
        except UserError as error:
            reason = str(error).removeprefix("m: ").partition(";")[0].replace("\n", "\\n").replace("|", "\\|")
            prompts.append(f"refused: {re.sub('<', '&lt;', reason)}")
            continue
        stops = tokenizer.convert_ids_to_tokens(list(format.stop_token_ids(tokenizer)))
        switches.update(format.chat_template_kwargs)
        rendered = tokenizer.decode(format.render([{"role": "user", "content": "Hi"}], tokenizer))
        prompts.append(code(rendered.rpartition("Hi")[2]))
    cells = [name, " ".join(map(code, stops)), " ".join(map(code, sorted(switches))), *prompts]
    return "| " + " | ".join(cells) + " |"


def test_table_of_templates_is_what_the_code_does() -> None:
    expected = "\n".join([*HEADER, *(row(name, shape) for name, shape in SHAPES.items())])
    assert expected in PAGE.read_text(encoding="utf-8"), f"replace the table of {PAGE.name} by:\n{expected}"
