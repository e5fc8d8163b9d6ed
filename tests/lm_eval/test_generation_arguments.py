"""generation_kwargs: each is applied or refused."""

import pytest

from dllm.errors import ConfigError
from dllm.lm_eval.generation_arguments import read


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.5}, 0.5),
        ({"do_sample": None, "temperature": None}, 0.0),
    ],
)
def test_do_sample_and_temperature_decide_about_sampling(given, temperature) -> None:
    assert read(given, 0).named["temperature"] == temperature


def test_names_of_the_limit_mean_the_same_and_the_harness_s_own_goes_first() -> None:
    assert read({}, 0).named["max_new_tokens"] == 256
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert read({name: 9}, 0).named["max_new_tokens"] == 9
    assert read({"max_tokens": 7, "max_gen_toks": 9}, 0).named["max_new_tokens"] == 9


def test_stop_strings_seeds_and_settings_of_samplers_go_through() -> None:
    asked = read({"until": "a", "seed": 4, "steps": 8, "top_p": 0.5, "cache": "dual"}, 2)
    assert asked.until == ("a",)
    assert asked.named == {
        "seed": 4, "steps": 8, "top_p": 0.5, "cache": "dual", "temperature": 0.0, "max_new_tokens": 256,
    }  # fmt: skip
    bounded = {"remasking": "entropy", "entropy_bound": 0.5}
    assert read(bounded, 2).named.items() >= bounded.items()
    assert read({"schedule": "cosine", "steps": 4}, 2).named["schedule"] == "cosine"
    assert read({"until": ["a", "b"]}, 2).until == ("a", "b")
    assert read({}, 2).named["seed"] == 2


def test_arguments_without_effect_are_accepted() -> None:
    assert read({"num_beams": 1, "top_k": 40, "repetition_penalty": 1.0}, 0) == read({}, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"num_beams": 4}, "sampler takes no num_beams"),
        ({"top_k": 40, "temperature": 0.5}, "sampler takes no top_k"),
        ({"untl": "a"}, "sampler takes no untl"),
        ({"until": [1]}, "until must be"),
        ({"temperature": "hot"}, "temperature: input should be a valid number"),
        ({"max_gen_toks": 0}, "max_new_tokens must be at least 1"),
        ({"entropy_bound": 1.0}, "take remasking entropy"),
        ({"schedule": "linear"}, "schedule: input should be"),
        ({"cache": "huge"}, "cache: input should be"),
    ],
)
def test_others_are_refused_in_one_line(given, said) -> None:
    with pytest.raises(ConfigError, match=said):
        read(given, 0)
