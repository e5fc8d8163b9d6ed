"""DFlash as a strategy: sums that no batch split changes, fixed validation, honest acceptance length."""

from array import array

import pytest
import torch

from dllm.config.params import Target, Train
from dllm.decoding.acceptance import Acceptance
from dllm.decoding.speculative import Decoder
from dllm.methods.dflash import greedy as greedy_module
from dllm.methods.dflash.anchors import Anchors
from dllm.methods.dflash.build import initial_draft
from dllm.methods.dflash.features import CachedFeatures, OnlineFeatures
from dllm.methods.dflash.greedy import GreedyRows, greedy_rows
from dllm.methods.dflash.objective import Batch, block_labels, teacher_hidden
from dllm.methods.dflash.strategy import DflashStrategy
from dllm.models import targets
from dllm.training.batches import Example
from dllm.training.distributed import Ranks

TARGET = Target(model="builtin:tiny", dtype="float32")
ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def target():
    return targets.load_target(TARGET, device="cpu")


def examples(prefix: str, number: int) -> list[Example]:
    made = []
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(10, 400, (14 + 5 * i,), generator=generator).tolist()
        made.append(Example(f"{prefix}{i}-0", array("i", ids), 4 + i % 3))
    return made


SPLITS = {"train": examples("t", 4), "heldout": examples("h", 3)}


def strategy(target, source=None, **dflash) -> DflashStrategy:
    draft = {"num_hidden_layers": 1, "num_target_layers_tapped": 3, **dflash.pop("draft", {})}
    settings = Train.model_validate(
        {
            "compute_dtype": "float32",
            "dflash": {"block_size": 4, "num_blocks_per_sample": 6, "draft": draft, **dflash},
        }
    )
    model = initial_draft(settings.dflash, target, targets.load_tokenizer(TARGET), seed=0)
    source = source or OnlineFeatures(target, model.config.target_layer_ids, SPLITS, settings.dflash.distill > 0)
    weights = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    return DflashStrategy(model, *weights, SPLITS, source, settings)


def pooled(parts) -> dict[str, list[float]]:
    names = ("numerator", "denominator", "tokens", "predictions", "flops")
    sums = {name: [sum(float(torch.as_tensor(getattr(part, name)).detach()) for part in parts)] for name in names}
    for name in parts[0].counts:
        sums[name] = sum(torch.as_tensor(part.counts[name]).double().reshape(-1) for part in parts).tolist()
    return sums


@pytest.mark.parametrize("loss", ["decay", "dpace"])
@pytest.mark.parametrize("loss_vocab", ["full", "corpus"])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_sums_do_not_depend_on_the_batch_split(target, loss, loss_vocab, distill) -> None:
    made = strategy(target, loss=loss, loss_vocab=loss_vocab, distill=distill)
    whole = pooled([made.terms("train", [0, 1, 2, 3], 1)])
    split = pooled([made.terms("train", [3, 0], 1), made.terms("train", [2], 1), made.terms("train", [1], 1)])
    for name, values in whole.items():
        assert values == pytest.approx(split[name], rel=1e-5), name


def test_anchors_are_drawn_afresh_each_epoch_and_never_for_validation(target) -> None:
    made = strategy(target, num_blocks_per_sample=2)
    again, next_epoch = made.terms("train", [2, 3], 0), made.terms("train", [2, 3], 1)
    assert made.terms("train", [2, 3], 0).numerator.item() == again.numerator.item() != next_epoch.numerator.item()
    with torch.no_grad():
        first, later = (made.terms("heldout", [0, 1, 2], 0).numerator.item() for _ in range(2))
    assert first == later


