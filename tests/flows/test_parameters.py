"""What a flow run can be asked for: refused by schema or before the first stage, named, and written as params.yaml."""

import dataclasses
import typing
from pathlib import Path

import pytest
from prefect.utilities.schema_tools.validation import ValidationError, validate

from dllm.config import recipe_book
from dllm.config.load import load_params
from dllm.errors import ConfigError
from dllm.stages import STAGES
from flows import parameters
from flows.parameters import Request
from flows.pipeline import pipeline

SCHEMA = pipeline.parameters.model_dump()


def keys(values: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in values.items():
        found += [prefix + key, *(keys(value, f"{prefix}{key}.") if isinstance(value, dict) else [])]
    return found


@pytest.mark.parametrize("name", recipe_book.names())
def test_the_server_takes_every_recipe_and_each_of_its_keys(name: str) -> None:
    overrides = dict.fromkeys(keys(recipe_book.every_key(recipe_book.load(name))), 1)
    validate({"recipe": name, "overrides": overrides, "checkout": "HEAD", "seed": 3}, SCHEMA, raise_on_error=True)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"recipe": "tiny-dflsh"}, "'tiny-dflsh' is not one of ['params.yaml', "),
        ({"overrides": {"train.epochz": 2}}, "Additional properties are not allowed ('train.epochz' was unexpected)"),
        ({"overrides": {"target.model": "http://me:word@host/x"}}, "should not be valid under"),
        ({"overrides": "train.epochs=2"}, "is not of type 'object'"),
        ({"seed": -1}, "-1 is less than the minimum of 0"),
        ({"from_stage": "trian"}, "'trian' is not one of ['prepare', 'regenerate', 'train', 'evaluate', 'register']"),
        ({"checkout": "--upload-pack=x"}, "does not match"),
        ({"save_as": "file"}, "'file' is not one of"),
    ],
)
def test_the_server_refuses_what_is_wrong_before_there_is_a_run(wrong: dict, says: str) -> None:
    with pytest.raises(ValidationError) as refused:
        validate(wrong, SCHEMA, raise_on_error=True)
    (name,) = wrong
    assert name in str(refused.value) and says in str(refused.value)


def test_the_form_has_one_field_for_all_overrides() -> None:
    assert "properties" not in SCHEMA["properties"]["overrides"]
    assert all(field["description"] for field in SCHEMA["properties"].values())
    assert typing.get_args(parameters.Stage) == STAGES


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("tiny-dflash", {"train.epochz": 2}), "train.epochz: unknown key; did you mean epochs?"),
        (Request("tiny-dflash", {"train.epochs": "many"}), "train.epochs: Input should be a valid number, got 'many'"),
        (Request("tiny-dflash", {"train.seed": 1}, seed=2), "train.seed is given twice"),
        (Request("tiny"), "no recipe 'tiny'"),
    ],
)
def test_what_no_schema_says_is_refused_in_one_line(request_: Request, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        request_.params(tmp_path)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_values_of_stages_that_are_left_out_are_refused(tmp_path: Path) -> None:
    recipe_book.activate("tiny-dflash", tmp_path / "params.yaml")
    epochs = load_params(tmp_path / "params.yaml").train.epochs
    left_out = {
        "train.seed changes the stage train": Request(seed=3, from_stage="evaluate"),
        "train.epochs changes": Request(overrides={"train.epochs": epochs + 1}, from_stage="register"),
        "prepare.heldout_fraction": Request(overrides={"prepare.heldout_fraction": 0.2}, from_stage="regenerate"),
        "target.model changes the stage prepare": Request("smollm2-135m-dflash", from_stage="train"),
    }
    for says, request in left_out.items():
        with pytest.raises(ConfigError, match=says):
            request.check_left_out(tmp_path)
        dataclasses.replace(request, checkout="HEAD").check_left_out(tmp_path)
        dataclasses.replace(request, from_stage="prepare").check_left_out(tmp_path)
    Request(overrides={"train.epochs": epochs, "evaluate.num_prompts": 3}, from_stage="evaluate").check_left_out(
        tmp_path
    )


def test_a_name_says_the_recipe_and_what_is_special(tmp_path: Path) -> None:
    assert Request("tiny-dflash", checkout="HEAD").name(tmp_path) == "tiny-dflash"
    special = Request("tiny-dflash", {"train.epochs": 2}, 3, "train", True, False, "v1")
    expected = "tiny-dflash: train.epochs=2, seed 3, at v1, from train, forced, not registered"
    assert special.name(tmp_path) == expected
    sources = {"prepare.sources": [{"name": "/data/new-responses", "split": "train"}], "regenerate.engine": "dataset"}
    expected = "tiny-dflash: prepare.sources=new-responses(split=train), regenerate.engine=dataset"
    assert Request("tiny-dflash", sources).name(tmp_path) == expected
    many = {f"train.key{number}": number for number in range(99)}
    long = [Request("tiny-dflash", many | {"train.key98": value}).name(tmp_path) for value in (1, 2)]
    assert long[0] != long[1] and {len(name) for name in long} == {parameters.NAME_CHARS}
    assert Request().name(tmp_path) == "params.yaml"
    recipe_book.activate("tiny-mdlm", tmp_path / "params.yaml")
    assert Request().name(tmp_path) == "tiny-mdlm"
    assert parameters.is_made_up("brave-otter") and parameters.is_made_up("tau4-roentgen-k")
    assert not parameters.is_made_up("my run") and not parameters.is_made_up("Nightly")


def test_params_are_written_where_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    changed = {"train.epochs": 2, "train.optimizer.lr": 1e-05, "evaluate.sets": None}
    Request("tiny-dflash", changed, seed=7).write_params(tmp_path, force=False)
    params = load_params(path)
    assert (params.train.epochs, params.train.optimizer.lr, params.train.seed) == (2, 1e-05, 7)
    assert "# Changed for a flow run: train.epochs=2, train.optimizer.lr=1e-05, evaluate.sets=null, seed 7.\n" in (
        path.read_text()
    )
    before = path.read_text()
    Request("tiny-dflash", changed, seed=7).write_params(tmp_path, force=False)
    assert path.read_text() == before, "a run that is resumed finds its own values, and none are lost"
    Request().write_params(tmp_path, force=False)
    assert path.read_text() == before, "the file as it is"
    with pytest.raises(ConfigError, match="its values are those of no recipe"):
        Request("tiny-dflash").write_params(tmp_path, force=False)
    Request(overrides={"train.epochs": 3}).write_params(tmp_path, force=True)
    assert load_params(path) == params.model_copy(update={"train": params.train.model_copy(update={"epochs": 3})})
