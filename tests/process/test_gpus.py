"""Which GPUs a stage sees."""

from pathlib import Path

import pytest

from dllm.process import gpus

LISTED = (
    "GPU 0: NVIDIA H200 (UUID: GPU-aa11)\nGPU 1: NVIDIA H200 (UUID: GPU-bb22)\nGPU 10: NVIDIA H200 (UUID: GPU-cc33)\n"
)


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [(None, [0, 1, 10]), ("1", [1]), ("10, 0", [0, 10]), ("GPU-bb", [1]), ("", []), ("-1", [])],
)
def test_visible_gpus(chosen: str | None, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "list").write_text(LISTED)
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f'#!/bin/sh\nwhile read -r line; do echo "$line"; done <{tmp_path}/list\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert list(gpus.visible_gpus()) == expected and gpus.has_gpu()


def test_no_driver_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible_gpus() == {} and not gpus.has_gpu()
