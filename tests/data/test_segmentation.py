from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vitzoo.data import SegmentationData, UserError
from vitzoo.data.segmentation import CITYSCAPES_CLASSES, IGNORE, Augment

PLAIN = {"mean": [0.0] * 3, "std": [1.0] * 3}


def picture(path, size=(40, 50)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (*size, 3), dtype=np.uint8)).save(path)


def mask(path, values, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8))
    if palette:
        image = image.convert("P")
        image.putpalette(list(range(256)) * 3)
    image.save(path)


def values(*present, size=(40, 50)):
    found = np.full(size, present[0], np.uint8)
    for i, value in enumerate(present):
        found[4 * i : 4 * i + 4] = value
    return found


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / f"images/{split}/a/x.jpg")
        mask(tmp_path / f"masks/{split}/a/x.png", values(0, 1, 2, IGNORE))
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    return tmp_path


def data(root, **kwargs):
    found = SegmentationData(str(root), **{"batch_size": 1, "num_workers": 0, "crop": 32, **kwargs})
    found.setup("fit")
    return found


def test_a_folder_of_masks_keeps_what_has_no_class(folder):
    found = data(folder)
    assert found.classes == ["sky", "sea", "land"]
    image, labels = found.sets["val"][0]
    assert image.shape == (3, 40, 50)
    assert labels.unique().tolist() == [0, 1, 2, IGNORE]


def test_ade20k_s_zero_is_no_class(tmp_path):
    for split in ("training", "validation"):
        picture(tmp_path / f"images/{split}/x.jpg")
        mask(tmp_path / f"annotations/{split}/x.png", values(0, 1, 150))
    found = data(tmp_path)
    assert found.num_classes == 150
    assert found.sets["val"][0][1].unique().tolist() == [0, 149, IGNORE]


def test_cityscapes_ids_become_the_nineteen_classes(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / f"leftImg8bit/{split}/aachen/a_0_leftImg8bit.png")
        mask(tmp_path / f"gtFine/{split}/aachen/a_0_gtFine_labelIds.png", values(0, 7, 8, 33, 9))
    found = data(tmp_path)
    assert found.classes == list(CITYSCAPES_CLASSES)
    assert found.sets["val"][0][1].unique().tolist() == [0, 1, 18, IGNORE]


def test_voc_s_palette_is_read_as_values(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "ImageSets/Segmentation").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/Segmentation/{split}.txt").write_text("a\n")
    picture(tmp_path / "JPEGImages/a.jpg")
    mask(tmp_path / "SegmentationClass/a.png", values(0, 20, 255), palette=True)
    found = data(tmp_path)
    assert found.classes[20] == "tvmonitor"
    assert found.sets["val"][0][1].unique().tolist() == [0, 20, IGNORE]


def test_an_unknown_value_is_named_with_its_file(folder):
    mask(folder / "masks/val/a/x.png", values(0, 3))
    with pytest.raises(UserError, match=r"x\.png holds the value 3, and the 3 classes"):
        data(folder).sets["val"][0]


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: (f / "masks/val/a/x.png").unlink(), r"x\.jpg has no mask"),
        (lambda f: (f / "masks/val/a/x.png").write_bytes(b"no"), "cannot be read as a mask"),
        (lambda f: picture(f / "masks/val/a/x.png"), "3 channels; a mask has one value"),
        (lambda f: mask(f / "masks/val/a/x.png", values(0, size=(20, 50))), "40x50 pixels and its mask 20x50"),
        (lambda f: (f / "classes.txt").unlink(), "have no names"),
        (lambda f: (f / "images/val/a/x.jpg").unlink(), "holds no picture"),
        (lambda f: (f / "images/val/a/x.jpg").write_bytes(b""), "cannot be read as a picture"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        data(folder).sets["val"][0]


def test_a_directory_of_something_else_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"--data\.format"):
        SegmentationData(str(tmp_path))
    with pytest.raises(UserError, match="no directory"):
        SegmentationData(str(tmp_path / "none"))


def augment(**kwargs):
    settings = {
        "size": None,
        "scale": [1.0, 1.0],
        "crop": 32,
        "hflip": 0.0,
        "vflip": 0.0,
        "transpose": 0.0,
        "photometric": False,
    }
    return Augment(**{**settings, **PLAIN, **kwargs})


def test_small_pictures_are_padded_with_no_class():
    image, labels = augment(crop=64)(torch.full((3, 40, 50), 255, dtype=torch.uint8), torch.ones(40, 50, dtype=torch.int64))
    assert image.shape == (3, 64, 64)
    assert labels[:40, :50].eq(1).all()
    assert (labels == 1).sum() == 40 * 50
    assert (labels == IGNORE).sum() == 64 * 64 - 40 * 50
    assert image[:, 40:].abs().max() == 0


@pytest.mark.parametrize("settings", [{"hflip": 1.0}, {"vflip": 1.0}, {"transpose": 1.0}, {"scale": [0.5, 2.0]}])
def test_picture_and_labels_stay_together(settings):
    labels = torch.zeros(128, 128, dtype=torch.int64)
    labels[16:60, 24:116] = 1
    image = (labels * 255).to(torch.uint8).expand(3, -1, -1)
    for seed in range(5):
        torch.manual_seed(seed)
        turned, found = augment(crop=128, **settings)(image, labels)
        known = found != IGNORE
        assert ((turned[0] > 0.5) == (found == 1))[known].float().mean() > 0.97
        assert found.eq(1).any()


def test_a_crop_that_one_class_fills_is_drawn_again():
    labels = torch.zeros(200, 200, dtype=torch.int64)
    labels[:, 100:] = 1
    shares = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, found = augment(crop=40)(torch.zeros(3, 200, 200, dtype=torch.uint8), labels)
        shares.append(found.float().mean().item())
    mixed = sum(0.25 < share < 0.75 for share in shares)
    assert mixed > 30  # a tenth without drawing again


def test_evaluation_resizes_the_picture_and_leaves_the_labels(folder):
    image, labels = data(folder, size=60, longest=70).sets["val"][0]
    assert image.shape == (3, 56, 70)
    assert labels.shape == (40, 50)
    assert labels.max() == IGNORE
