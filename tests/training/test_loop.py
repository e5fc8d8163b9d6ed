"""The loop: pooling, exact resume, the journal, the choice of the best."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dllm.errors import DataError, StageError
from dllm.process.signals import Interrupt
from dllm.tracking.run_journal import RunJournal
from dllm.tracking.runs import NullTracker
from dllm.training.distributed import Ranks
from dllm.training.journal import MetricsLog, read
from dllm.training.loop import Loop
from dllm.training.strategy import LossSums, Rows
from tests.training.toy import ToyStrategy, settings

ALONE = Ranks(0, 1, torch.device("cpu"))
CLOCKED = {"time", "mem", "tokens_per_s", "points_per_s", "mfu"}


class Listener(NullTracker):
    """Keeps what it is told in a run's journal, as the real tracker does, and sends nothing."""

    def __init__(self, folder: Path, run_id: str = "run-1") -> None:
        self.run_id = run_id
        self.journal = RunJournal(folder / f"{run_id}.jsonl")

    def log_metrics(self, metrics, step=0) -> None:
        self.journal.add(metrics=dict(metrics), step=step)

    @property
    def heard(self) -> list[tuple[int, tuple[str, ...]]]:
        return [(record["step"], tuple(sorted(record["metrics"]))) for record in self.journal.pending]


def make(work: Path, strategy: ToyStrategy | None = None, tracker: NullTracker | None = None, **changes) -> Loop:
    return Loop(strategy or ToyStrategy(), settings(**changes), ALONE, work=work, tracker=tracker or NullTracker())


