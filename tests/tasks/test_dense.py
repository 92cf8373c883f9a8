"""Detection and segmentation: figures against pycocotools and by hand, training options, odd batches."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassJaccardIndex

from tests.data import coco
from vitzoo.data import DetectionData, UserError
from vitzoo.heads.maps import parameter_layers
from vitzoo.tasks import Detection, Segmentation
from vitzoo.tasks.detection import _merge, _mirror, mean_average_precision
from vitzoo.tasks.draw import colour, draw_boxes, draw_classes, sheet
from vitzoo.tasks.losses import dice_loss
from vitzoo.tasks.optim import build_optimizer, build_schedule, dense_groups
from vitzoo.tasks.segmentation import IGNORE, scores, slide

SMALL = {"channels": 64, "extra": 1, "head_convs": 1, "min_size": [64], "max_size": 96}


def detection(kind="fcos", **kwargs):
    return Detection("nat_micro", 2, kind=kind, **{**SMALL, **kwargs})


def segmentation(**kwargs):
    return Segmentation("nat_micro", 3, **{"kind": "fpn", "channels": 64, **kwargs})


# -- figures ------------------------------------------------------------------------------------------------------------


def test_average_precision_of_a_case_counted_by_hand():
    """Two objects, found: one exactly (0.9), nothing (0.8). Recall reaches a half at precision 1: 51 of 101 points."""
    metric = mean_average_precision(masks=False)
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10], [50, 50, 90, 90]]), "labels": torch.tensor([1, 1])}
    said = {"boxes": torch.tensor([[0.0, 0, 10, 10], [200, 0, 230, 30]]), "labels": torch.tensor([1, 1])}
    metric.update([{**said, "scores": torch.tensor([0.9, 0.8])}], [truth])
    assert float(metric.compute()["map"]) == pytest.approx(51 / 101, abs=1e-6)


def test_average_precision_at_the_thresholds_an_overlap_reaches():
    """One object, found with an overlap of 0.7: right at 0.5 to 0.7 (five of ten thresholds), wrong above."""
    metric = mean_average_precision(masks=False)
    truth = {"boxes": torch.tensor([[0.0, 0, 100, 100]]), "labels": torch.tensor([1])}
    said = {"boxes": torch.tensor([[0.0, 0, 100, 70.2]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.9])}
    metric.update([said], [truth])
    found = metric.compute()
    assert float(found["map"]) == pytest.approx(0.5, abs=1e-6)
    assert (float(found["map_50"]), float(found["map_75"])) == (1.0, 0.0)


@pytest.mark.parametrize("world", [2, 3, 7])
def test_figures_of_several_processes_are_those_of_one(world, monkeypatch):
    """Five pictures dealt to the processes in turn, so that some have more than others, and the last ones none."""
    draw = torch.Generator().manual_seed(0)
    pictures = []
    for count in (2, 0, 3, 1, 2):
        corner = 60 * torch.rand(count, 2, generator=draw)
        boxes = torch.cat([corner, corner + 5 + 20 * torch.rand(count, 2, generator=draw)], dim=1)
        masks = torch.rand(count, 90, 90, generator=draw) > 0.5
        truth = {"boxes": boxes, "labels": torch.randint(1, 3, (count,), generator=draw), "masks": masks}
        moved = boxes + 3 * torch.rand(count, 4, generator=draw)
        pictures.append(({**truth, "boxes": moved, "scores": torch.rand(count, generator=draw).round(decimals=1)}, truth))
    alone = mean_average_precision(masks=True)
    processes = [mean_average_precision(masks=True) for _ in range(world)]
    for i, (said, truth) in enumerate(pictures):
        for metric in (alone, processes[i % world]):
            metric.update([said], [truth])

    def gather(every, mine, group=None):
        every[:] = [{name: getattr(p, name) for name in p._reductions} for p in processes]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: world)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    expected, last = alone.compute(), copy.deepcopy(processes[-1])
    last._sync_dist()
    found = last.compute()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert 0.1 < expected["bbox_map"] < 0.9


@pytest.mark.parametrize("backend", ["pycocotools", "faster_coco_eval"])
def test_box_and_mask_figures_are_those_of_pycocotools_on_the_file(tmp_path, backend, capsys):
    """With crowds, boxes without area, pictures without annotation, and areas that are the file's own."""
    if backend == "faster_coco_eval":
        pytest.importorskip("faster_coco_eval", reason="an alternative that users install themselves")
    from pycocotools import mask as codes
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    root = coco.write(tmp_path)
    data = DetectionData(str(root), masks=True, num_workers=0, batch_size=1)
    data.setup("validate")
    draw = np.random.RandomState(3)
    metric, results = mean_average_precision(masks=True, backend=backend), []
    category = {i + 1: number for i, number in enumerate((3, 7))}
    for index in range(4):
        image, target = data.sets["val"][index]
        height, width = image.shape[-2:]
        boxes, labels, masks = [], [], []
        near = [(b + draw.uniform(-4, 4, 4)).tolist() for b in target["boxes"].numpy() for _ in range(3)]
        for x1, y1, x2, y2 in [*near, *draw.uniform(0, 60, (4, 4)).tolist()]:
            x1, x2, y1, y2 = (int(v) for v in (*sorted((x1, x2)), *sorted((y1, y2))))
            x1, y1, x2, y2 = max(0, x1), max(0, y1), min(width, x2 + 2), min(height, y2 + 2)
            mask = np.zeros((height, width), bool)
            mask[y1:y2, x1:x2] = True
            mask[y1 : (y1 + y2) // 2, x1 : (x1 + x2) // 2] = draw.rand() > 0.3
            boxes.append([x1, y1, x2, y2])
            labels.append(int(draw.randint(1, 3)))
            masks.append(mask)
        confidence = draw.rand(len(boxes)).astype(np.float32)
        said = {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}
        said |= {"scores": torch.from_numpy(confidence), "masks": torch.from_numpy(np.stack(masks))}
        metric.update([said], [{k: v for k, v in target.items() if k != "image_id"}])
        for (x1, y1, x2, y2), label, score, mask in zip(boxes, labels, confidence.tolist(), masks, strict=True):
            code = codes.encode(np.asfortranarray(mask.astype(np.uint8)))
            row = {"image_id": target["image_id"], "category_id": category[label], "score": score}
            results.append(
                {**row, "bbox": [x1, y1, x2 - x1, y2 - y1], "segmentation": {**code, "counts": code["counts"].decode()}}
            )
    found = metric.compute()

    content = json.loads((root / "annotations/instances_val2017.json").read_text())
    for annotation in content["annotations"]:  # what the tools want to be there
        annotation.setdefault("iscrowd", 0)
    (tmp_path / "whole.json").write_text(json.dumps(content))
    known = COCO(str(tmp_path / "whole.json"))
    for kind, prefix, other in (("bbox", "bbox_", "segmentation"), ("segm", "segm_", "bbox")):  # a result's area is of its kind
        judge = COCOeval(known, known.loadRes([{k: v for k, v in r.items() if k != other} for r in results]), kind)
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
        names = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large", "mar_1", "mar_10", "mar_100")
        for name, expected in zip(names, judge.stats, strict=False):
            assert float(found[prefix + name]) == pytest.approx(expected, abs=1e-6), (kind, name)
        assert 0.01 < judge.stats[0] < 0.95


def test_miou_and_pixel_accuracy_counted_by_hand():
    """Truth 0 0 1 1 2, said 0 1 1 1 0; class 3 nowhere: IoU 1/3, 2/3, 0; three of five pixels."""
    confusion = torch.zeros(4, 4, dtype=torch.int64)
    for true, said in zip((0, 0, 1, 1, 2), (0, 1, 1, 1, 0), strict=True):
        confusion[true, said] += 1
    found = scores(confusion)
    assert float(found["miou"]) == pytest.approx((1 / 3 + 2 / 3 + 0) / 3, abs=1e-6)
    assert float(found["pixel_accuracy"]) == pytest.approx(3 / 5, abs=1e-6)
    assert float(found["class_accuracy"]) == pytest.approx((1 / 2 + 1 + 0) / 3, abs=1e-6)
    assert all(float(v) == 0 for v in scores(torch.zeros(4, 4)).values())


def test_miou_is_torchmetrics_jaccard_index_over_the_data_set():
    task, judge = segmentation().eval(), MulticlassJaccardIndex(3, ignore_index=IGNORE)
    for size in ((40, 52), (33, 47)):
        image, labels = torch.randn(3, *size), torch.randint(0, 3, size)
        labels[:5] = IGNORE
        with torch.no_grad():
            task.count_batch(([image], [labels]))
            judge.update(task.model(image[None]).argmax(1), labels[None])
    assert float(scores(task.confusion.compute())["miou"]) == pytest.approx(float(judge.compute()), abs=1e-6)
    assert task.evaluated() == 2


# -- inference ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (65, 90), (40, 130), (20, 30)])
def test_windows_cover_every_pixel_and_agree_where_the_model_is_local(size):
    local, sizes = nn.Conv2d(3, 4, 1), []

    def model(x):
        sizes.append(tuple(x.shape[-2:]))
        return local(x)

    image = torch.randn(2, 3, *size)
    torch.testing.assert_close(slide(model, image, 64, 43), local(image))
    assert set(sizes) == {(min(64, size[0]), min(64, size[1]))}


def test_evaluation_is_at_the_size_of_the_labels():
    assert segmentation().eval().segment(torch.randn(3, 40, 60), (81, 119)).shape == (3, 81, 119)


@pytest.mark.parametrize("inference", ["whole", "slide"])
def test_a_mirrored_picture_is_segmented_as_the_mirror_image(inference):
    task = segmentation(flip_test=True, inference=inference, window=32, window_stride=32).eval()
    image = torch.randn(3, 32, 64)
    with torch.no_grad():
        one, other = task.segment(image, (32, 64)), task.segment(image.flip(-1), (32, 64)).flip(-1)
    torch.testing.assert_close(one.softmax(0), other.softmax(0), atol=1e-4, rtol=1e-3)


def test_mirroring_boxes_twice_changes_nothing_and_doubles_are_merged():
    found = {"boxes": torch.tensor([[5.0, 8, 20, 30], [40, 1, 60, 9]]), "labels": torch.tensor([1, 2])}
    found |= {"scores": torch.tensor([0.9, 0.6]), "masks": torch.rand(2, 40, 64) > 0.5}
    turned = _mirror(found, 64)
    assert turned["boxes"][0].tolist() == [44, 8, 59, 30]
    again = _mirror(turned, 64)
    assert all(torch.equal(again[key], found[key]) for key in found)
    assert _merge(found, again)["scores"].tolist() == pytest.approx([0.9, 0.6])


# -- training -----------------------------------------------------------------------------------------------------------


def test_dice_is_zero_where_right_and_looks_only_at_pixels_with_a_class():
    labels = torch.tensor([[[0, 0, 1, IGNORE]]])
    right = 50 * nn.functional.one_hot(torch.tensor([0, 0, 1, 2]), 3).T.reshape(1, 3, 1, 4).float()
    assert float(dice_loss(right, labels)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(-right, labels)) > 0.5
    other = right.clone()
    other[..., 3] = torch.randn(3, 1)[:, 0].view(1, 3, 1)
    assert torch.equal(dice_loss(right, labels), dice_loss(other, labels))


def test_a_batch_without_a_labelled_pixel_has_a_loss_of_zero_and_a_gradient():
    task = segmentation(dice=1.0, aux=0.4, kind="upernet")
    loss = task.training_step((torch.randn(2, 3, 32, 32), torch.full((2, 32, 32), IGNORE)), 0)
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in task.model.parameters())


