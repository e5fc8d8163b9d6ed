"""The seam for training methods: what params.yaml, dvc.yaml and a package outside this one may rely on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dllm.config.load import params_digest, parse_params
from dllm.registry import METHODS
from tests.arch.source_tree import ROOT

MINIMAL = {
    "recipe": "mine",
    "target": {"model": "builtin:tiny"},
    "prepare": {"sources": [{"name": "gsm8k"}]},
    "register": {"model_name": "mine"},
}

TOY = """
from dllm.config.section import PositiveInt, Section

class Settings(Section):
    size: PositiveInt = 3

class Measures(Section):
    number: PositiveInt = 2

class Toy:
    settings = Settings
    evaluation = {"toy_measures": Measures}
    reads = {}

    def check(self, params):
        if params.train.method_settings.size > params.evaluate.num_prompts:
            raise ValueError("train.toy.size is larger than evaluate.num_prompts")

TOY = Toy()
"""
READ = """
import json, sys, yaml
from dllm.config.load import params_digest, parse_params
from dllm.errors import ConfigError

def said(**sections):
    raw = {**yaml.safe_load(sys.argv[1]), **sections}
    try:
        params = parse_params(raw)
    except ConfigError as error:
        return str(error)
    print(params_digest(params.train, params.evaluate), file=sys.stderr)
    return str(params.train.method_settings), str(params.evaluate.toy_measures)

print(json.dumps([said(train={"mode": "toy"}),
       said(train={"mode": "toy", "toy": {"size": 4}}, evaluate={"toy_measures": {}}),
       said(train={"mode": "toy", "toy": {"sise": 4}}), said(train={"mode": "toi"}),
       said(train={"mode": "toy", "toy": {"size": 99}}), said(train={"toy": {"size": 0}})]))
"""


def test_a_method_of_another_package_has_its_sections_and_its_check(tmp_path: Path) -> None:
    (tmp_path / "toy_method.py").write_text(TOY)
    info = tmp_path / "toy_method-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[dllm.methods]\ntoy = toy_method:TOY\n")
    argv = [sys.executable, "-c", READ, yaml.safe_dump(MINIMAL)]
    done = subprocess.run(argv, cwd=ROOT, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True)
    assert len(set(done.stderr.split())) == 2
    default, other, unknown, wrong, clash, unused = json.loads(done.stdout)
    assert default == ["size=3", "None"]
    assert other == ["size=4", "number=2"]
    assert "train.toy.sise: unknown key; did you mean size?" in unknown
    assert "did you mean toy?" in wrong
    assert "train.toy.size is larger than evaluate.num_prompts" in clash
    assert "train.toy.size" in unused, "sections of other methods are checked"


@pytest.mark.parametrize("mode", list(METHODS))
def test_only_the_section_of_the_method_that_trains_is_kept(mode: str) -> None:
    params = parse_params({**MINIMAL, "train": {"mode": mode}})
    assert {name for name in METHODS if getattr(params.train, name) is not None} == {mode}
    assert params.train.method_settings == METHODS[mode].settings()
    for other in set(METHODS) - {mode}:
        with_other = parse_params({**MINIMAL, "train": {"mode": mode, other: {}}})
        assert params_digest(with_other.train) == params_digest(params.train)


def test_evaluation_depends_on_what_methods_read_and_on_nothing_else() -> None:
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["evaluate"]
    read = {path for _, method in METHODS.items() for path in method.reads.values()}
    of_sets = {"data"}  # files that evaluate.sets may name
    assert set(stage["deps"]) == read | of_sets | {"out/train/checkpoint"}


def test_params_are_read_without_the_heavy_libraries() -> None:
    code = "import sys, dllm.config.load; print({'torch', 'transformers', 'numpy', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