def journal(work: Path) -> list[dict]:
    records = [json.loads(line) for line in (work / "training.jsonl").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCKED} for record in records]


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_the_gradient_is_that_of_the_pooled_loss_however_the_batch_is_split(tmp_path, batch_size, accumulation) -> None:
    loop = make(tmp_path, batch_size=batch_size, grad_accumulation=accumulation)
    sums, _ = loop._gradient(Interrupt())
    whole = ToyStrategy()
    terms = whole.terms("train", loop.order.step_rows(0), 0)
    (terms.numerator / terms.denominator).backward()
    assert len(loop.order.step_rows(0)) == 4
    assert sums.read()["numerator"][0] == pytest.approx(terms.numerator.item(), rel=1e-6)
    for ours, direct in zip(loop.strategy.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, direct.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_killed_run_goes_on_bitwise(tmp_path, monkeypatch, optimizer) -> None:
    changes = {"optimizer": {"name": optimizer}, "log_every": 3}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    outcome = make(straight, **changes).run()
    heard = Listener(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        make(killed, ToyStrategy(woe="term@10"), heard, **changes).run()
    assert stopped.value.code == 143
    assert (killed / "checkpoints/latest").read_text() == "step-000010\n"
    again = make(killed, tracker=heard, **changes).run()
    assert (again.step, again.tokens, again.validation) == (outcome.step, outcome.tokens, outcome.validation)
    last = f"checkpoints/step-{outcome.steps:06d}"
    for name in ("model.safetensors", "optimizer.safetensors"):
        assert (killed / last / name).read_bytes() == (straight / last / name).read_bytes()
    assert journal(killed) == journal(straight)
    assert len(heard.heard) == len(set(heard.heard)) == len(journal(straight))


def test_a_crash_between_checkpoints_repeats_steps_but_no_record(tmp_path) -> None:
    straight, crashed, heard = tmp_path / "straight", tmp_path / "crashed", Listener(tmp_path)
    make(straight).run()
    with pytest.raises(ZeroDivisionError):
        make(crashed, ToyStrategy(woe="bug@7"), heard).run()
    assert journal(crashed)[-1]["step"] == 6  # two steps past the checkpoint at 4
    with (crashed / "training.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line cut short
    make(crashed, tracker=heard).run()
    assert journal(crashed) == journal(straight)
    assert len(heard.heard) == len(set(heard.heard)) == len(journal(straight))


def test_a_run_begun_with_other_metrics_is_refused_by_its_place(tmp_path) -> None:
    with pytest.raises(SystemExit):
        make(tmp_path, ToyStrategy(woe="term@10")).run()
    newer = ToyStrategy()
    newer.counts = {**newer.counts, "another": 1}
    with pytest.raises(StageError, match=r"other metrics .*step-000010.*start anew"):
        make(tmp_path, newer).run()


def test_odd_lines_of_the_log_are_left_out(tmp_path) -> None:
    path = tmp_path / "training.jsonl"
    right = b'{"step": 1, "kind": "train", "epoch": 0.5, "time": "t", "loss": 2.0, "lr": null}'
    odd = [b"\xff\xfe", b'{"step": "x", "kind": "train"}', b'{"step": [1], "kind": "train"}', b"[" * 100_000]
    odd += [b'{"step": 2, "kind": "train", "loss": "abc"}', b'{"step": 2, "kind": "train", "loss": [1]}', b'{"step": 1']
    path.write_bytes(b"\n".join([*odd[:3], right, *odd[3:]]))
    assert [record["loss"] for record in read(path)] == [2.0]
    MetricsLog(path, NullTracker()).rewind(9)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [json.loads(right)]


def test_a_new_tracked_run_hears_the_whole_story(tmp_path) -> None:
    make(tmp_path, tracker=Listener(tmp_path)).run()
    later = Listener(tmp_path, "run-2")
    make(tmp_path, tracker=later).run()
    assert [step for step, _ in later.heard] == [record["step"] for record in journal(tmp_path)]


def test_records_hold_every_figure_and_the_last_step_validates(tmp_path) -> None:
    work = tmp_path
    loop = Loop(ToyStrategy(), settings(), ALONE, work=work, tracker=NullTracker(), mfu_dtype=torch.float32)
    outcome = loop.run()
    records = [json.loads(line) for line in (work / "training.jsonl").read_text().splitlines()]
    train = [r for r in records if r["kind"] == "train"]
    figures = {"loss", "grad_norm", "lr", "mem", "tokens_per_s", "points_per_s", "mfu", "hit_rate"}
    assert all(figures <= r.keys() and all(r[f] is not None for f in figures) for r in train)
    assert 0 < train[0]["mfu"] < 1
    assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 8, 12, 16, 20, 24]
    assert outcome.steps == 24
    assert train[-1]["loss"] < train[0]["loss"]


def test_the_best_validation_is_published_not_the_last(tmp_path) -> None:
    class Souring(ToyStrategy):
        looks = 0

        def score(self, validation):
            self.looks += 1
            return (1.0 if self.looks == 2 else 0.0, -validation["val_loss"])

    outcome = make(tmp_path, Souring(), keep_checkpoints=1).run()
    assert (outcome.step, outcome.checkpoint.name) == (8, "step-000008")
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["best", "latest", "step-000008", "step-000024"]
    assert load_file(outcome.checkpoint / "model.safetensors").keys() == ToyStrategy().model.state_dict().keys()


def test_validation_without_heldout_rows_takes_the_newest(tmp_path) -> None:
    outcome = make(tmp_path, ToyStrategy(heldout=0)).run()
    assert (outcome.step, outcome.validation) == (24, {})


def test_a_gradient_that_is_not_finite_stops_in_one_line(tmp_path) -> None:
    class Broken(ToyStrategy):
        def terms(self, split, rows, epoch) -> LossSums:
            terms = super().terms(split, rows, epoch)
            return LossSums(terms.numerator * float("nan"), terms.denominator, counts=terms.counts)

    with pytest.raises(StageError, match="not finite at step 1"):
        make(tmp_path, Broken()).run()


def test_nothing_to_train_on_is_refused(tmp_path) -> None:
    empty = ToyStrategy()
    empty.train_rows = Rows([], [])
    with pytest.raises(DataError, match="no rows"):
        make(tmp_path, empty)


def test_a_step_without_supervision_is_refused(tmp_path) -> None:
    class Blank(ToyStrategy):
        def terms(self, split, rows, epoch) -> LossSums:
            return LossSums(torch.zeros(()), 0.0)

    with pytest.raises(DataError, match="no supervised token"):
        make(tmp_path, Blank()).run()