@pytest.mark.parametrize("kind", ["maskrcnn", "fcos"])
def test_evaluating_pictures_without_objects_or_annotations(kind):
    task = detection(kind).eval()
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "image_id": 0}
    nothing |= {"masks": torch.zeros(0, 64, 80, dtype=torch.bool), "iscrowd": torch.zeros(0), "area": torch.zeros(0)}
    with torch.no_grad():
        task.count_batch(([torch.rand(3, 64, 80)], [nothing]))
    assert float(task.metric.compute()["bbox_map" if kind == "maskrcnn" else "map"]) == -1  # COCO's "nothing to find"


def groups(**kwargs):
    task = segmentation(**kwargs)
    return task, dense_groups(task.model, task.model.maps, 0.05, kwargs.get("layer_decay"))


def test_layer_decay_lowers_the_rate_towards_the_stem_and_not_of_the_decoder():
    task, found = groups(layer_decay=0.5)
    scale = {name: g["lr_scale"] for g in found for name in g["param_names"]}
    layers = parameter_layers(task.model.maps)
    assert {scale[name] for name in scale if name.startswith("decoder")} == {1.0}
    stem = {scale[f"maps.{name}"] for name, layer in layers.items() if layer == 0}
    assert stem == {0.5 ** len(set(layers.values()))}
    ordered = sorted({(layer, scale[f"maps.{name}"]) for name, layer in layers.items()})
    assert [s for _, s in ordered] == sorted(s for _, s in ordered)
    optimizer = build_optimizer(found, "adamw", 1e-3, 0.05, None, {})
    build_schedule(optimizer, "cosine", epochs=2, per_epoch=10, warmup_epochs=0, cooldown_epochs=0, warmup_lr=0.0, min_lr=0.0)
    assert {round(g["lr"] / 1e-3, 6) for g in optimizer.param_groups} == {round(g["lr_scale"], 6) for g in found}


