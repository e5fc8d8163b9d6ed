"""evaluate counts acceptance on more prompts than it decodes, and on all of them where it cannot decode."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dllm.decoding.acceptance import RoundCounts
from dllm.decoding.comparison import Comparison
from dllm.decoding.speculative import Decoder
from dllm.methods.dflash import greedy, walked
from dllm.methods.dflash.sets import Question
from dllm.models import targets
from dllm.models.drafts.dflash import DFlashDraft
from dllm.registry import METHODS
from dllm.stages import evaluate
from tests.stages.test_evaluate import TARGET, draft, params, root  # noqa: F401


@pytest.mark.slow
def test_acceptance_is_counted_on_more_prompts_than_are_decoded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    few = evaluate.run(params(num_prompts=1, identity_prompts=1, walk={"prompts": 0}), root)
    assert "walked" not in few and METHODS["dflash"].score(few).value == few["tau_micro"]
    every = evaluate.run(params(num_prompts=7, identity_prompts=0, walk={"prompts": 7}), root)
    found = every["walked"]
    assert found["on_decoded_prompts"]["same_rounds"] == found["prompts"] == every["prompts"] == 7, "float32"
    for name in ("rounds", "tau_micro", "tau_macro", "acceptance_by_offset", "accepted_histogram", "tau_interval"):
        assert found[name] == every[name], "the rounds of decoding"
    for source, part in found["by_source"].items():
        assert part.items() >= {"rounds": every["by_source"][source]["rounds"]}.items()
    assert found["greedy_fraction"] == 1

    made: list[int] = []
    real = greedy.decode_together

    def noting(decoder, prompts, **options):
        made.append(len(prompts))
        return real(decoder, prompts, **options)

    monkeypatch.setattr(greedy, "decode_together", noting)
    one = evaluate.run(params(num_prompts=1, identity_prompts=0, walk={"prompts": 7}), root)
    assert one["prompts"] == 2 and one["walked"]["rounds"] == found["rounds"]
    assert made == [0], "the responses are in work/greedy/"
    stored = sorted((root / greedy.GREEDY).glob("*/*.json"))[0]
    whole = stored.read_bytes()
    stored.write_bytes(whole.replace(b"1", b"2", 1))
    again = evaluate.run(params(num_prompts=1, identity_prompts=1, walk={"prompts": 7}), root)
    assert made == [0, 1] and stored.read_bytes() == whole, "the damaged one was generated again"
    assert again["walked"]["rounds"] == found["rounds"]
    assert METHODS["dflash"].score(one).value == found["tau_micro"]
    assert one["heldout_digest"] not in (every["heldout_digest"], few["heldout_digest"])
    rows = dict(METHODS["dflash"].rows({"evaluate": one}))
    assert rows["τ micro, 7 held-out prompts"].startswith(f"{found['tau_micro']:.2f} (95 % interval ")
    curves = json.loads((root / "out" / "evaluate" / "acceptance.json").read_text())
    assert curves["walked"]["acceptance_by_offset"] == found["acceptance_by_offset"]


def test_the_first_round_that_decoding_counts_otherwise_is_found(draft: DFlashDraft) -> None:  # noqa: F811
    model = targets.load_target(TARGET)
    question = Question("q", "sums", (1, 300, 20, 45, 301))
    decoder = Decoder(model, draft)
    pair = Comparison(Decoder(model), decoder).decode(question.ids, max_new_tokens=12, stop_ids=())
    assert walked.differing_round(decoder, question, pair, ()) is None
    other = [*pair.rounds[:3], RoundCounts(3, 2, 3), *pair.rounds[4:]]
    assert walked.differing_round(decoder, question, replace(pair, rounds=tuple(other)), ()) == 4


@pytest.mark.slow
def test_the_draft_tokens_that_pay_are_in_report_and_picture(root: Path) -> None:  # noqa: F811
    bounds = {"seconds": 3600, "concurrencies": [1, 2, 10]}
    plain = params(num_prompts=1, identity_prompts=0, walk={"prompts": 2}, throughput=bounds)
    found = evaluate.run(plain, root)
    table = found["throughput"]["tokens_per_s"]
    assert {concurrency: len(row) for concurrency, row in table.items()} == {"1": 4, "2": 4, "10": 4}
    assert found["throughput"]["predicted_speedup"] > 0
    stored = json.loads((root / "out" / "evaluate" / "metrics.json").read_text())  # keys in the order of their digits
    (shown,) = [t for t in METHODS["dflash"].tables({"evaluate": stored}) if t.key == "throughput"]
    assert [row["at once"] for row in shown.rows] == [1, 2, 10] and {"0", "3", "best"} <= shown.rows[0].keys()
    labels = dict(METHODS["dflash"].rows({"evaluate": found}))
    assert labels["predicted from step times"].endswith(" ×")
