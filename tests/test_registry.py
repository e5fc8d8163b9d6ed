"""Seams: members are imported when asked for, strangers come by entry points, and a wrong name is one line."""

import sys

import pytest

from dllm.errors import ConfigError
from dllm.registry import Registry


def test_a_member_is_imported_when_it_is_asked_for_and_not_before() -> None:
    seam: Registry = Registry("toys", {"wave": "wave:open", "gone": "no_such_module:thing"})
    assert list(seam) == ["wave", "gone"] and "wave" in seam and "weave" not in seam
    import wave

    assert seam["wave"] is wave.open and seam["wave"] is seam["wave"]
    with pytest.raises(ModuleNotFoundError):
        seam["gone"]


def test_a_package_outside_adds_a_member_by_an_entry_point(tmp_path, monkeypatch) -> None:
    (tmp_path / "toy_outside.py").write_text("MEMBER = 7\n")
    info = tmp_path / "toy_outside-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-outside\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dllm.toys]\nseven = toy_outside:MEMBER\nwave = toy_outside:MEMBER\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    seam: Registry = Registry("toys", {"wave": "wave:open"})
    assert list(seam) == ["wave", "seven"] and seam["seven"] == 7
    import wave

    assert seam["wave"] is wave.open, "ours is not replaced"


def test_a_wrong_name_is_one_line_with_the_nearest_one() -> None:
    seam: Registry = Registry("toys", {"wave": "wave:open", "sunau": "sunau:open"})
    with pytest.raises(ConfigError, match=r"no such name among the toys: 'wabe'.*did you mean wave\?"):
        seam["wabe"]
    with pytest.raises(ConfigError, match="there are wave, sunau"):
        seam["qqqqqqq"]
    assert seam.check("wave") == "wave"
    with pytest.raises(ValueError, match=r"expected one of wave, sunau; did you mean wave\?"):
        seam.check("wav")