def test_norms_biases_and_frozen_parameters():
    task, found = groups(frozen=1)
    decay = {name: g["weight_decay"] for g in found for name in g["param_names"]}
    assert all(decay[name] == 0 for name in decay if name.endswith("bias") or ".norm" in name or "rel_bias" in name)
    assert not any("stem" in name for name in decay)
    assert set(decay) == {name for name, p in task.model.named_parameters() if p.requires_grad}


def test_the_classical_schedule_drops_at_its_milestones():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(
        optimizer, "multistep", epochs=12, per_epoch=10, warmup_epochs=1, cooldown_epochs=0, warmup_lr=0.0, min_lr=0.0,
        milestones=(8, 11),
    )  # fmt: skip
    rates = []
    for step in (5, 10, 79, 80, 81, 109, 111, 119):
        schedule.step(step)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.5, 1, 1])
    assert rates[4:6] == pytest.approx([0.1, 0.1])
    assert rates[6:] == pytest.approx([0.01, 0.01])


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Detection("nat_micro", 2, kind="yolo"), "yolo"),
        (lambda: segmentation(class_weights=[1.0]), "1 numbers, and the data has 3 classes"),
        (lambda: segmentation(decoder_kwargs={"widht": 3}), "widht"),
        (lambda: groups_of_convnext(), "leave layer_decay None"),
    ],
)
def test_what_is_wrong_is_one_sentence(build, words):
    with pytest.raises(UserError, match=words):
        build()


