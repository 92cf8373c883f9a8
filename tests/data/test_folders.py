from __future__ import annotations

import shutil

import pytest

from vitzoo.data.errors import UserError
from vitzoo.data.folders import find_splits


def test_labels_are_the_training_folders_in_natural_order_for_every_split(folder):
    shutil.rmtree(folder / "val" / "cat 2")  # a class without held-out pictures shifts no label
    classes, splits = find_splits(str(folder))
    assert classes == ["cat 2", "cat 10", "dog"]
    assert len(splits["train"]) == 12
    assert {(path.split("/")[-2], label) for path, label in splits["val"]} == {("cat 10", 1), ("dog", 2)}
    assert splits["test"] == splits["val"]


def test_a_single_root_holds_out_a_fixed_part_of_each_class(folder):
    classes, splits = find_splits(str(folder / "train"), val_fraction=0.25)
    assert classes == ["cat 2", "cat 10", "dog"]
    assert [label for _, label in splits["val"]] == [0, 1, 2]
    assert not set(splits["train"]) & set(splits["val"])
    assert len(splits["train"]) == 9
    assert find_splits(str(folder / "train"), val_fraction=0.25)[1] == splits


def test_a_test_folder_with_classes_is_its_own_split(folder):
    shutil.copytree(folder / "val", folder / "test")
    assert all("/test/" in path for path, _ in find_splits(str(folder))[1]["test"])


def empty_class(folder):
    (folder / "train" / "bird").mkdir()
    return ["bird", "holds no picture", "remove it"]


def unknown_class(folder):
    (folder / "val" / "dog").rename(folder / "val" / "dogs")
    return ["'dogs'", "val", "train", "Rename"]


def no_val(folder):
    shutil.rmtree(folder / "val")
    return ["no val/", "--data.root"]


def one_class(folder):
    shutil.rmtree(folder / "train" / "dog")
    shutil.rmtree(folder / "train" / "cat 2")
    return ["1 class folders", "at least 2"]


def nothing(folder):
    shutil.rmtree(folder)
    return ["no directory", "digits"]


@pytest.mark.parametrize("damage", [empty_class, unknown_class, no_val, one_class, nothing])
def test_a_wrong_directory_is_one_sentence_with_both_sides_and_the_way_out(folder, damage):
    words = damage(folder)
    with pytest.raises(UserError) as caught:
        find_splits(str(folder))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_class_of_one_picture_cannot_be_divided(folder):
    for i in range(1, 4):
        (folder / "train" / "dog" / f"{i}.png").unlink()
    with pytest.raises(UserError, match="one picture"):
        find_splits(str(folder / "train"))
