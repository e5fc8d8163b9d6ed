"""One name a stage: module, verb, params section, dvc.yaml stage and folder under out/ all agree."""

import ast

import yaml

from dllm.cli.app import app
from dllm.config.params import Params
from dllm.stages import STAGES
from dllm.stages.schema import SCHEMA
from tests.arch.source_tree import PACKAGE, ROOT, tree

SIDE_EFFECTS = {"register"}
"""Stages that change something outside out/, and so are no DVC stage."""


def _sections() -> set[str]:
    return {field.alias or name for name, field in Params.model_fields.items()} - {"recipe", "target"}


def _dvc_stages() -> dict:
    return yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]


def test_params_sections_are_the_stages() -> None:
    assert _sections() == set(STAGES)


def test_every_stage_is_a_module_with_a_run_function() -> None:
    for name in STAGES:
        functions = [n for n in tree(PACKAGE / "stages" / f"{name}.py").body if isinstance(n, ast.FunctionDef)]
        runs = [function for function in functions if function.name == "run"]
        assert len(runs) == 1, f"dllm/stages/{name}.py has no run()"
        assert [argument.arg for argument in runs[0].args.args][:2] == ["params", "root"]


def test_every_stage_is_a_verb() -> None:
    assert {command.name for command in app.registered_commands} >= set(STAGES)


def test_dvc_has_the_stages_in_order_each_with_its_own_verb_section_and_folder() -> None:
    stages = _dvc_stages()
    assert list(stages) == [name for name in STAGES if name not in SIDE_EFFECTS]
    for name, stage in stages.items():
        assert f"-m dllm {name}" in stage["cmd"]
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in stage["outs"]]
        assert [out.rstrip("/") for out in outs] == [f"out/{name}"]
        assert name in stage["params"] or any(str(p).startswith(f"{name}.") for p in stage["params"])
        assert any(str(p).split(".")[0] == "target" for p in stage["params"]) or name == "prepare"


def test_each_dvc_stage_reruns_when_its_schema_number_rises() -> None:
    for name, stage in _dvc_stages().items():
        watched = [
            key for entry in stage["params"] if isinstance(entry, dict) for keys in entry.values() for key in keys
        ]
        assert watched == [f"SCHEMA.{name}"]
    assert list(SCHEMA) == list(STAGES)


def test_each_dvc_stage_reruns_for_the_sections_that_it_opens_with_and_for_no_other() -> None:
    for name, stage in _dvc_stages().items():
        calls = [node for node in ast.walk(tree(PACKAGE / "stages" / f"{name}.py")) if isinstance(node, ast.Call)]
        (sections,) = [
            keyword.value
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "open_stage"
            for keyword in call.keywords
            if keyword.arg == "sections"
        ]
        read = {
            node.attr
            for node in ast.walk(sections)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params"
        }
        assert {section for section in stage["params"] if isinstance(section, str)} == read, name
