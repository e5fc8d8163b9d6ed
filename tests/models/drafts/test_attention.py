"""The structured attention against a plain-loop oracle, and what a block may and may not see."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm.models.drafts import attention as structured_attention
from dllm.models.drafts.attention import block_attention
from dllm.models.drafts.config import FULL, SLIDING, DFlashConfig
from dllm.models.drafts.dflash import DFlashDraft
from dllm.models.drafts.layers import Rope
from dllm.models.drafts.merged_attention import MergedAttention
from dllm.models.drafts.sizing import layer_ids


def tiny_config(**changes) -> DFlashConfig:
    base = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        max_position_embeddings=256,
        block_size=4,
        mask_token_id=49,
        target_layer_ids=(1, 3),
        num_target_layers=8,
    )
    return DFlashConfig(**{**base, **changes})


def tiny_draft(seed: int = 0, **changes) -> DFlashDraft:
    draft = DFlashDraft(tiny_config(**changes))
    draft.reset_parameters(seed, std=0.3)
    return draft


def oracle(query, key, value, block_key, block_value, visible, window, is_causal):
    """Each query on its own: list what it sees, softmax over that, mix."""
    batch, blocks, slots, heads, size = query.shape
    keys, ratio = block_key.shape[2], heads // key.shape[2]
    out = torch.zeros(batch, blocks, slots, heads, size)
    for b in range(batch):
        for n in range(blocks):
            for q in range(slots):
                o, a = keys - slots + q, int(visible[b, n])
                context = [j for j in range(a) if window is None or j >= a + o - (window - 1)]
                own = [k for k in range(keys) if window is None or abs(o - k) < window]
                own = [k for k in own if k <= o or not is_causal]
                for h in range(heads):
                    g = h // ratio
                    rows = torch.stack([key[b, j, g] for j in context] + [block_key[b, n, k, g] for k in own])
                    values = torch.stack([value[b, j, g] for j in context] + [block_value[b, n, k, g] for k in own])
                    weights = torch.softmax(rows @ query[b, n, q, h] * size**-0.5, 0)
                    out[b, n, q, h] = weights @ values
    return out.flatten(3)


@pytest.mark.parametrize("window", [None, 4, 2])
@pytest.mark.parametrize("slots", [4, 3])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("at_once", [1 << 26, 300])
@pytest.mark.parametrize("merged_on", [{"cpu"}, {}])
def test_equals_the_oracle(monkeypatch, window, slots, is_causal, at_once, merged_on):
    hold_at_once(monkeypatch, at_once, merged_on)
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 4, 4, 8)[:, :, 4 - slots :], torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)]
    parts += [torch.randn(2, 3, 4, 2, 8), torch.randn(2, 3, 4, 2, 8)]
    visible = torch.tensor([[0, 6, 11], [2, 2, 9]])
    got = block_attention(*parts, visible, window, is_causal)
    torch.testing.assert_close(got, oracle(*parts, visible, window, is_causal), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 5, 2])
@pytest.mark.parametrize("slots", [4, 3])
@pytest.mark.parametrize("is_causal", [True, False])
def test_every_way_gives_the_same_gradient(monkeypatch, window, slots, is_causal):
    """By groups and whole, merged after the softmax and before."""
    torch.manual_seed(1)
    parts = [torch.randn(2, 5, slots, 4, 8), torch.randn(2, 12, 2, 8), torch.randn(2, 12, 2, 8)]
    parts += [torch.randn(2, 5, 4, 2, 8), torch.randn(2, 5, 4, 2, 8)]
    visible = torch.tensor([[3, 4, 6, 11, 0], [1, 2, 9, 10, 0]])
    mixed, grads = [], []
    for at_once, merged_on in ((1 << 26, {}), (1, {}), (1 << 26, {"cpu"}), (1, {"cpu"})):
        hold_at_once(monkeypatch, at_once, merged_on)
        leaves = [part.clone().requires_grad_() for part in parts]
        mixed.append(block_attention(*leaves, visible, window, is_causal))
        mixed[-1].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    for other, found in zip(mixed[1:], grads[1:], strict=True):
        torch.testing.assert_close(other, mixed[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, grads[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("own_hidden", [None, torch.ones(4, 4).triu(1).bool()])
def test_merged_attention_has_the_gradient_of_its_values(own_hidden):
    torch.manual_seed(2)
    shapes = [(1, 2, 2, 4, 3), (1, 2, 5, 3), (1, 2, 5, 3), (1, 2, 2, 4, 3), (1, 2, 2, 4, 3)]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    hidden = torch.arange(5).expand(1, 8, 5) >= torch.tensor([0, 0, 0, 0, 3, 3, 3, 3])[:, None]
    assert torch.autograd.gradcheck(lambda *parts: MergedAttention.apply(*parts, hidden, own_hidden), leaves)


def hold_at_once(monkeypatch, number, merged_on):
    for name in ("SCORES_AT_ONCE", "MASK_AT_ONCE"):
        monkeypatch.setattr(structured_attention, name, number)
    monkeypatch.setattr(structured_attention, "MERGED_ON", merged_on)


def inputs(draft: DFlashDraft, anchors: list[int], length: int = 20):
    torch.manual_seed(2)
    width = draft.config.hidden_size
    features = torch.randn(1, length, width * len(draft.config.target_layer_ids))
    embeds = torch.randn(1, len(anchors), draft.config.block_size, width)
    return features, embeds, torch.tensor([anchors])


def run(draft, features, embeds, anchors, keep=None):
    keep = torch.ones_like(anchors, dtype=torch.bool) if keep is None else keep
    return draft(embeds, features, anchors, keep)


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_training_forward_equals_separate_decoding_calls(window, is_causal):
    draft = tiny_draft(sliding_window=window, is_causal=is_causal)
    features, embeds, anchors = inputs(draft, [1, 5, 6, 19])
    together = run(draft, features, embeds, anchors)
    for n, anchor in enumerate(anchors[0].tolist()):
        alone = draft.run_block(embeds[:, n], features[:, :anchor], anchor, draft.new_cache())
        torch.testing.assert_close(together[:, n], alone[:, 1:], atol=2e-5, rtol=1e-4)


def oracle_forward(draft, features, embeds, anchors):
    """The draft's layers one by one, every query attending on its own."""
    visible, slots = anchors, torch.arange(embeds.shape[2])
    context = draft.project(features)
    ropes = Rope(torch.arange(context.shape[1]), draft.config, torch.float32)
    block_ropes = Rope(anchors[..., None] + slots, draft.config, torch.float32)
    x = embeds
    for index, layer in enumerate(draft.layers):
        normed, entered = layer.enter(x)
        parts = [layer.self_attn.queries(normed, block_ropes), *layer.self_attn.keys_values(context, ropes)]
        parts += layer.self_attn.keys_values(normed, block_ropes)
        x = layer.finish(x, oracle(*parts, visible, *draft.config.layer_attention(index)), entered)
    return draft.norm(x)[:, :, 1:]


