from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from vitzoo.data.batches import StepBatches, mix, reseed


def indices(batches):
    return [[index for index, *_ in batch] for batch in batches]


def flat(lists):
    return [item for part in lists for item in part]


def test_an_epoch_started_in_the_middle_is_the_rest_of_the_whole_one():
    whole, rest = StepBatches(53, 8, seed=3), StepBatches(53, 8, seed=3, position=(2, 4))
    whole.set_epoch(2)
    rest.set_epoch(2)  # as Lightning does on resume
    assert list(rest) == list(whole)[4:]
    assert len(rest) == len(whole) == 6


def test_the_part_left_out_is_left_out_once_and_in_its_epoch_only():
    batches = StepBatches(53, 8, seed=3, position=(2, 4))
    assert len(list(batches)) == 2
    batches.set_epoch(3)
    assert len(list(batches)) == 6


def test_an_iterator_made_twice_for_an_epoch_serves_the_same():
    batches = StepBatches(53, 8, seed=3, position=(2, 4))
    assert list(batches) == list(batches)


def test_every_picture_comes_at_most_once_an_epoch_and_epochs_differ():
    batches = StepBatches(53, 8, seed=3)
    first = flat(indices(batches))
    batches.set_epoch(1)
    second = flat(indices(batches))
    assert len(set(first)) == len(first) == 48
    assert first != second


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(world):
    alone = indices(StepBatches(50, 12, seed=1))
    parts = [indices(StepBatches(50, 12, seed=1, rank=rank, world=world)) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert sorted(flat(part[step] for part in parts)) == sorted(batch)


def test_seeds_depend_on_every_part_and_not_on_the_process():
    assert mix(0, "image", 1, 2) == 9058390921927425197  # the same on every machine: a resumed run may move
    assert len({mix(0, "image", e, i) for e in range(30) for i in range(30)}) == 900
    assert 0 <= mix(5) < 2**63


def test_reseed_reaches_all_three_generators():
    drawn = []
    for devices in (False, True):  # the same numbers on the CPU, whoever is seeded beside it
        reseed(mix(7), devices=devices)
        drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))
    assert drawn[0] == drawn[1]


def test_repeated_augmentation_gives_copies_of_a_picture_seeds_of_their_own_and_processes_of_their_own():
    batches = list(StepBatches(50, 12, seed=1, repeats=3))
    assert len(batches) == 4
    assert indices(batches)[0] == [i for i in indices(batches)[0][::3] for _ in range(3)]
    assert len({seed for batch in batches for _, seed, _ in batch}) == 48
    assert len({index for batch in batches for index, *_ in batch}) == 16
    apart = list(StepBatches(50, 12, seed=1, repeats=3, rank=1, world=3))
    assert indices(apart)[0] == indices(batches)[0][1::3]
    once = list(StepBatches(50, 12, seed=1))
    assert {item[:2] for item in once[0]} >= {item[:2] for item in batches[0][::3]}  # the first copy is drawn as without


def test_a_size_belongs_to_a_batch_and_progresses_with_the_epochs():
    drawn = StepBatches(53, 8, seed=3, sizes=(32, 48))
    found = [{size for *_, size in batch} for epoch in range(4) for batch in drawn._batches(epoch, 0)]
    assert {len(sizes) for sizes in found} == {1}
    assert set().union(*found) == {32, 48}
    growing = StepBatches(53, 8, seed=3, sizes=(32, 48, 64), epochs=7)
    assert [growing._size(epoch, 0) for epoch in range(7)] == [32, 32, 32, 48, 48, 64, 64]
