from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data import coco
from vitzoo.data import DetectionData, UserError
from vitzoo.data.coco import VOC_CLASSES, read_coco
from vitzoo.data.detection import Augment
from vitzoo.data.scenes import SHAPES, label_map, render


@pytest.fixture
def year(tmp_path):
    return coco.write(tmp_path / "coco")


def data(root, stage="fit", **kwargs):
    found = DetectionData(str(root), **{"batch_size": 1, "num_workers": 0, "hflip": 0.0, **kwargs})
    found.setup(stage)
    return found


def test_scenes_are_the_same_everywhere_and_held_out_ones_are_others():
    one, again = render(3, 64), render(3, 64)
    assert np.array_equal(one.image, again.image)
    assert (int(one.image.astype(np.int64).sum()), one.labels.tolist()) == (1624508, [4, 2, 1, 1])
    found = data("scenes", train_scenes=3, val_scenes=3, scene_size=64)
    train, val = ({found.sets[s].records[i].picture.tobytes() for i in range(3)} for s in ("train", "val"))
    assert not train & val
    assert found.classes == list(SHAPES)


def test_a_scene_s_boxes_enclose_its_masks_and_its_label_map_is_their_union():
    for number in range(8):
        scene = render(number, 96)
        for box, mask in zip(scene.boxes, scene.masks, strict=True):
            rows, cols = np.nonzero(mask)
            assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]
        assert scene.masks.sum(0).max() == 1  # no overlaps
        assert set(np.unique(label_map(scene))) == {0, *scene.labels.tolist()}


def test_labels_follow_the_order_of_the_category_ids(year):
    names, records = read_coco(year / "annotations/instances_val2017.json", year / "val2017")
    assert names == ["cat", "dog"]
    assert [r.number for r in records] == [10, 20, 30, 40]
    assert records[0].objects.labels == [1, 2]
    assert records[0].objects.boxes[0] == (10, 10, 50, 40)


def test_crowds_and_boxes_without_area_are_not_trained_on_and_are_evaluated(year):
    found = data(year, masks=True)
    train, val = found.sets["train"], found.sets["val"]
    assert [r.number for r in train.records] == [10, 20]  # the others hold nothing to learn from
    assert train[1][1]["labels"].tolist() == [2]
    assert "iscrowd" not in train[1][1]
    target = val[1][1]
    assert target["iscrowd"].tolist() == [1, 0, 0]
    assert target["area"].tolist() == [2400, 0, 900]
    assert target["boxes"].tolist()[1] == [30, 20, 30, 30]
    assert [len(val[i][1]["boxes"]) for i in range(4)] == [2, 3, 1, 0]
    assert val[3][1]["masks"].shape == (0, 90, 80)
    assert len(data(year, skip_empty=False).sets["train"]) == 4


