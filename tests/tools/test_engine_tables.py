"""tools/engine_tables.py: the table of the page is what the code says."""

from pathlib import Path

import engine_tables
import pytest

from support.paths import ROOT

PAGE = ROOT / "docs/draft_variants.md"


@pytest.fixture(scope="module")
def lines():
    return list(engine_tables.table())


def test_the_page_has_the_table_that_the_verdicts_give(lines):
    text = "\n".join(lines)
    assert text in PAGE.read_text(encoding="utf-8"), "run tools/engine_tables.py --page"


def test_each_variant_stands_in_some_layout_with_an_engine_that_loads_it(lines):
    for variant in engine_tables.VARIANTS:
        rows = [line for line in lines if line.startswith(f"| {variant} |")]
        assert any("| yes" in row for row in rows), variant


def test_the_table_goes_between_the_marks_of_a_page(tmp_path):
    page = Path(tmp_path / "page.md")
    page.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    engine_tables.main(["--page", str(page)])
    text = page.read_text()
    assert "old" not in text and text.startswith("before") and text.endswith("after\n")
    assert "| plain | hf |" in text
