"""params.yaml: what is refused, how the refusal reads, and what shipped recipes hold."""

import re
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import parse_yaml
from pydantic import create_model

from dllm.config import recipe_book
from dllm.config.load import load_params, params_digest, parse_params, read_yaml
from dllm.config.params import Target
from dllm.config.regenerate import OWN_OPTIONS
from dllm.errors import ConfigError

MINIMAL = {
    "recipe": "mine",
    "target": {"model": "builtin:tiny"},
    "prepare": {"sources": [{"name": "gsm8k"}]},
    "register": {"model_name": "mine"},
}


def _with(path: str, value: object) -> dict:
    raw = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return raw


FOREIGN = [
    (["--host", "0.0.0.0"], "--host"),
    (["--tp", "2", "--host=0.0.0.0"], "--host"),
    (["--hos=0.0.0.0"], "--host"),
    (["--trust"], "--trust-remote-code"),
    (["--trust_remote_code"], "--trust-remote-code"),
    (["--model", "/x"], "--model"),
    (["--tokenizer-pa", "/x"], "--tokenizer-path"),
    (["--config", "x.yaml"], "--config"),
]
"""Options of SGLang that a recipe may not set by `args`, whole or as argparse takes them."""
REFUSED = [
    ("train.lr_peek", 1, "train.lr_peek: unknown key"),
    ("train.epoch", 1, "did you mean epochs?"),
    ("trian", {}, "trian: unknown key; did you mean train?"),
    ("train.dflash.blocksize", 8, "train.dflash.blocksize: unknown key; did you mean block_size?"),
    ("train.dflash.overlap_anchors", True, "train.dflash.overlap_anchors: unknown key"),
    ("train.batch_size", "8", "train.batch_size: Input should be a valid integer, got '8'"),
    ("train.batch_size", 0, "train.batch_size: Input should be greater than or equal to 1, got 0"),
    ("train.batch_size", True, "train.batch_size"),
    ("train.optimizer.lr", -1.0, "train.optimizer.lr"),
    ("train.optimizer.name", "adam", "did you mean adamw?"),
    ("train.mode", "dflsh", "did you mean dflash?"),
    ("target.trust_remote_code", "yes", "target.trust_remote_code"),
    ("prepare.sources", [], "prepare.sources"),
    ("prepare.sources", [{"name": "gsm8k", "limits": 3}], "prepare.sources.0.limits: unknown key; did you mean limit?"),
    ("prepare.heldout_fraction", 1.0, "prepare.heldout_fraction"),
    ("regenerate.samples_per_prompt", 2, "raise temperature"),
    ("train.dflash.block_size", 1, "a block of 1 has nothing to predict"),
    ("train.dflash.block_size", 0, "block_size 0 reads the draft's"),
    ("train.dflash.draft.sliding_window", 8, "draft.sliding_window 8 is below block_size 16"),
    ("train.dflash.draft", {"num_hidden_layers": 2, "layer_types": ["full_attention"]}, "must name 2 layers"),
    ("train.dflash.draft.layer_types", ["sliding_attention"] * 5, "need each other"),
    ("train.dflash.draft", {"layer_types": ["full_attention"] * 5, "sliding_window": 64}, "need each other"),
    ("train.dflash.draft.layer_types", ["linear_attention"] * 5, "train.dflash.draft.layer_types.0"),
    ("evaluate.block_size", 32, "larger than train.dflash.block_size 16"),
    ("evaluate.block_size", 1, "evaluate.block_size must be 0"),
    ("evaluate.sets", [{"name": "gsm8k", "limits": 3}], "evaluate.sets.0.limits: unknown key; did you mean limit?"),
    ("evaluate.sets", ["gsm8k", "gsm8k"], "evaluate.sets names a set twice"),
    ("evaluate.sets", "gsm8k", "evaluate.sets: Input should be a valid list"),
    ("evaluate.thinking", [], "evaluate.thinking"),
    ("evaluate.thinking", [True], "evaluate.thinking is for evaluate.sets, and there are none"),
    ("evaluate.thinking", [True, True], "evaluate.thinking names a mode twice"),
    ("evaluate.temperature", 2.5, "evaluate.temperature"),
    ("evaluate.temperature", 1e-9, "temperature must be 0, or a number"),
    ("evaluate.top_k", 5, "top_p and top_k require sampling"),
    ("evaluate.top_p", 0.9, "top_p and top_k require sampling"),
    ("register", {}, "register.model_name: missing"),
    ("regenerate.servers", ["host:8000/v1"], "regenerate.servers.0: not an http address"),
    *(("regenerate.sglang.args", args, f"{name} is not for args: {OWN_OPTIONS[name]}") for args, name in FOREIGN),
]


