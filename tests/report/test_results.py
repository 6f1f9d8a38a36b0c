"""Sections from the reports of other commands: their texts, tables, figure and examples."""

from pathlib import Path

import pytest

from rlmt.cli import main
from rlmt.errors import UserError
from rlmt.report.results import read_sections

REPORT = """# Think against no_think

**The first** wins `57 %`.

![figure](traits.png)

| trait | think | no_think |
|---|---|---|
| plans | 0.61 | 0.20 |
| **lists** | 0.1 | 0.7 |

## Most won by think

### Row 3

judge: think wins

**Prompt**

```text
plan **lunch**
```

**think**

````text
``` <b>
````

## Most lost by think

### Row 1

judge: no_think wins
"""


def test_report_becomes_texts_tables_a_picture_and_examples(tmp_path: Path) -> None:
    (tmp_path / "traits.md").write_text(REPORT)
    (tmp_path / "traits.png").write_bytes(b"\x89PNG")
    (section,) = read_sections(tmp_path)
    assert section.title == "Think against no_think"
    assert section.texts == ["The first wins 57 %."]
    (table,) = section.tables
    assert table.columns == ["trait", "think", "no_think"]
    assert table.rows == [["plans", "0.61", "0.20"], ["lists", "0.1", "0.7"]]
    won, lost = section.examples
    assert won.title == "Most won by think: Row 3"
    assert won.parts == [("", "judge: think wins"), ("Prompt", "plan **lunch**"), ("think", "``` <b>")]
    assert (lost.title, lost.parts) == ("Most lost by think: Row 1", [("", "judge: no_think wins")])
    assert [picture.path for picture in section.pictures] == [tmp_path / "traits.png"]


def test_folder_without_a_report_is_an_error_before_the_page_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="has none of comparison.md, traits.md"):
        read_sections(tmp_path)
    (tmp_path / "metrics.csv").write_text("step,reward/mean\n0,1\n")
    assert main(["report", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert "--results" in capsys.readouterr().err and not (tmp_path / "report.html").exists()
    (tmp_path / "comparison.md").write_text(REPORT)
    assert main(["report", str(tmp_path), "--results", str(tmp_path)]) == 0
