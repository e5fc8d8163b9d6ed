"""The samplers' registry: flags and arguments derived from settings, and a sampler from outside the package."""

import importlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint

import pytest
import typer
from typer.testing import CliRunner

from dllm.cli import app as application
from dllm.cli import generate as verb
from dllm.cli import generation, lm_eval, options
from dllm.decoding.diffusion import GenerateOptions, generate
from dllm.decoding.sampler import field_names
from dllm.decoding.samplers import Llada
from dllm.decoding.settings import CausalSettings, LengthSettings, Settings, setting
from dllm.errors import ConfigError
from dllm.lm_eval.generation_arguments import read
from dllm.models.diffusion.config import DiffusionConfig
from dllm.models.diffusion.families import load_diffusion_lm
from dllm.registry import DIFFUSION_LMS, SAMPLERS
from tests.models.small_models import TINY


@dataclass(frozen=True)
class ToySettings(Settings):
    """As llada's, with one setting more."""

    patience: int = setting(3, "Passes to wait.", low=1, high=9)


class Toy(Llada):
    """As llada."""

    name, settings, defaults = "toy", {"diffusion": ToySettings}, {"block_size": 4}


TOY = Toy()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install the toy as another package would, by an entry point."""
    entry = EntryPoint("toy", f"{__name__}:TOY", "dllm.samplers")
    monkeypatch.setitem(SAMPLERS.__dict__, "_installed", {"toy": entry})
    for module in (verb, lm_eval, application):
        importlib.reload(module)
    yield
    monkeypatch.undo()
    for module in (verb, lm_eval, application):
        importlib.reload(module)


def flags(name: str) -> dict[str, typer.core.TyperOption]:
    command = typer.main.get_command(application.app).commands[name]
    return {option: each for each in command.params for option in each.opts}


def test_each_setting_is_a_flag_with_its_help_and_bounds() -> None:
    found = flags("generate")
    for field in fields(Settings):
        flag = found.get(f"--{field.name.replace('_', '-')}")
        assert (flag is None) == (field.metadata["help"] is None)
        if flag is not None:
            assert flag.help == field.metadata["help"] and flag.rich_help_panel in (options.DECODING, options.DIFFUSION)
            assert flag.default is None, "a flag that was not given is told from one given its default"
            bounds = field.metadata["bounds"]
            assert (flag.min, flag.max) == (bounds["low"], bounds["high"])


def test_a_sampler_from_outside_adds_its_flag_and_is_accepted_everywhere(toy) -> None:
    assert flags("generate")["--patience"].help == "Passes to wait."
    called = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generation, "generate", lambda **named: called.update(named))
        said = CliRunner().invoke(
            application.app,
            ["generate", "--checkpoint", "x", "--prompt", "hi", "--sampler", "toy", "--patience", "5", "--top-p", "1"],
        )
    assert said.exit_code == 0, said.output
    assert called["options"] == GenerateOptions("toy", settings={"patience": 5, "top_p": 1.0})
    model = load_diffusion_lm(TINY)
    (record,) = generate(model, ["Why?"], GenerateOptions("toy", settings={"max_new_tokens": 6, "patience": 2}))
    (plain,) = generate(model, ["Why?"], GenerateOptions("llada", settings={"max_new_tokens": 6, "block_size": 4}))
    assert (record["sampler"], record["token_ids"]) == ("toy", plain["token_ids"])
    with pytest.raises(ConfigError, match="sampler llada has no use for --patience"):
        list(generate(model, ["Why?"], GenerateOptions("llada", settings={"patience": 2})))
    assert read({"patience": 4}, 0, ToySettings).named["patience"] == 4
    with pytest.raises(ConfigError, match="patience must be at most 9"):
        read({"patience": 10}, 0, ToySettings)
    with pytest.raises(ConfigError, match="takes no patience"):
        read({"patience": 4}, 0)


def test_a_sampler_that_is_not_there_is_refused_by_name() -> None:
    for arguments in (["generate", "--checkpoint", "x"], ["lm-eval", "--checkpoint", "x", "--tasks", "t"]):
        said = CliRunner().invoke(application.app, [*arguments, "--sampler", "beam"])
        assert said.exit_code == 2 and "'beam' is not one of" in " ".join(said.output.split())
    said = CliRunner().invoke(application.app, ["lm-eval", "--checkpoint", "x", "--tasks", "t", "--sampler", "dflash"])
    assert said.exit_code == 2, "a draft has no likelihood"


def test_every_sampler_says_what_it_takes_and_its_defaults_are_among_them() -> None:
    for name, sampler in SAMPLERS.items():
        assert sampler.name == name
        assert all(issubclass(each, LengthSettings) for each in sampler.settings.values())
        assert sampler.defaults.keys() <= field_names(sampler.settings.get("diffusion"))
    assert field_names(SAMPLERS["ar"].settings["diffusion"]) == field_names(CausalSettings)
    sampled = {"max_new_tokens", "temperature", "seed", "top_p", "top_k"}
    assert field_names(SAMPLERS["ar"].settings["draft"]) == sampled
    assert field_names(SAMPLERS["dflash"].settings["draft"]) == {*sampled, "block_size"}


def test_the_default_sampler_fits_the_model() -> None:
    for config, family, name in [
        (DiffusionConfig("mdlm", 3), "transformers", "llada"),
        (DiffusionConfig("mdlm", 3, 4), "transformers", "llada"),
        (DiffusionConfig("hybrid", 3), "transformers", "llada"),
        (DiffusionConfig("hybrid", 3, 4), "transformers", "nemotron"),
        (DiffusionConfig("hybrid", 3, 4), "nemotron", "own"),
    ]:
        known = type("Known", (), {"config": config})()
        assert DIFFUSION_LMS[family].default_sampler.fget(known) == name
        assert name in SAMPLERS


def test_a_block_size_of_0_is_the_models_own() -> None:
    model = load_diffusion_lm(TINY)
    model.config = DiffusionConfig("mdlm", model.mask_token_id, 4)
    found = [SAMPLERS["llada"].settle(model, {"block_size": size}).block_size for size in (0, None, 8)]
    assert found == [4, 4, 8]
    stream = io.StringIO()
    json.dump(next(generate(model, ["Why?"], GenerateOptions(settings={"max_new_tokens": 4, "block_size": 0}))), stream)
    assert json.loads(stream.getvalue())["block_size"] == 4