@pytest.mark.parametrize(("path", "value", "said"), REFUSED, ids=[f"{path}={value}" for path, value, _ in REFUSED])
def test_a_bad_value_is_refused_by_its_path(path: str, value: object, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_params(_with(path, value))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_set_is_a_name_or_a_source() -> None:
    named = parse_params(_with("evaluate.sets", ["gsm8k", {"name": "math500", "limit": 8}])).evaluate.sets
    assert named is not None and [(each.name, each.limit) for each in named] == [("gsm8k", None), ("math500", 8)]
    with pytest.raises(ConfigError, match=r"evaluate\.sets measures acceptance of drafts, and train\.mode is mdlm"):
        parse_params(_with("train.mode", "mdlm") | {"evaluate": {"sets": ["gsm8k"]}})


def test_values_never_change_after_loading() -> None:
    params = parse_params(MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        params.train.batch_size = 3  # type: ignore[misc]


def test_overrides_are_yaml_and_reach_keys_the_file_leaves_out(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    params = load_params(
        path, ["train.optimizer.lr=0.01", "train.dflash.mask_token_id=null", "prepare.sources=[{name: aime}]"]
    )
    assert params.train.optimizer.lr == 0.01
    assert params.train.dflash.mask_token_id is None
    assert [source.name for source in params.prepare.sources] == ["aime"]


@pytest.mark.parametrize("text", ["6e-4", "1e-3", "5E-5"])
def test_an_override_takes_a_number_as_people_write_it(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    assert load_params(path, [f"train.optimizer.lr={text}"]).train.optimizer.lr == float(text)


def test_the_file_takes_a_number_as_people_write_it(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "train: {optimizer: {lr: 6e-4}}\n")
    assert load_params(path).train.optimizer.lr == 6e-4


SCALARS = [
    ("6e-4", 6e-4), ("1E3", 1000.0), ("-1.5", -1.5), (".5", 0.5), ("+7", 7), ("0x1F", 31), ("1_000", 1000),
    ("0o10", 8), ("010", 10), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
    ("yes", "yes"), ("off", "off"), ("12:30", "12:30"), ("train[:1000]", "train[:1000]"), ("'1'", "1"),
    ("--tp", "--tp"), ("[0.9, null]", [0.9, None]), ("[{name: aime}]", [{"name": "aime"}]),
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_values_read_as_yaml_1_2_and_as_dvc_reads_them(text: str, value: object) -> None:
    mine, dvcs = read_yaml(text), parse_yaml(f"key: {text}", "params.yaml")["key"]
    assert (mine, type(mine)) == (value, type(value)) == (dvcs, type(dvcs))


def test_an_address_needs_no_quotes_in_a_list() -> None:
    assert read_yaml("[http://127.0.0.1:30000/v1]") == ["http://127.0.0.1:30000/v1"]


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "train: {epochs: 2, seed: 1, epochs: 3}\n")
    with pytest.raises(
        ConfigError, match=r'not YAML: found duplicate key "epochs" .*, line \d+, column \d+ \(.*params'
    ):
        load_params(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.epochs", "KEY=VALUE"),
        ("recipe.name=3", "recipe holds no keys"),
        ("train.epochs=[1", "is not a YAML value"),
        ("train.epoch=2", "did you mean epochs?"),
    ],
)
def test_a_bad_override_is_refused(tmp_path: Path, override: str, said: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(ConfigError) as caught:
        load_params(path, [override])
    assert said in str(caught.value)


@pytest.mark.parametrize("text", ["a: [1", "- a\n- b\n", "", "just words"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_params(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("end", ["", ">>>>>>> theirs\n"])
def test_a_merge_that_is_not_settled_is_named(tmp_path: Path, end: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"recipe: x\n<<<<<<< HEAD\nseed: 1\n=======\nseed: 2\n{end}")
    with pytest.raises(ConfigError, match=r"both sides of a conflict in it, line 2 \(.*keep one of them"):
        load_params(path)


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="recipe use"):
        load_params(tmp_path / "params.yaml")


def test_the_digest_follows_values_and_nothing_else() -> None:
    one, same = parse_params(MINIMAL), parse_params(_with("train.epochs", 6.0))
    other = parse_params(_with("train.epochs", 5.0))
    assert params_digest(one.train) == params_digest(same.train)
    assert params_digest(one.train) != params_digest(other.train)
    assert params_digest(one.target) == params_digest(other.target)


def test_an_absent_key_is_not_digested() -> None:
    params = parse_params(MINIMAL)
    later = create_model("Later", __base__=Target, later=(int | None, None))
    assert params_digest(later(**params.target.model_dump())) == params_digest(params.target)
    assert params_digest(later(**params.target.model_dump(), later=1)) != params_digest(params.target)


def test_a_cache_that_would_not_be_used_is_refused() -> None:
    raw = yaml.safe_load(recipe_book.text("smollm2-135m-hybrid"))
    raw["evaluate"]["diffusion"]["cache"] = "dual"
    with pytest.raises(ConfigError, match=r"cache is dual, and a hybrid .* set it to none"):
        parse_params(raw)
    raw["train"]["hybrid"] |= {"attention": "full", "block_size": None}
    assert parse_params(raw).evaluate.diffusion is not None


MASKS = {"llada": 126336, "llada2": 156895, "nemotron": 100}


def test_a_diffusion_lm_is_not_evaluated_by_sampling() -> None:
    raw = recipe_book.load("tiny-mdlm").model_dump(by_alias=True)
    raw["evaluate"]["temperature"] = 1.0
    with pytest.raises(ConfigError, match=r"evaluate\.temperature is 1, and a diffusion LM is evaluated greedily"):
        parse_params(raw)


def test_recipes_that_run_foreign_code_pin_it_and_name_its_mask() -> None:
    seen = set()
    for name in recipe_book.names():
        params = recipe_book.load(name)
        family = name.split("-")[0]
        assert params.target.trust_remote_code == (family in MASKS), name
        if family in MASKS:
            assert re.fullmatch("[0-9a-f]{40}", params.target.revision or ""), name
            section = params.train.method_settings
            assert section.mask_token_id == MASKS[family], name
            assert (section.lora is not None) == name.endswith("-lora"), name
            seen.add(family)
    assert seen == set(MASKS)


PAPER = {
    "block_size": 16,
    "loss_decay_gamma": 7,
    "num_blocks_per_sample": 512,
    "loss": "decay",
}


@pytest.mark.parametrize("name", ["qwen3-4b-dflash", "qwen3-8b-dflash"])
def test_the_qwen3_recipes_are_the_papers_settings(name: str) -> None:
    params = recipe_book.load(name)
    train, dflash = params.train, params.train.dflash
    assert dflash.model_dump(include=set(PAPER)) == PAPER
    assert (dflash.draft.num_hidden_layers, dflash.draft.num_target_layers_tapped) == (5, 5)
    assert (train.optimizer.name, train.optimizer.lr, train.optimizer.schedule) == ("adamw", 6e-4, "cosine")
    assert (train.optimizer.warmup_ratio, train.optimizer.clip_norm) == (0.04, 1.0)
    assert (train.epochs, train.max_length, train.nproc) == (6, 3072, 8)
    assert params.regenerate.temperature == 0.8