def test_cached_features_give_the_terms_of_online_ones(target, tmp_path) -> None:
    online = strategy(target)
    layer_ids = online.model.config.target_layer_ids
    cached = CachedFeatures(tmp_path, SPLITS, identity={"model": "tiny"}, layer_ids=layer_ids, dtype="float32")
    cached.fill(target, ALONE)
    stamps = [path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")]
    cached.fill(target, ALONE)
    assert stamps and stamps == [path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")]
    offline = strategy(target, cached)
    for split, rows in (("train", [1, 3]), ("heldout", [2])):
        left, right = online.terms(split, rows, 0), offline.terms(split, rows, 0)
        assert left.numerator.item() == pytest.approx(right.numerator.item(), rel=1e-5)
        assert torch.equal(left.counts["correct"], right.counts["correct"])


def test_the_teacher_of_a_slot_is_what_the_target_said_there(target) -> None:
    made = strategy(target, distill=1.0)
    row = SPLITS["train"][2]
    ids = torch.tensor([list(row.input_ids)])
    with torch.no_grad():
        logits_SV = target(input_ids=ids).logits[0].float()
    known = made.source.features("train", [2])[0]
    last_SD = known[:, -made.width :].float()
    torch.testing.assert_close(last_SD @ made.head.weight_VD.float().T, logits_SV, atol=1e-4, rtol=1e-4)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), known[None, :, : -made.width], last_SD[None])
    anchors = Anchors(torch.tensor([[1]]), torch.tensor([[True]]))
    labels = block_labels(batch, anchors, 4)
    # the slot at offset k stands for token 1 + k, which the target predicted one token earlier
    assert torch.equal(teacher_hidden(batch, anchors, labels), last_SD[1:4])


def test_acceptance_length_is_of_leading_runs_not_a_product_of_accuracies(target) -> None:
    made = strategy(target)
    # Four blocks with leading runs of 3, 2, 1 and 0 out of three offsets.
    sums = {"correct": [3.0, 2.0, 1.0], "count": [4.0, 4.0, 4.0], "run_sum": [6.0], "blocks": [4.0]}
    assert made.metrics(sums) == {
        "draft_acc": 0.5,
        "draft_acc_k1": 0.75,
        "draft_acc_k2": 0.5,
        "draft_acc_k3": 0.25,
        "acceptance_length": 2.5,
    }
    assert made.metrics({"correct": [0.0] * 3, "count": [0.0] * 3, "run_sum": [0.0], "blocks": [0.0]}) == {}


def test_a_tie_in_acceptance_goes_to_the_lower_loss(target) -> None:
    made = strategy(target)
    longer = made.score({"val_acceptance_length": 2.5, "val_loss": 9.0})
    tied = made.score({"val_acceptance_length": 2.4, "val_loss": 1.0})
    assert longer > tied > made.score({"val_acceptance_length": 2.4, "val_loss": 1.1})


def test_weights_go_out_and_back_exactly(target, tmp_path) -> None:
    one, other = strategy(target), strategy(target)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.add_(torch.randn_like(parameter))
    one.save(tmp_path)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True))


def test_a_draft_may_start_from_a_published_one(target, tmp_path) -> None:
    published = strategy(target, draft={"num_hidden_layers": 2})
    published.save(tmp_path)
    warm = strategy(target, block_size=0, draft={"init": str(tmp_path)})
    assert warm.model.config == published.model.config
    assert torch.equal(warm.model.fc.weight, published.model.fc.weight)
    smaller = strategy(target, block_size=3, draft={"init": str(tmp_path)})
    assert len(smaller.terms("train", [0], 0).counts["correct"]) == 2


def test_flops_count_what_a_plain_count_by_hand_counts(target) -> None:
    draft = strategy(target).model
    hidden, kv, inner = 64, 32, 192
    slots, context, seen, scored = 8, 20, 15, 5
    weights = slots * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * inner) + context * 2 * hidden * kv
    attention = 2 * 4 * (seen + slots) * hidden
    by_hand = 2 * (3 * (weights + attention) + 2 * context * 3 * hidden * hidden + 2 * scored * 100 * hidden)
    counted = draft.train_flops(context_tokens=context, blocks=2, visible_tokens=seen, predictions=scored, vocab=100)
    assert counted == by_hand


