"""A few of the faults of `make faults`, and that its table speaks of what is there."""

import pytest
from faults.damage import DAMAGE
from faults.faulty import COMMANDS, DEEDS, PLACES, owner_of
from faults.scenario import prepare, run_fault
from faults.table import FAULTS
from faults.works import Bench

from support.paths import ROOT

QUICK = [fault for fault in FAULTS if fault.quick]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults").resolve())
    prepare(bench, QUICK)
    return bench


@pytest.mark.commands
@pytest.mark.parametrize("fault", QUICK, ids=lambda fault: fault.name)
def test_a_broken_run_goes_on_as_an_unbroken_one(bench, fault):
    assert run_fault(fault, bench).problems == []


def test_every_place_is_in_the_code():
    for function, _ in PLACES.values():
        owner, name = owner_of(function)
        assert callable(getattr(owner, name)), function


def test_every_fault_is_one_that_can_be_made_and_is_on_the_page():
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names)
    for fault in FAULTS:
        assert fault.command in COMMANDS
        assert not fault.deed or (fault.deed in DEEDS and fault.place in PLACES), fault.name
        assert not fault.damage or fault.damage in DAMAGE, fault.name
        said = fault.place if fault.name.startswith("kill -9 of") else fault.name
        assert f"| {said} |" in page, f"docs/reliability.md does not tell of {said!r}"