def groups_of_convnext():
    Segmentation("convnext_atto", 3, kind="fpn", layer_decay=0.5).make_optimizer(1e-3)


# -- pictures -----------------------------------------------------------------------------------------------------------


def test_boxes_masks_and_labels_are_drawn_where_they_are():
    image = np.zeros((60, 80, 3), np.uint8)
    mask = np.zeros((1, 60, 80), bool)
    mask[0, 30:40, 40:60] = True
    drawn = np.asarray(draw_boxes(image, [[35, 25, 65, 45]], [2], [0.9], mask, ["a", "b"]))
    assert drawn[35, 50].tolist() == [round(c / 2) for c in colour(2)]
    assert drawn[45, 50].tolist() == list(colour(2))
    assert drawn[55, 5].tolist() == [0, 0, 0]
    assert not np.asarray(draw_boxes(image, [[35, 25, 65, 45]], [2], [0.4], mask)).any()  # below the threshold
    draw_boxes(image, [[0, 0, 80, 60], [79, 59, 90, 90], [5, 5, 5, 5]], [1, 9, 3])  # borders, no name, no area
    assert draw_boxes(image, np.zeros((0, 4)), []).size == (80, 60)


def test_classes_are_drawn_and_pixels_without_one_are_left():
    labels = np.full((20, 30), IGNORE)
    labels[:, 15:] = 1
    drawn = np.asarray(draw_classes(np.full((20, 30, 3), 100, np.uint8), labels))
    assert (drawn[:, :15] == 100).all()
    assert (drawn[:, 15:] != 100).any()
    page = sheet([draw_classes(np.zeros((20, 30, 3), np.uint8), labels, ["x", "y"])] * 5, columns=2, edge=64, captions=["one"])
    assert page.width == 2 * 70 + 6
