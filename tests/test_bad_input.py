"""Bad input to real stages: one line, the right exit code, and what was published before stays as it was."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dllm import __main__ as command
from dllm.config import recipe_book
from dllm.config.load import load_params
from dllm.stages import DVC_STAGES
from dllm.stages.workspace import digest


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, empty_mlflow_store: Path) -> Path:
    """Run the tiny recipe up to its evaluation, once for all tests here."""
    from dllm.stages import prepare, regenerate, train

    root = tmp_path_factory.mktemp("finished")
    shutil.copyfile(empty_mlflow_store, root / "mlflow.db")
    recipe_book.activate("tiny-dflash", root / "params.yaml")
    params = load_params(root / "params.yaml", ["train.epochs=1"])
    for stage in (prepare, regenerate, train):
        stage.run(params, root)
    return root


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """Copy the finished project, to be broken."""
    return shutil.copytree(finished, tmp_path / "project")


@pytest.fixture(autouse=True)
def _process_settings_come_back() -> Iterator[None]:
    hook, handler = sys.excepthook, signal.getsignal(signal.SIGTERM)
    yield
    sys.excepthook = hook
    signal.signal(signal.SIGTERM, handler)


def _damage(name: str) -> Callable[[Path], None]:
    def break_it(root: Path) -> None:
        path = root / name
        whole = path.read_bytes()
        path.unlink()  # a hard link into work/: writing in place would damage both
        path.write_bytes(whole[: len(whole) // 2])

    return break_it


def _remove(name: str) -> Callable[[Path], None]:
    def break_it(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return break_it


def _write(name: str, text: str) -> Callable[[Path], None]:
    def break_it(root: Path) -> None:
        (root / name).write_text(text)

    return break_it


def _target_without_assistant_turns(root: Path) -> None:
    from dllm.models import builtin

    folder = shutil.copytree(builtin.directory("builtin:tiny"), root / "mute")
    for file in folder.glob("*.jinja"):
        file.unlink()
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "{{ messages[0].content }}"}))


def _nothing(root: Path) -> None:
    pass


JSONL = '{"messages": [{"role": "user", "content": "a"}]}\n{"messages": [\n'

CASES = {
    "a missing model": (_nothing, "regenerate", ["target.model=/nowhere/model"], 6, "/nowhere/model"),
    "an unknown built-in": (_nothing, "regenerate", ["target.model=builtin:tinny"], 6, "builtin:tiny"),
    "an unknown source": (_nothing, "prepare", ["prepare.sources=[{name: gsm9k}]"], 3, "did you mean gsm8k"),
    "a missing file of prompts": (_nothing, "prepare", ["prepare.sources=[{name: no/such.jsonl}]"], 3, "no/such.jsonl"),
    "a line that is no JSON": (
        _write("chats.jsonl", JSONL),
        "prepare",
        ["prepare.sources=[{name: chats.jsonl}]"],
        3,
        "chats.jsonl:2",
    ),
    "an unreadable shard": (_damage("out/regenerate/shard-00001.parquet"), "train", [], 3, "shard-00001.parquet"),
    "a missing manifest": (_remove("out/regenerate/manifest.json"), "train", [], 3, "manifest.json"),
    "a missing stage": (_remove("out/prepare"), "regenerate", [], 3, "python -m dllm prepare"),
    "a template without assistant turns": (
        _target_without_assistant_turns,
        "regenerate",
        ["target.model=ROOT/mute"],
        3,
        "template",
    ),
    "a mask id outside the vocabulary": (_nothing, "train", ["train.dflash.mask_token_id=99999999"], 2, "99999999"),
    "a block size of 1": (_nothing, "train", ["train.dflash.block_size=1"], 2, "nothing to predict"),
    "no supervised token": (_nothing, "train", ["train.max_length=2"], 3, "train"),
    "a missing draft to start from": (
        _nothing,
        "train",
        ["train.dflash.draft.init=/nowhere/draft"],
        6,
        "/nowhere/draft",
    ),
    "no training result to evaluate": (_remove("out/train"), "evaluate", [], 5, "out/train"),
    "a draft cut in half": (_damage("out/train/checkpoint/model.safetensors"), "evaluate", [], 6, "model.safetensors"),
    "an engine without an address": (_nothing, "regenerate", ["regenerate.engine=openai"], 2, "regenerate.servers"),
    "an engine out of reach": (
        _nothing,
        "regenerate",
        ["regenerate.engine=openai", "regenerate.servers=[http://127.0.0.1:9/v1]", "regenerate.max_retries=0"],
        4,
        "127.0.0.1:9",
    ),
}


@pytest.mark.parametrize("case", list(CASES))
def test_a_stage_refuses_in_one_line(
    case: str, project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    break_it, stage, settings, code, said = CASES[case]
    monkeypatch.delenv("DLLM_TARGET_URL", raising=False)
    break_it(project)
    before = _published(project)
    changes = [word for text in settings for word in ("--set", text.replace("ROOT", str(project)))]
    with pytest.raises(SystemExit) as left:
        command.main([stage, "--root", str(project), *changes])
    err = capfd.readouterr().err
    complaints = [line for line in err.splitlines() if line.startswith("dllm: ")]
    assert left.value.code == code, err
    assert len(complaints) == 1 and said in complaints[0], err
    assert "Traceback" not in err
    assert _published(project) == before
    assert not list((project / "out").glob(".*")), "nothing half-written stays"


def _published(root: Path) -> dict[str, str]:
    return {stage: digest(root / "out" / stage) for stage in DVC_STAGES if (root / "out" / stage).is_dir()}


def test_mlflow_out_of_reach_is_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(SystemExit) as left:
        command.main(["prepare", "--root", str(project)])
    err = capfd.readouterr().err
    assert left.value.code == 4, err
    assert "127.0.0.1:9" in err and "Traceback" not in err
    assert sum(line.startswith("dllm: ") for line in err.splitlines()) == 1


def test_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dllm", "recipe", "show", "tiny-dflash"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 5
    assert done.stderr.startswith("dllm: the disk is full") and done.stderr.count("\n") == 1