def test_masks_are_what_pycocotools_decodes(year):
    from pycocotools.coco import COCO

    known = COCO(str(year / "annotations/instances_val2017.json"))
    val = data(year, masks=True).sets["val"]
    image, target = val[1]
    assert image.shape == (3, 70, 80)
    for mask, number in zip(target["masks"], (3, 4, 5), strict=True):
        assert np.array_equal(mask.numpy(), known.annToMask(known.anns[number]).astype(bool))
    assert target["masks"][0].sum() == 60 * 40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("categories"), "no list 'categories'"),
        (lambda c: c.update(images={"id": 1}), "no list 'images'"),
        (lambda c: c["annotations"][0].update(category_id=99), "annotation 1 has category_id 99"),
        (lambda c: c["annotations"][1].pop("bbox"), "annotation 2 lacks 'bbox'"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, 3]), "four numbers"),
        (lambda c: c["annotations"][1].update(bbox=[1, 2, None, 3]), "four numbers"),
        (lambda c: c["images"][0].pop("height"), "lacks 'height'"),
        (lambda c: c["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "at least three points"),
        (lambda c: c["annotations"][0].update(segmentation=None), "annotation 1.*no segmentation"),
        (lambda c: c["annotations"][2]["segmentation"].update(size=[5, 5]), "its size is"),
        (lambda c: c["images"][0].update(width=81), "60x80 pixels and its annotation says 60x81"),
    ],
)
def test_what_is_wrong_in_an_annotation_file_is_one_sentence(tmp_path, change, words):
    found = coco.content()
    change(found)
    coco.write(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"annotations/instances_{split}2017.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=words) as caught:
        list(map(data(tmp_path, masks=True).sets["val"].__getitem__, range(4)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2", "not json", '{"images": []'])
def test_a_file_that_does_not_parse_is_named(year, text):
    (year / "annotations/instances_val2017.json").write_text(text)
    with pytest.raises(UserError, match=r"instances_val2017.json is no JSON file"):
        data(year)


def test_what_is_not_there_is_named(tmp_path, year):
    with pytest.raises(UserError, match="no directory"):
        DetectionData(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"instances_val2017.json does not exist"):
        DetectionData(str(tmp_path))
    (year / "val2017/0.jpg").unlink()
    with pytest.raises(UserError, match=r"0\.jpg cannot be read"):
        data(year).sets["val"][0]
    with pytest.raises(UserError, match="batch_size is 50"):
        data(year, batch_size=50)


def test_flips_turn_picture_boxes_and_masks_alike():
    scene = render(1, 64)
    image = torch.from_numpy(scene.image).permute(2, 0, 1)
    target = {
        "boxes": torch.from_numpy(scene.boxes),
        "labels": torch.from_numpy(scene.labels),
        "masks": torch.from_numpy(scene.masks),
    }
    turned, found = Augment(hflip=1.0, vflip=1.0)(image, target)
    assert torch.equal(turned, image.flip(-1, -2) / 255)
    for box, mask in zip(found["boxes"], found["masks"], strict=True):
        rows, cols = mask.nonzero(as_tuple=True)
        assert box.tolist() == [cols.min(), rows.min(), cols.max() + 1, rows.max() + 1]


def test_jitter_keeps_boxes_inside_and_drops_what_is_cut_away():
    for number in range(20):
        torch.manual_seed(number)
        scene = render(number, 64)
        target = {
            "boxes": torch.from_numpy(scene.boxes),
            "labels": torch.from_numpy(scene.labels),
            "masks": torch.from_numpy(scene.masks),
        }
        image, found = Augment(scale=[0.5, 3.0], crop=64, photometric=True)(
            torch.from_numpy(scene.image).permute(2, 0, 1), target
        )
        boxes = found["boxes"]
        assert max(image.shape[-2:]) <= 64
        assert len(boxes) == len(found["labels"]) == len(found["masks"])
        assert ((boxes[:, 2:] > boxes[:, :2]).all(-1)).all()
        assert (boxes[:, 0::2] <= image.shape[-1]).all()
        assert (boxes[:, 1::2] <= image.shape[-2]).all()


def test_augmentation_is_a_function_of_seed_and_index():
    train = data("scenes", train_scenes=2, val_scenes=1, hflip=0.5, scene_size=64).sets["train"]
    assert torch.equal(train[(0, 5)][0], train[(0, 5)][0])
    assert len({train[(0, seed)][0].sum(0).argmax().item() for seed in range(12)}) > 1


VOC = """<annotation><object><name>cat</name><difficult>0</difficult><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax>
<ymax>40</ymax></bndbox></object><object><name>dog</name><difficult>1</difficult><bndbox><xmin>5</xmin><ymin>5</ymin>
<xmax>10</xmax><ymax>10</ymax></bndbox></object></annotation>"""


@pytest.fixture
def voc(tmp_path):
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (tmp_path / folder).mkdir(parents=True)
    for split in ("train", "val"):
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text("a\n")
    (tmp_path / "Annotations/a.xml").write_text(VOC)
    Image.new("RGB", (60, 50)).save(tmp_path / "JPEGImages/a.jpg")
    return tmp_path


def test_voc_counts_pixels_from_one_and_difficult_objects_are_crowds(voc):
    found = data(voc)
    assert found.classes == list(VOC_CLASSES)
    _, target = found.sets["val"][0]
    assert target["boxes"].tolist() == [[0, 1, 30, 40], [4, 4, 10, 10]]
    assert target["iscrowd"].tolist() == [0, 1]
    assert found.sets["train"][0][1]["labels"].tolist() == [8]
    with pytest.raises(UserError, match="no instance masks"):
        DetectionData(str(voc), masks=True)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [("cat", "unicorn", "'unicorn'"), ("<xmax>30</xmax>", "", "whole box"), ("</annotation>", "", "cannot be read")],
)
def test_what_is_wrong_in_a_voc_annotation_is_named(voc, old, new, words):
    (voc / "Annotations/a.xml").write_text(VOC.replace(old, new, 1))
    with pytest.raises(UserError, match=words):
        data(voc)