@st.composite
def shapes(draw):
    """Every mixture of windows, causality and biases, as changes of a config."""
    kinds = draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=1, max_size=3))
    return {
        "num_hidden_layers": len(kinds),
        "layer_types": tuple(kinds),
        "sliding_window": draw(st.integers(1, 14)) if SLIDING in kinds else None,
        "is_causal": draw(st.sampled_from([None, True, False])),
        "attention_bias": draw(st.booleans()),
        "block_size": draw(st.integers(2, 5)),
    }


anchors_in_12 = st.integers(0, 12)
cuts_of_12 = st.sets(st.integers(1, 11), max_size=3)


@settings(max_examples=40)
@given(shape=shapes(), anchor=anchors_in_12, cuts=cuts_of_12)
def test_oracle_training_and_cached_decoding_agree(shape, anchor, cuts):
    check_agreement(tiny_draft(**shape), anchor, cuts)


def check_agreement(draft, anchor, cuts):
    """Compare the oracle, the pass of training, and decoding whose context comes in pieces that end at the cuts."""
    with torch.inference_mode():
        for name, parameter in draft.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
        features, embeds, anchors = inputs(draft, [anchor], 12)
        expected = oracle_forward(draft, features, embeds, anchors)
        torch.testing.assert_close(run(draft, features, embeds, anchors), expected, atol=2e-5, rtol=1e-4)
        cache = draft.new_cache()
        places = [0, *sorted(cut for cut in cuts if cut < anchor), anchor]
        for begin, end in pairwise(places):
            found = draft.run_block(embeds[:, 0], features[:, begin:end], end, cache)
    torch.testing.assert_close(found[None, :, 1:], expected, atol=2e-5, rtol=1e-4)
    for index, layer in enumerate(cache.layers):
        reach = draft.config.layer_attention(index)[0]
        assert layer.end - layer.begin == min(anchor, anchor if reach is None else reach - 1)


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("window", [13, 64])
def test_a_window_beyond_the_context_is_full_attention_bit_for_bit(is_causal, window):
    full = tiny_draft(is_causal=is_causal)
    windowed = tiny_draft(is_causal=is_causal, sliding_window=window)
    mixed = tiny_draft(is_causal=is_causal, sliding_window=window, layer_types=(SLIDING, FULL))
    features, embeds, anchors = inputs(full, [1, 5, 9])
    expected = run(full, features, embeds, anchors)
    for draft in (windowed, mixed):
        assert torch.equal(run(draft, features, embeds, anchors), expected)
        caches = draft.new_cache(), full.new_cache()
        for begin, end in ((0, 5), (5, 9)):
            found, same = (
                each.run_block(embeds[:, 0], features[:, begin:end], end, cache)
                for each, cache in zip((draft, full), caches, strict=True)
            )
            assert torch.equal(found, same)