def test_the_walked_acceptance_length_is_that_of_decoding_however_rows_are_split(target) -> None:
    plain, stop = Decoder(target), 6
    made, expected = [], Acceptance(4)
    for i in range(4):
        prompt = [1, 300 + i, 20, 45, *range(7 + i, 20)]
        response = plain.generate(prompt, max_new_tokens=18).token_ids
        stop = response[11] if i == 0 else stop
        made.append((prompt, response[: response.index(stop) + 1] if stop in response else response))
    rows = [Example(f"h{i}-0", array("i", [*p, *r]), len(p)) for i, (p, r) in enumerate(made)]
    splits = {"train": SPLITS["train"], "heldout": rows}
    one = strategy(target, walk_samples=3)
    source = OnlineFeatures(target, one.model.config.target_layer_ids, splits)
    weights = target.get_input_embeddings().weight, target.get_output_embeddings().weight
    one = DflashStrategy(one.model, *weights, splits, source, one.settings, {stop})
    for prompt, response in made[:3]:
        limit = len(response) if response[-1] == stop else len(response) - 2  # what the last round may look at
        rounds = Decoder(target, one.model).generate(prompt, max_new_tokens=limit, stop_ids={stop}).rounds
        expected.add(r.counts for r in rounds)
    whole = pooled([one.terms("heldout", [3, 0, 2, 1], 0)])
    assert whole["walk_tokens"] == pooled([one.terms("heldout", [row], 0) for row in range(4)])["walk_tokens"]
    assert (whole["walk_rounds"], whole["walk_tokens"]) == ([expected.rounds], [expected.num_emitted])
    assert one.metrics(whole)["walked_acceptance_length"] == expected.tau_micro
    train = pooled([one.terms("train", [0], 0)])
    assert train["walk_rounds"] == [0] and "walked_acceptance_length" not in one.metrics(train)
    assert strategy(target, walk_samples=0).terms("heldout", [0], 0).counts["walk_rounds"] == 0
    sampled = DflashStrategy(one.model, *weights, splits, source, one.settings, {stop}, greedy=GreedyRows([], [], 0))
    assert sampled.terms("heldout", [0], 0).counts["walk_rounds"] == 0


@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_where_held_out_responses_are_sampled_rounds_are_counted_on_greedy_ones(
    target, tmp_path, monkeypatch, distill
) -> None:
    one, heldout = strategy(target, distill=distill), SPLITS["heldout"]
    first = heldout[0].input_ids[: heldout[0].prompt_length].tolist()
    stop = Decoder(target).generate(first, max_new_tokens=8).token_ids[7]

    def rows(max_positions=None):
        options = {"block_size": 4, "stop_ids": {stop}, "max_positions": max_positions, "ranks": ALONE}
        return greedy_rows(tmp_path, TARGET, target, heldout, **options)

    def counts(greedy):
        splits = {**SPLITS, "greedy": greedy.examples}
        source = OnlineFeatures(target, one.model.config.target_layer_ids, splits, distill > 0)
        weights = target.get_input_embeddings().weight, target.get_output_embeddings().weight
        made = DflashStrategy(one.model, *weights, SPLITS, source, one.settings, {stop}, greedy=greedy)
        return [made.terms("heldout", [row], 0).counts for row in range(3)]

    found, limit = counts(rows()), max(len(each) - each.prompt_length for each in heldout)
    for each, row in zip(found, heldout, strict=True):
        expected = Acceptance(4)
        prompt = row.input_ids[: row.prompt_length].tolist()
        rounds = Decoder(target, one.model).generate(prompt, max_new_tokens=limit, stop_ids={stop}).rounds
        expected.add(r.counts for r in rounds)
        assert (each["walk_rounds"], each["walk_tokens"]) == (expected.rounds, expected.num_emitted)
    # Kept for the next run; a prompt that leaves no room for a response is not walked.
    monkeypatch.setattr(greedy_module, "decode_together", lambda decoder, prompts, **options: iter(prompts and 1 / 0))
    room = limit + 2 + heldout[1].prompt_length
    assert [each["walk_rounds"] for each in counts(rows(room))] == [*(each["walk_rounds"] for each in found[:2]), 0]


def test_the_best_checkpoint_is_that_of_the_longest_walked_acceptance_length(target) -> None:
    score = strategy(target).score
    walked = {"val_walked_acceptance_length": 2.0, "val_acceptance_length": 2.5, "val_loss": 3.0}
    assert score(walked) == (2.0, -3.0)
    assert score({"val_acceptance_length": 2.5, "val_loss": 3.0}) == (2.5, -3.0)
    assert score({"val_loss": 3.0}) == (1.0, -3.0)
