from __future__ import annotations

import pytest
import torch

from vitzoo.data import ImageData, UserError
from vitzoo.data.images import list_images


def small(folder, **kwargs):
    data = ImageData(str(folder), **{"batch_size": 4, "num_workers": 0, "img_size": 32, **kwargs})
    data.setup("fit")
    return data


def test_classes_are_known_before_any_setup(folder):
    assert ImageData().num_classes == 10
    assert ImageData(str(folder)).classes == ["cat 2", "cat 10", "dog"]


def test_evaluation_sees_every_picture_once_where_the_batch_does_not_divide(folder):
    batches = list(small(folder).val_dataloader())
    assert [len(labels) for _, labels in batches] == [4, 2]
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1, 2, 2]


def test_training_batches_are_the_same_with_any_number_of_workers(folder):
    alone, helped = (small(folder, num_workers=n, auto_augment="rand-m9-mstd0.5-inc1") for n in (0, 2))
    for (a, x), (b, y) in zip(alone.train_dataloader(), helped.train_dataloader(), strict=True):
        assert a.equal(b)
        assert x.equal(y)


def test_a_batch_larger_than_the_training_set_is_refused(folder):
    with pytest.raises(UserError, match=r"batch_size is 13.*only 12 training pictures.*--data.batch_size 3"):
        small(folder, batch_size=13)


def test_a_checkpoint_of_other_epochs_is_refused(folder):
    data = small(folder)
    data.load_state_dict({"epoch": 1, "batch": 1, "batches": 5})
    with pytest.raises(UserError, match=r"epochs of 5 steps.*now there are 3"):
        data.train_dataloader()


def test_a_loaded_position_starts_there(folder):
    whole = list(small(folder).train_dataloader())
    data = small(folder)
    data.load_state_dict({"epoch": 0, "batch": 1, "batches": 3})
    rest = list(data.train_dataloader())
    assert len(rest) == 2
    assert rest[0][0].equal(whole[1][0])


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_files_are_counted_across_workers_and_named_at_the_end(folder, workers):
    path = list_images(folder / "train")[0]
    with open(path, "wb") as file:
        file.write(b"no picture")
    data = small(folder, skip_corrupt=True, num_workers=workers)
    assert sum(len(labels) for _, labels in data.train_dataloader()) == 12
    with pytest.warns(UserWarning, match="1 of 12 train pictures could not be read and were replaced by others") as caught:
        data.teardown()
    assert path in str(caught[0].message)


def test_predict_without_pictures_says_what_to_give(folder, tmp_path):
    with pytest.raises(UserError, match=r"--data\.predict FOLDER"):
        ImageData(str(folder)).setup("predict")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="no picture was found"):
        ImageData(str(folder), predict=str(tmp_path / "none")).setup("predict")