def test_context_fed_in_parts_equals_context_fed_at_once():
    draft = tiny_draft()
    features, embeds, _ = inputs(draft, [11])
    once = draft.run_block(embeds[:, 0], features[:, :11], 11, draft.new_cache())
    cache = draft.new_cache()
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        parts = draft.run_block(embeds[:, 0], features[:, begin:end], end, cache)
    assert cache.length == 11
    torch.testing.assert_close(once, parts, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kinds", [(FULL, FULL), (SLIDING, SLIDING), (SLIDING, FULL)])
def test_the_cache_of_a_long_context_grows_and_moves(kinds):
    draft = tiny_draft(layer_types=kinds, sliding_window=9)
    features, embeds, _ = inputs(draft, [300], 300)
    cache, buffers = draft.new_cache(), set()
    with torch.inference_mode():
        for begin in range(0, 300, 4):
            parts = draft.run_block(embeds[:, 0], features[:, begin : begin + 4], begin + 4, cache)
            buffers.add(cache.layers[0].buffers_BGTE[0].data_ptr())
        once = draft.run_block(embeds[:, 0], features, 300, draft.new_cache())
    torch.testing.assert_close(parts, once, atol=2e-5, rtol=1e-4)
    assert len(buffers) > 1
    assert cache.layers[0].buffers_BGTE[0].shape[2] < (100 if kinds[0] == SLIDING else 450)


def test_a_block_sees_exactly_what_lies_before_its_anchor():
    draft = tiny_draft()
    features, embeds, anchors = inputs(draft, [5, 9])
    base = run(draft, features, embeds, anchors)
    after = features.clone()
    after[:, 5:] += 1
    assert torch.equal(run(draft, after, embeds, anchors)[:, 0], base[:, 0])
    before = features.clone()
    before[:, 4] += 1
    assert not torch.allclose(run(draft, before, embeds, anchors)[:, 0], base[:, 0])


def test_blocks_do_not_see_each_other_even_when_they_overlap():
    draft = tiny_draft()
    features, embeds, anchors = inputs(draft, [5, 6, 7])
    base = run(draft, features, embeds, anchors)
    other = embeds.clone()
    other[:, 1] += 1
    changed = run(draft, features, other, anchors)
    assert torch.equal(changed[:, [0, 2]], base[:, [0, 2]])
    assert not torch.allclose(changed[:, 1], base[:, 1])
    order = [2, 0, 1]
    torch.testing.assert_close(run(draft, features, embeds[:, order], anchors[:, order]), base[:, order])


def test_a_dropped_block_sees_only_itself_and_is_finite():
    draft = tiny_draft()
    features, embeds, anchors = inputs(draft, [5, 9])
    keep = torch.tensor([[True, False]])
    base = run(draft, features, embeds, anchors, keep)
    changed = run(draft, features + 1, embeds, anchors, keep)
    assert base.isfinite().all()
    assert torch.equal(base[:, 1], changed[:, 1])


def test_only_relative_positions_matter():
    draft = tiny_draft()
    features, embeds, _ = inputs(draft, [6])
    near = draft.run_block(embeds[:, 0], features[:, :6], 6, draft.new_cache())
    cache = draft.new_cache()
    cache.length = 100  # an empty cache that claims the context begins at position 100
    far = draft.run_block(embeds[:, 0], features[:, :6], 106, cache)
    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
    cache = draft.new_cache()
    cache.length = 100
    assert not torch.allclose(near, draft.run_block(embeds[:, 0], features[:, :6], 107, cache), atol=1e-4)


@pytest.mark.parametrize(
    "shape, params",
    [
        (dict(hidden_size=4096, intermediate_size=12288, num_attention_heads=32, num_key_value_heads=8), 1_048_626_432),
        (dict(hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_key_value_heads=8), 537_427_200),
    ],
)
def test_parameter_counts_are_those_of_the_published_drafts(shape, params):
    config = tiny_config(num_hidden_layers=5, head_dim=128, target_layer_ids=(1, 9, 17, 25, 33), **shape)
    with torch.device("meta"):
        draft = DFlashDraft(config)
    assert sum(p.numel() for p in draft.parameters()) == params
    assert len(draft.state_dict()) == 11 * 5 + 3


@pytest.mark.parametrize(
    "layers, ids",
    [
        (24, [1, 6, 11, 16, 21]),
        (28, [1, 7, 13, 19, 25]),
        (30, [1, 8, 14, 20, 27]),
        (32, [1, 8, 15, 22, 29]),
        (36, [1, 9, 17, 25, 33]),
        (64, [1, 16, 31, 46, 61]),
    ],
)
def test_layer_ids_round_half_to_even(layers, ids):
    assert layer_ids(layers, 5) == ids


def test_a_config_survives_its_published_form():
    config = tiny_config(sliding_window=6)
    assert DFlashConfig.from_json(config.to_json()) == config
    assert config.to_json()["architectures"] == ["DFlashDraftModel"]


@pytest.mark.parametrize("kinds", [(FULL, FULL), (SLIDING, SLIDING), (FULL, SLIDING)])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_causality_is_published_in_both_places(kinds, is_causal):
    window = 8 if SLIDING in kinds else None
    config = tiny_config(layer_types=kinds, is_causal=is_causal, sliding_window=window, attention_bias=True)
    published = config.to_json()
    assert DFlashConfig.from_json(published) == config
    default = None if len(set(kinds)) == 2 else kinds[0] == SLIDING
    expected = default if is_causal is None else is_causal
    assert published["is_causal"] is published["dflash_config"]["causal"] is expected
    assert published["use_sliding_window"] is (SLIDING in kinds)
