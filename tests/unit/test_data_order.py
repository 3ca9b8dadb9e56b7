"""The plan: the same samples in the same order, on any number of workers."""

import numpy as np
import pytest

from llava_ray.data.loader.order import Plan, Share, draw_members, shuffle
from llava_ray.errors import ConfigError


def make(num: int = 103, *, grouping: str = "none", batch_size: int = 8, seed: int = 5, **more):
    rng = np.random.default_rng(0)
    return Plan(
        shares=more.pop("shares", (Share(num),)),
        lengths=rng.integers(5, 500, num),
        has_images=rng.random(num) < 0.7,
        batch_size=batch_size,
        seed=seed,
        grouping=grouping,
        **more,
    )


def walk(plan: Plan, num_epochs: int = 1):
    position = plan.start()
    while position.epoch < num_epochs:
        yield position
        position = plan.advance(position)


GROUPINGS = ("none", "modality", "length")


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_an_epoch_has_each_sample_once_and_every_epoch_its_own_order(grouping: str) -> None:
    plan = make(grouping=grouping)
    first, second = plan.order_epoch(0), plan.order_epoch(1)
    assert sorted(first) == sorted(second) == list(range(103))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(103))
    assert first.tolist() == make(grouping=grouping).order_epoch(0).tolist()
    assert first.tolist() != make(grouping=grouping, seed=6).order_epoch(0).tolist()
    sizes = [len(plan.batch(position)) for position in walk(plan)]
    assert sizes == [8] * 12 + [7]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("num_workers", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2), (8, 1)])
def test_a_global_batch_has_the_same_samples_however_it_is_dealt(
    grouping: str, num_workers: int, accumulation: int
) -> None:
    plan = make(grouping=grouping)
    for position in walk(plan):
        dealt = plan.deal(position, num_workers=num_workers, accumulation=accumulation)
        assert [len(micros) for micros in dealt] == [accumulation] * num_workers
        numbers = [n for micros in dealt for micro in micros for n in micro]
        assert sorted(numbers) == sorted(plan.batch(position))
        sizes = [len(micro) for micros in dealt for micro in micros]
        assert max(sizes) - min(sizes) <= 1


def test_the_order_is_this_one_in_every_version() -> None:
    assert shuffle(np.arange(10), 1, 2).tolist() == [1, 3, 7, 9, 2, 8, 6, 4, 5, 0]


def test_batches_have_one_modality_but_for_the_last_of_an_epoch() -> None:
    plan = make(grouping="modality")
    kinds = [set(plan.has_images[plan.batch(position)].tolist()) for position in walk(plan)]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {True} in kinds
    assert {False} in kinds


def test_grouping_by_length_leaves_less_padding() -> None:
    plans = {grouping: make(4000, grouping=grouping, batch_size=32) for grouping in GROUPINGS}
    waste = {name: plan.measure_padding(num_workers=4) for name, plan in plans.items()}
    assert waste["length"] < waste["none"] / 4
    assert waste["none"] < plans["none"].measure_padding() < 0.6


def test_training_goes_on_where_it_stopped_and_only_with_the_same_data() -> None:
    plan = make()
    positions = list(walk(plan, 2))
    assert len(positions) == 2 * plan.num_batches
    assert positions[13].epoch == 1
    plan.check(positions[13])
    saved = tuple(int(number) for number in positions[13])
    plan.check(type(positions[13])(*saved))
    for other in (
        make(seed=6),
        make(batch_size=16),
        make(data_id="other"),
        make(grouping="length"),
    ):
        with pytest.raises(ConfigError, match="was saved with other data"):
            other.check(positions[13])


def test_a_mixture_has_each_data_set_as_often_as_it_is_due() -> None:
    shares = (Share(10), Share(20, weight=2.5), Share(30, max_samples=7, seed=3))
    drawn = [draw_members(shares, epoch) for epoch in (0, 1)]
    for members in drawn:
        counts = np.bincount(members, minlength=60)
        assert counts[:10].tolist() == [1] * 10
        assert sorted(counts[10:30]) == [2] * 10 + [3] * 10
        assert sorted(counts[30:]) == [0] * 23 + [1] * 7
    halves = [set(np.flatnonzero(np.bincount(members)[10:30] == 3)) for members in drawn]
    assert halves[0] != halves[1], "another part each epoch"
    chosen = [set(members[members >= 30]) for members in drawn]
    assert chosen[0] == chosen[1], "the same ones each epoch"
    plan = make(60, shares=shares)
    numbers = [n for position in walk(plan) for n in plan.batch(position)]
    assert sorted(numbers) == sorted(drawn[0])
