"""What starts a run by itself, and one that is started again: new responses train, a failed run is retried."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.flows.asking import (
    TINIER,
    ask,
    end,
    git,
    run_deployment,
    serving,
    shown,
    start,
    states,
    workers_said,
)
from tests.flows.conftest import Project, wait_until
from tests.patience import LONGEST_S

pytestmark = [pytest.mark.outage, pytest.mark.flows]

PROMPTS = 30
CHECKPOINT_EVERY = 50
AUTOMATION = "dllm: train on new responses"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, prefect_home: Path, free_port: int) -> Iterator[Project]:
    with serving(tmp_path_factory.mktemp("project"), prefect_home, free_port, {}) as project:
        yield project


def test_new_responses_start_a_training_on_them(project: Project) -> None:
    assert project.run("prefect", "automation", "resume", AUTOMATION).returncode == 0
    chats = [[{"role": "user", "content": f"What is {number} + 2?"}] for number in range(PROMPTS)]
    prompts = project.folder.with_name("chats.jsonl")
    prompts.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    responses = project.folder.with_name("new-responses")
    given = {"input_data": str(prompts), "output_dir": str(responses), "parts": 1}
    given["options"] = "--model builtin:tiny --temperature 0 --max-new-tokens 8"
    run = end(project, run_deployment(project, "regenerate-parts", "local", given))
    assert run["state"]["type"] == "COMPLETED", workers_said(project)

    def started() -> list[dict]:
        (trained,) = ask(project, "automations/filter", {"automations": {"name": {"any_": [AUTOMATION]}}})
        runs = ask(project, "flow_runs/filter", {})
        return [each for each in runs if (each["created_by"] or {}).get("id") == trained["id"]]

    before = git(project, "status", "--porcelain")
    wait_until(lambda: started(), LONGEST_S)
    (found,) = started()
    trained = end(project, found["id"])
    assert trained["state"]["type"] == "COMPLETED", shown(trained) + workers_said(project)
    assert trained["parameters"]["checkout"] == "HEAD"
    assert trained["parameters"]["overrides"]["prepare.sources"] == [{"name": str(responses)}]
    assert trained["name"].startswith("tiny-dflash: prepare.sources=new-responses, regenerate.engine=dataset")
    assert re.match(r"champion: .*τ 1\.\d+", trained["state"]["message"])
    assert git(project, "status", "--porcelain") == before, "the project's own files stay"


def test_a_retry_of_a_failed_run_goes_on_from_its_checkpoint(project: Project) -> None:
    long = {**TINIER, "train.epochs": 1500, "train.validate_every": CHECKPOINT_EVERY}
    run = start(project, "tiny", overrides=long)
    tree = project.folder / "work" / "checkouts" / run / "tree"
    known = set(project.folder.glob("work/train/*"))

    def trainers() -> list[psutil.Process]:
        return [each for each in psutil.process_iter() if is_training(each, tree)]

    def has_checkpoint() -> bool:
        new = set(project.folder.glob("work/train/*")) - known
        return any(any((work / "checkpoints").glob("[!.]*")) for work in new)

    wait_until(has_checkpoint, LONGEST_S)
    (trainer,) = trainers()
    trainer.kill()
    failed = end(project, run)
    assert failed["state"]["type"] == "FAILED" and "stage train failed" in failed["state"]["message"], shown(failed)

    # As the button in Prefect's pages does.
    ask(project, f"flow_runs/{run}/set_state", {"state": {"type": "SCHEDULED", "name": "AwaitingRetry"}})
    ended = end(project, run)
    assert ended["state"]["type"] == "COMPLETED", workers_said(project)
    assert ended["run_count"] == 2 and "AwaitingRetry" in states(project, run)
    (after,) = re.findall(
        r"train: resumes after step (\d+) of", (project.folder / "logs" / run / "train.log").read_text()
    )
    assert int(after) >= CHECKPOINT_EVERY
    for stage in ("prepare", "regenerate"):
        text = (project.folder / "logs" / run / f"{stage}.log").read_text()
        assert text.count(f"Running stage '{stage}'") <= 1, "what was done is taken as it is"


def is_training(process: psutil.Process, tree: Path) -> bool:
    """Tell whether a process is the stage `train` of a checkout."""
    try:
        return process.cmdline()[-3:] == ["-m", "dllm", "train"] and Path(process.cwd()) == tree
    except (psutil.Error, IndexError):
        return False
