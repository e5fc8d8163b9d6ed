"""Digests at every door: whatever stored file is damaged, the door that reads it names it before it is used."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dllm import disk_faults
from dllm.cli import verify as verb
from dllm.config.load import load_params
from dllm.config.params import Params
from dllm.digests import check_files, file_digest, sealed, unsealed
from dllm.engines.engine import Response
from dllm.errors import DataError, DllmError, ModelError, StageError
from dllm.methods.dflash.features import check_part
from dllm.models import builtin, checkpoints
from dllm.regeneration.journal import ResponseJournal, count_damaged
from dllm.regeneration.store import ShardStore
from dllm.responses.counts import ManifestCounts
from dllm.stages import evaluate, prepare, regenerate, register, train
from dllm.stages.records import read_records
from dllm.training.checkpoints import Checkpoints
from tests.stages.test_train import RECIPE

FLIPS = 3
"""Damages tried on each file."""


@contextmanager
def damaged(path: Path, seed: int) -> Iterator[None]:
    """Flip 1 to 50 random bits of a file, in place, and restore it."""
    before = path.read_bytes()
    draw = random.Random(f"{path.name} {seed}")
    after = bytearray(before)
    for _ in range(draw.choice((1, 1, 3, 50)) if before else 0):
        after[draw.randrange(len(after))] ^= 1 << draw.randrange(8)
    path.write_bytes(bytes(after) if bytes(after) != before else before + b"\0")
    try:
        yield
    finally:
        path.write_bytes(before)


def refused(door: Callable[[], Any], name: str) -> bool:
    """Tell whether a door refuses, in one line that holds a name."""
    try:
        door()
    except DllmError as error:
        return name in str(error) and len(str(error)) < 500
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {error}")
        return False
    return False


class Project:
    """A project whose stages have all run once, and a copy of its checkpoints of training."""

    def __init__(self, root: Path) -> None:
        self.root = root
        raw = json.loads(json.dumps(RECIPE))
        raw["prepare"]["sources"] = [{"name": "gsm8k", "limit": 12}]
        raw["evaluate"] |= {"num_prompts": 2, "max_new_tokens": 8}
        raw["train"] |= {"epochs": 1}
        (root / "params.yaml").write_text(yaml.safe_dump(raw))
        self.params: Params = load_params(root / "params.yaml")
        for stage in (prepare, regenerate, train, evaluate, register):
            stage.run(self.params, root)

    def run(self, stage: Any) -> Callable[[], Any]:
        return lambda: stage.run(self.params, self.root)

    def files(self, pattern: str) -> list[Path]:
        found = [path for path in sorted(self.root.glob(pattern)) if path.is_file()]
        assert found, pattern
        return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, mlflow_store: str) -> Iterator[Project]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
        patch.setenv("DLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield Project(tmp_path_factory.mktemp("project"))


def doors(project: Project) -> Iterator[tuple[Path, Callable[[], Any]]]:
    """Yield every kind of stored file with each door that reads it."""
    root = project.root
    for path in project.files("out/prepare/prompts.parquet"):
        yield path, project.run(regenerate)
        yield path, project.run(evaluate)
    for path in project.files("out/regenerate/*"):
        if path.name == "headline.json":  # no stage reads it
            yield path, lambda: verb.verify(root)
        elif path.name != "metrics.json":
            yield path, project.run(train)
    for path in (*project.files("out/train/checkpoint/*"), *project.files("out/train/run.json")):
        yield path, project.run(evaluate)
        yield path, project.run(register)
        yield path, lambda: checkpoints.find("out/train", root)
    for path in project.files("out/train/evaluation/*"):
        yield path, project.run(evaluate) if path.name != "files.json" else lambda: verb.verify(root)
    for path in project.files("out/evaluate/*"):
        is_read = path.name in ("run.json", "metrics.json")
        yield path, project.run(register) if is_read else lambda: verb.verify(root)
    for path in project.files("work/train/*/checkpoints/step-*/*"):
        step = path.parent
        yield path, lambda step=step: Checkpoints(step.parent, 2).load(step)  # type: ignore[misc]
        if step.name == (step.parent / "latest").read_text().strip():
            yield path, project.run(train)
    for path in project.files("work/features/*/part-*"):
        yield path, lambda path=path: check_part(path)  # type: ignore[misc]
    for place in (builtin.cache_root() / "models").iterdir():
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            yield path, lambda place=place: builtin.check(place)  # type: ignore[misc]
    for path in project.files("registered/*/*"):
        kept = path.parent
        yield path, lambda kept=kept: checkpoints.resolve(kept, root)  # type: ignore[misc]


@pytest.mark.outage
def test_no_damaged_file_is_used(project: Project) -> None:
    tried, used = 0, []
    for path, door in doors(project):
        for seed in range(FLIPS):
            with damaged(path, seed):
                tried += 1
                if not refused(door, path.name):
                    used.append((path, str(seed)))
                if seed == 0 and not refused(lambda: verb.verify(project.root), path.name):
                    used.append((path, "verify"))
    assert not used, f"{len(used)} of {tried} used: {used[:40]}"
    assert tried > 100
    verb.verify(project.root)


@pytest.mark.outage
def test_features_that_were_damaged_are_named_before_a_step(project: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project.root, root)
    shutil.rmtree(root / "work" / "train")
    part = next(iter((root / "work" / "features").glob("*/part-*")))
    with damaged(part, 0), pytest.raises(DataError, match=part.name):
        train.run(project.params, root)


@pytest.mark.outage
@pytest.mark.parametrize("kind", ["directory", "link to itself"])
def test_what_stands_in_place_of_a_record_does_not_pass_for_none(project: Project, kind: str) -> None:
    record = project.root / "out" / "prepare" / "run.json"
    before = record.read_bytes()
    record.unlink()
    record.mkdir() if kind == "directory" else record.symlink_to(record.name)
    try:
        assert refused(project.run(regenerate), "run.json")
        assert refused(lambda: read_records(project.root, "run.json"), "run.json")
    finally:
        record.rmdir() if kind == "directory" else record.unlink()
        record.write_bytes(before)


def test_another_runs_checkpoint_is_not_registered(project: Project, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(project.root, root)
    weights = root / "out/train/checkpoint/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(weights).items()}, weights)
    for stage in (evaluate, register):
        with pytest.raises(ModelError, match=r"damaged or of another origin.*model\.safetensors"):
            stage.run(project.params, root)
    (root / "out/train/checkpoint/extra.json").write_text("{}")
    shutil.copy(project.root / "out/train/checkpoint/model.safetensors", weights)
    with pytest.raises(ModelError, match=r"did not write.*extra\.json"):
        evaluate.run(project.params, root)


@pytest.mark.outage
def test_registered_bytes_are_their_own(project: Project) -> None:
    for path in project.files("registered/*/*"):
        assert path.stat().st_nlink == 1


def test_a_sealed_record_vouches_for_every_byte() -> None:
    record = {"files": {"a": "0" * 64}, "text": 'a "seal": "x" é\u2028', "float": 0.1, "none": None, "list": [1, {}]}
    data = sealed(record)
    assert unsealed(data) == record
    draw, used = random.Random(0), []
    for _ in range(2000):
        other = bytearray(data)
        other[draw.randrange(len(other))] ^= 1 << draw.randrange(8)
        try:
            if unsealed(bytes(other)) == record:
                used.append(bytes(other))
        except ValueError:
            continue
        # One whose key is no longer `seal` reads as a record of an older version, with a key that nobody knows.
        assert b'"seal"' not in other
    assert not used


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x"])
def test_a_record_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="outside its folder"):
        check_files(tmp_path, {name: "0" * 64}, error=DataError, hint="")


def test_no_damaged_line_of_a_journal_is_used(tmp_path: Path) -> None:
    whole = tmp_path / "journal-00000.jsonl"
    given = {f"k{n}": Response(f"k{n}", tuple(range(n + 1)), f"text {n}", "stop") for n in range(20)}
    with ResponseJournal(whole) as journal:
        for response in given.values():
            journal.append(response)
    assert count_damaged(whole) == 0
    for seed in range(200):
        with damaged(whole, seed):
            copy = tmp_path / "copy.jsonl"
            shutil.copy(whole, copy)
            with ResponseJournal(copy) as journal:
                read = {key: journal.read(key) for key in given if key in journal}
            assert read.items() <= given.items() and len(read) < len(given)


def test_a_finished_shard_with_a_damaged_record_is_made_again(tmp_path: Path) -> None:
    record = {
        "entry": {"file": "shard-00000.parquet", "sha256": "", "rows": 0, "counts": ManifestCounts().to_json()},
        "rollouts": 1,
        "turns": 1,
        "origins": "o",
    }
    (tmp_path / "shard-00000.parquet").write_bytes(b"rows")
    record["entry"]["sha256"] = file_digest(tmp_path / "shard-00000.parquet")  # type: ignore[index]
    path = tmp_path / "shard-00000.json"
    path.write_bytes(sealed({**record, "rejected": []}))
    assert ShardStore(tmp_path).finished == {0}
    for seed in range(50):
        with damaged(path, seed):
            data = path.read_bytes()
            assert ShardStore(tmp_path).finished == set(), data


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(28, "No space left on device", "copied", None, "here"),
        OSError(122, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("Disk quota exceeded (os error 122)"),
        RuntimeError("[enforce fail] write failed: No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_whoever_met_it(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(StageError, match="disk is full") as raised, disk_faults.full_disk_in_one_line(tmp_path):
        raise error
    assert raised.value.exit_code == 5
    assert raised.value.where == (getattr(error, "filename2", None) or str(tmp_path)), "where there is no room"
