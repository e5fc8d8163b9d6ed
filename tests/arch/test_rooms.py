"""Who may import whom: dependencies point down, orchestrators stay outside, MLflow has one door."""

import pytest

from tests.arch.source_tree import PACKAGE, imports, line, module_name, python_files, room

GROUND = {
    "outside",
    "secrets",
    "errors",
    "registry",
    "progress",
    "disk_faults",
    "files",
    "config",
    "process",
    "tracking",
    "digests",
}
RESULTS = {"publishing", "workspace"}
MODELS = {"prompts", "responses", "models", "training", "decoding"}
MAY_USE = {
    "dllm": set(),
    "outside": set(),
    "secrets": {"outside"},
    "errors": {"outside", "secrets"},
    "registry": {"errors"},
    "progress": {"process"},
    "disk_faults": {"errors"},
    "files": {"errors"},
    "process": {"errors", "secrets"},
    "config": {"errors", "secrets", "registry", "disk_faults", "files"},
    "tracking": {"errors", "outside", "secrets", "progress", "disk_faults", "files", "config", "process", "digests"},
    "publishing": {"errors", "secrets", "files", "digests"},
    "workspace": {"errors", "disk_faults", "files", "publishing", "process", "tracking", "digests"},
    "digests": {"errors", "outside", "disk_faults"},
    "prompts": GROUND,
    "responses": GROUND | {"prompts"},
    "models": GROUND | {"prompts", "responses"},
    "engines": GROUND | {"prompts", "responses", "models"},
    "regeneration": GROUND | RESULTS | {"prompts", "responses", "models", "engines"},
    "training": GROUND | {"prompts", "responses", "models"},
    "decoding": GROUND | {"prompts", "responses", "models", "training"},
    "methods": GROUND | MODELS,
    "lm_eval": GROUND | MODELS | {"methods"},
    "stages": GROUND | RESULTS | MODELS | {"engines", "regeneration", "methods"},
    "report": GROUND | RESULTS | MODELS | {"engines", "regeneration", "methods", "stages"},
    "cli": GROUND | RESULTS | MODELS | {"engines", "regeneration", "methods", "lm_eval", "stages", "report"},
    "__main__": {"outside", "errors", "secrets", "process", "cli", "disk_faults", "files"},
}
"""Each room of dllm/ and the rooms it may import: only ever further down, so that no cycle can form."""

NEVER_IN_DLLM = {"prefect", "dvc", "sglang"}
MLFLOW_DOOR = {"tracking"}
HEAVY = {"torch", "transformers", "datasets", "numpy", "pyarrow", "matplotlib", "pandas"}
FLOWS_MAY_USE = GROUND | {"stages"}


def test_the_map_has_no_cycle() -> None:
    done: set[str] = set()
    while left := set(MAY_USE) - done:
        free = {name for name in left if MAY_USE[name] - {name} <= done}
        assert free, f"rooms that import each other: {sorted(left)}"
        done |= free


@pytest.mark.parametrize("path", python_files("dllm"), ids=module_name)
def test_a_room_imports_only_rooms_below(path) -> None:
    here = room(module_name(path))
    assert here in MAY_USE, line(path, "a new room: say in MAY_USE what it may import")
    used = {room(name) for name in imports(path) if name.startswith("dllm.")} - {here, "__version__"}
    assert used <= MAY_USE[here], line(path, f"room {here} may not import {sorted(used - MAY_USE[here])}")


@pytest.mark.parametrize("path", python_files("dllm"), ids=module_name)
def test_dllm_knows_no_orchestrator_and_mlflow_has_one_door(path) -> None:
    tops = {name.split(".")[0] for name in imports(path)}
    assert not tops & NEVER_IN_DLLM, line(path, f"imports {sorted(tops & NEVER_IN_DLLM)}")
    if room(module_name(path)) not in MLFLOW_DOOR:
        assert "mlflow" not in tops, line(path, "imports mlflow; only dllm/tracking/ does")


@pytest.mark.parametrize("path", python_files("flows"), ids=module_name)
def test_flows_hold_no_domain_logic(path) -> None:
    names = imports(path)
    heavy = {name.split(".")[0] for name in names} & HEAVY
    assert not heavy, line(path, f"imports {sorted(heavy)}; a flow starts stages, it does not compute")
    used = {room(name) for name in names if name.startswith("dllm.")}
    assert used <= FLOWS_MAY_USE, line(path, f"may not import {sorted(used - FLOWS_MAY_USE)}")


def test_nobody_in_dllm_imports_flows_or_tests() -> None:
    wrong = [
        line(path, name)
        for path in python_files("dllm")
        for name in imports(path)
        if name.split(".")[0] in ("flows", "tests", "benchmarks")
    ]
    assert not wrong


def test_every_room_of_the_map_exists() -> None:
    gone = [name for name in MAY_USE if not (PACKAGE / name).is_dir() and not (PACKAGE / f"{name}.py").is_file()]
    assert [name for name in gone if name != "dllm"] == []
