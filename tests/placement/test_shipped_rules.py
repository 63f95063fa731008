"""Rule files that come with the package."""

from __future__ import annotations

from importlib import resources

import pytest

from hybrid.errors import PlacementError
from hybrid.placement.rules import load_rules

SHIPPED = sorted(
    entry.name.removesuffix(".yaml")
    for entry in resources.files("hybrid.rules").iterdir()
    if entry.name.endswith(".yaml")
)


def test_the_package_ships_rules():
    assert {"all-cpu", "default"} <= set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_rules_load_by_name(name):
    rules = load_rules(name)
    assert rules.rules
    assert rules.source == f"{name}.yaml"


def test_unknown_name_lists_the_shipped_ones():
    with pytest.raises(PlacementError, match="did you mean 'all-cpu'"):
        load_rules("all-cpus")


def test_a_file_of_that_name_wins(tmp_path, monkeypatch):
    (tmp_path / "all-cpu").write_text("version: 2\nrules: []\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PlacementError, match=r"all-cpu:1:10: version: expected 1, found the number 2"):
        load_rules("all-cpu")
