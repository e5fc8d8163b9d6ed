"""Which rows meet in a step: all once an epoch, alike in length, and by nothing but seed, epoch and id."""

import random

from hypothesis import given
from hypothesis import strategies as st

from dllm.training.order import POOL, Order, derive_seed, micro_batches
from dllm.training.strategy import Rows


def rows(number: int) -> Rows:
    return Rows([f"row-{i}" for i in range(number)], [1 + derive_seed(i) % 200 for i in range(number)])


@given(number=st.integers(1, 400), batch=st.integers(1, 40), epoch=st.integers(0, 3))
def test_an_epoch_visits_every_row_once_in_steps_of_even_size(number, batch, epoch) -> None:
    order = Order(rows(number), batch, seed=3)
    steps = [order.step_rows(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
    assert sorted(row for step in steps for row in step) == list(range(number))
    assert max(map(len, steps)) <= batch
    assert max(map(len, steps)) - min(map(len, steps)) <= 1


@given(count=st.integers(0, 64), batch=st.integers(1, 5), world=st.integers(1, 4))
def test_ranks_share_rows_without_loss_or_overlap(count, batch, world) -> None:
    shares = [micro_batches(range(count), batch, rank, world) for rank in range(world)]
    assert sorted(row for share in shares for part in share for row in part) == list(range(count))
    assert all(0 < len(part) <= batch for share in shares for part in share)


def test_order_follows_from_seed_and_epoch_alone() -> None:
    one, same, other = Order(rows(100), 8, 0), Order(rows(100), 8, 0), Order(rows(100), 8, 1)
    late = same.step_rows(20)
    assert late == one.step_rows(20)
    assert one.step_rows(0) == same.step_rows(0) != other.step_rows(0)
    epochs = [{frozenset(one.step_rows(13 * epoch + i)) for i in range(13)} for epoch in range(2)]
    assert len(epochs[0] & epochs[1]) <= 2  # other company each time


def test_rows_mean_the_same_wherever_they_stand_in_the_list() -> None:
    plain = rows(100)
    places = list(range(100))
    random.Random(0).shuffle(places)
    shuffled = Rows([plain.ids[p] for p in places], [plain.lengths[p] for p in places])
    for step in range(13):
        left = {plain.ids[row] for row in Order(plain, 8, 0).step_rows(step)}
        assert left == {shuffled.ids[row] for row in Order(shuffled, 8, 0).step_rows(step)}


def test_like_lengths_meet_so_that_little_is_padding() -> None:
    many = rows(8 * POOL * 4)
    order = Order(many, 8, 0)
    steps = [order.step_rows(i) for i in range(order.steps_per_epoch)]
    padded = sum(len(step) * max(many.lengths[row] for row in step) for step in steps)
    assert padded < 1.15 * sum(many.lengths)
    assert [many.lengths[step[0]] for step in steps] != sorted(many.lengths[step[0]] for step in steps)
