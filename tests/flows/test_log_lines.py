"""What a flow run's log has of a stage's output: every line, but of progress one every few seconds and the last."""

import logging

import pytest

from flows import children
from flows.artifacts import ProgressBar


def test_only_progress_is_thinned_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(children, "get_run_logger", lambda: logging.getLogger("flow run"))
    monkeypatch.setattr(ProgressBar, "show", lambda bar, line: None)  # requests to a server
    monkeypatch.setattr(children, "outlive_readers", lambda: None)
    relay = children._Relay("train", waits=False)
    progress = [f"train: {step}/90 steps ({step / 90:.0%})  45.2 steps/s  1s left  loss 7.038" for step in range(1, 91)]
    kept = [
        "train: 35 rows, 8 held out",
        "warning: MLflow log_batch failed, the stage goes on without it: 3/4 rows at 12 rows/s (http://x)",
        "UserWarning: 5 % of the rows are empty",
        "regenerate: 48 rows, 768 tokens (48 length)",
        "evaluate: tau 1.93, speedup 1.2",
    ]
    with caplog.at_level(logging.INFO, "flow run"):
        for line in [*kept, *progress, *kept, "\rDownloading:  12%|█  | 3/24", "same ids: 17  12.3 rows/s"]:
            relay(line)
    assert [record.message for record in caplog.records] == [*kept, progress[0], progress[-1], *kept]
    warned = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [*kept[1:3], *kept[1:3]]


@pytest.mark.parametrize(("waits", "expected"), [(True, logging.INFO), (False, logging.ERROR)])
def test_what_a_checkout_waits_for_is_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, waits: bool, expected: int
) -> None:
    monkeypatch.setattr(children, "get_run_logger", lambda: logging.getLogger("flow run"))
    monkeypatch.setattr(ProgressBar, "show", lambda bar, line: None)
    relay = children._Relay("train", waits=waits)
    with caplog.at_level(logging.INFO, "flow run"):
        relay("dllm: another process works on this (pid 7) (work/train/f6); wait for it, or stop it")
        relay("ERROR: failed to reproduce 'train': failed to run: python -m dllm train, exited with 5")
    assert {record.levelno for record in caplog.records} == {expected}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("dllm: train.lr_peek: unknown key (params.yaml)", logging.ERROR),
        ("dllm rank 1: out of memory", logging.ERROR),
        ("ERROR: failed to reproduce 'train'", logging.ERROR),
        ("Traceback (most recent call last):", logging.ERROR),
        ("torch.OutOfMemoryError: CUDA out of memory", logging.ERROR),
        ("WARNING: stage is frozen", logging.WARNING),
        ("/x/y.py:3: FutureWarning: use z", logging.WARNING),
        ("train: 35 rows, 8 held out", logging.INFO),
        ("evaluate: no errors", logging.INFO),
    ],
)
def test_levels(line: str, expected: int) -> None:
    assert children.level(line) == expected
