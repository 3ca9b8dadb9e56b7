"""The order: the same samples in the same order, on any number of workers."""

import numpy as np
import pytest

from llava_ray.data.loader.order import MixtureComponent, SampleOrder, draw_epoch_samples, shuffle
from llava_ray.errors import ConfigError


def make(num: int = 103, *, grouping: str = "none", batch_size: int = 8, seed: int = 5, **more):
    rng = np.random.default_rng(0)
    return SampleOrder(
        mixture=more.pop("mixture", (MixtureComponent(num),)),
        lengths=rng.integers(5, 500, num),
        has_images=rng.random(num) < 0.7,
        batch_size=batch_size,
        seed=seed,
        grouping=grouping,
        **more,
    )


def walk(order: SampleOrder, num_epochs: int = 1):
    position = order.start()
    while position.epoch < num_epochs:
        yield position
        position = order.advance(position)


GROUPINGS = ("none", "modality", "length")


@pytest.mark.parametrize("grouping", GROUPINGS)
def test_an_epoch_has_each_sample_once_and_every_epoch_its_own_order(grouping: str) -> None:
    order = make(grouping=grouping)
    first, second = order.order_epoch(0), order.order_epoch(1)
    assert sorted(first) == sorted(second) == list(range(103))
    assert first.tolist() != second.tolist()
    assert first.tolist() != list(range(103))
    assert first.tolist() == make(grouping=grouping).order_epoch(0).tolist()
    assert first.tolist() != make(grouping=grouping, seed=6).order_epoch(0).tolist()
    sizes = [len(order.batch(position)) for position in walk(order)]
    assert sizes == [8] * 12 + [7]


@pytest.mark.parametrize("grouping", GROUPINGS)
@pytest.mark.parametrize(("num_workers", "accumulation"), [(1, 1), (2, 1), (1, 4), (3, 2), (8, 1)])
def test_a_global_batch_has_the_same_samples_however_it_is_dealt(
    grouping: str, num_workers: int, accumulation: int
) -> None:
    order = make(grouping=grouping)
    for position in walk(order):
        split = order.split_batch(position, num_workers=num_workers, accumulation=accumulation)
        assert [len(micros) for micros in split] == [accumulation] * num_workers
        numbers = [n for micros in split for micro in micros for n in micro]
        assert sorted(numbers) == sorted(order.batch(position))
        sizes = [len(micro) for micros in split for micro in micros]
        assert max(sizes) - min(sizes) <= 1


def test_the_order_is_this_one_in_every_version() -> None:
    assert shuffle(np.arange(10), 1, 2).tolist() == [1, 3, 7, 9, 2, 8, 6, 4, 5, 0]


def test_batches_have_one_modality_but_for_the_last_of_an_epoch() -> None:
    order = make(grouping="modality")
    kinds = [set(order.has_images[order.batch(position)].tolist()) for position in walk(order)]
    assert all(len(kind) == 1 for kind in kinds[:-2])
    assert {True} in kinds
    assert {False} in kinds


def test_grouping_by_length_leaves_less_padding() -> None:
    orders = {grouping: make(4000, grouping=grouping, batch_size=32) for grouping in GROUPINGS}
    waste = {name: order.measure_padding(num_workers=4) for name, order in orders.items()}
    assert waste["length"] < waste["none"] / 4
    assert waste["none"] < orders["none"].measure_padding() < 0.6


def test_training_goes_on_where_it_stopped_and_only_with_the_same_data() -> None:
    order = make()
    positions = list(walk(order, 2))
    assert len(positions) == 2 * order.num_batches
    assert positions[13].epoch == 1
    order.check(positions[13])
    saved = tuple(int(number) for number in positions[13])
    order.check(type(positions[13])(*saved))
    for other in (
        make(seed=6),
        make(batch_size=16),
        make(data_id="other"),
        make(grouping="length"),
    ):
        with pytest.raises(ConfigError, match="was saved with other data"):
            other.check(positions[13])


def test_a_mixture_has_each_data_set_as_often_as_it_is_due() -> None:
    mixture = (
        MixtureComponent(10),
        MixtureComponent(20, weight=2.5),
        MixtureComponent(30, max_samples=7, seed=3),
    )
    drawn = [draw_epoch_samples(mixture, epoch) for epoch in (0, 1)]
    for members in drawn:
        counts = np.bincount(members, minlength=60)
        assert counts[:10].tolist() == [1] * 10
        assert sorted(counts[10:30]) == [2] * 10 + [3] * 10
        assert sorted(counts[30:]) == [0] * 23 + [1] * 7
    halves = [set(np.flatnonzero(np.bincount(members)[10:30] == 3)) for members in drawn]
    assert halves[0] != halves[1], "another part each epoch"
    chosen = [set(members[members >= 30]) for members in drawn]
    assert chosen[0] == chosen[1], "the same ones each epoch"
    order = make(60, mixture=mixture)
    numbers = [n for position in walk(order) for n in order.batch(position)]
    assert sorted(numbers) == sorted(drawn[0])


def test_positions_of_earlier_versions_still_belong_to_their_order() -> None:
    entries = (MixtureComponent(10), MixtureComponent(20, weight=2.5, max_samples=7, seed=3))
    order = make(30, mixture=entries, data_id="abc", grouping="length")
    assert order.start() == (5, 0, 0, 265883216532906)
