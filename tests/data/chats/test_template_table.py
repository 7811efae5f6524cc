"""The table of docs/data.md is what the code does, cell for cell."""

import pytest

from support.chat_templates import TEMPLATES
from support.paths import ROOT
from support.template_table import CASES, rows, verdict

PAGE = ROOT / "docs" / "data.md"


def shown_rows():
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| template | {' | '.join(CASES)} |")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]


SHOWN = {row[0]: row[1:] for row in shown_rows() if len(row) == 1 + len(CASES)}


def test_the_page_has_a_row_for_every_template():
    assert list(SHOWN) == list(TEMPLATES) and len(TEMPLATES) == 30


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_row_of_the_page(name):
    found = [verdict(TEMPLATES[name], record) for record in CASES.values()]
    assert found == SHOWN[name], (
        "rewrite docs/data.md: PYTHONPATH=tests python -m support.template_table --write"
    )


def test_rows_are_as_the_page_has_them():
    assert [line for line in rows() if line in PAGE.read_text(encoding="utf-8")] == rows()
