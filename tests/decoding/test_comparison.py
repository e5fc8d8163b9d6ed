"""Both ways side by side: speed-up is a ratio of summed times a token (conformance 30)."""

import pytest

from dllm.config.params import Target
from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.comparison import Comparison, Pair, figures, same_prefix, table
from dllm.decoding.speculative import Decoder
from dllm.models import targets
from tests.decoding.stand_in_drafts import oracle

PROMPT = [1, 300, 20, 45, 301, 77]


def pair(**changed: object) -> Pair:
    plain = dict(prompt_id="p", source="s", prompt_tokens=3, ar_tokens=10, ar_s=1.0, spec_tokens=10, spec_s=0.5)
    rounds = (RoundCounts(4, 3, 3), RoundCounts(4, 3, 3), RoundCounts(2, 1, 3))
    return Pair(**{**plain, "same_prefix": 11, "identical": True, "rounds": rounds, **changed})  # type: ignore[arg-type]


def test_times_are_summed_before_they_are_divided() -> None:
    slow = pair(ar_tokens=30, ar_s=9.0, spec_tokens=20, spec_s=1.5, same_prefix=12, identical=False)
    found = figures([pair(), slow], block_size=4)
    assert found["ms_per_token_ar"] == pytest.approx(1000 * 10 / 40)
    assert found["ms_per_token_spec"] == pytest.approx(1000 * 2 / 30)
    assert found["speedup"] * found["ms_per_token_spec"] == pytest.approx(found["ms_per_token_ar"])
    assert found["speedup"] == pytest.approx(found["tokens_per_s_spec"] / found["tokens_per_s_ar"])
    assert found["speedup_median"] == pytest.approx(((1 / 0.5) + (0.3 / 0.075)) / 2)
    assert found["tokens"] == 32 and found["tokens_ar"] == 42 and found["prompts"] == 2
    assert found["identical_fraction"] == 0.5
    assert found["same_prefix_fraction"] == pytest.approx((11 + 12) / (11 + 31))
    assert found["tau_micro"] == pytest.approx(20 / 6)


def test_responses_of_one_token_leave_no_figure_rather_than_a_division_by_zero() -> None:
    empty = pair(ar_tokens=0, ar_s=0.0, spec_tokens=0, spec_s=0.0, same_prefix=1, rounds=())
    found = figures([empty], block_size=4)
    assert found["speedup"] is None and found["tau_micro"] is None and found["tokens_per_s_ar"] is None
    assert table([empty])["tau"] == [None]
    assert figures([], block_size=4)["identical_fraction"] is None


def test_a_pair_survives_json() -> None:
    import json

    found = Pair.from_json(json.loads(json.dumps(pair().to_json())))
    assert found == pair() and found.rounds[2].num_accepted == 1


@pytest.mark.parametrize(
    ("one", "other", "shared"), [([1, 2, 3], [1, 2, 3], 3), ([1, 2], [1, 2, 3], 2), ([1, 5], [1, 2], 1), ([], [1], 0)]
)
def test_same_prefix(one: list[int], other: list[int], shared: int) -> None:
    assert same_prefix(one, other) == shared


@pytest.mark.parametrize("speculative_first", [False, True])
def test_a_prompt_is_decoded_both_ways(speculative_first: bool) -> None:
    model = targets.load_target(Target(model="builtin:tiny"), "float32", "cpu")
    plain = Decoder(model)
    truth = plain.generate(PROMPT, max_new_tokens=20).token_ids
    speculative = Decoder(model, oracle(model, PROMPT, truth, 4))
    found = Comparison(plain, speculative).decode(
        PROMPT, max_new_tokens=13, stop_ids=(), prompt_id="x", source="y", speculative_first=speculative_first
    )
    assert found.identical and found.same_prefix == 13
    assert found.ar_tokens == found.spec_tokens == 12
    assert found.rounds == ((4, 3, 3),) * 3
    assert found.ar_s > 0 and found.spec_s > 0
    rows = table([found, found])
    assert rows["tau"] == [4.0, 4.0] and rows["prompt_id"] == ["x", "x"] and rows["tokens"] == [13, 13]
