"""Every family of the registry in every head, at sizes that nothing divides."""

from __future__ import annotations

import pytest
import torch

import vitzoo
from tests.models.zoo import ceil_div
from vitzoo.heads import DETECTORS, SEGMENTERS, Maps, detector, segmenter

SIZES = [(256, 320), (250, 330)]


# where every patch sees every other, patches of 4 pixels take minutes
COARSER: dict[str, dict[str, object]] = {name: {"patch_size": 16} for name in ("tap_fan_micro", "tap_rvt_micro")}


def small(family: str) -> tuple[str, dict[str, object]]:
    """The family's smallest model, with as few blocks as it takes to have them all once."""
    names = vitzoo.list_models(family=family)
    names = [n for n in names if n != "vit_micro"]  # patches of 4 pixels, and every one sees every other
    infos = [vitzoo.model_info(name, num_classes=0) for name in [n for n in names if "micro" in n] or names]
    info = min(infos, key=lambda i: i.params)
    if "micro" in info.name:
        return info.name, COARSER.get(info.name, {})
    if not hasattr(info.config, "depths"):
        return info.name, {"depth": 4}
    shallow = tuple(min(2, depth) for depth in info.config.depths)
    try:
        vitzoo.model_info(info.name, depths=shallow)
    except (ValueError, TypeError):  # other fields of its config go by depth
        return info.name, {}
    return info.name, {"depths": shallow}


MODELS = {family: small(family) for family in vitzoo.list_families()}


# few proposals and few findings: heads see the maps, not the crowd
FEW = {
    kind: (
        {"rpn_pre_nms_top_n_train": 64, "rpn_post_nms_top_n_train": 32, "rpn_post_nms_top_n_test": 16,
         "box_batch_size_per_image": 16, "box_detections_per_img": 4}
        if kind.endswith("rcnn")
        else {"topk_candidates": 20, "detections_per_img": 4, "extra": 1}
    )
    for kind in DETECTORS
}  # fmt: skip


def targets(*sizes):
    found = []
    for height, width in sizes:
        masks = torch.zeros(2, height, width, dtype=torch.uint8)
        masks[0, 8:90, 5:120] = masks[1, 100:140, 30:70] = 1
        boxes = torch.tensor([[5.0, 8.0, 120.0, 90.0], [30.0, 100.0, 70.0, 140.0]])
        found.append({"boxes": boxes, "labels": torch.tensor([1, 3]), "masks": masks})
    return found


def untrained(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("family", MODELS)
def test_maps_have_the_strides_that_were_asked_for(family):
    name, kwargs = MODELS[family]
    maps = Maps(name, **kwargs).eval()
    with torch.no_grad():
        for height, width in SIZES:
            found = maps(torch.randn(1, 3, height, width))
            shapes = [tuple(m.shape[1:]) for m in found]
            assert shapes == [
                (c, ceil_div(height, s), ceil_div(width, s)) for c, s in zip(maps.channels, (4, 8, 16, 32), strict=True)
            ]
            assert all(m.isfinite().all() for m in found)


@pytest.mark.parametrize("kind", DETECTORS)
@pytest.mark.parametrize("family", MODELS)
def test_every_family_trains_in_every_detector(family, kind):
    name, kwargs = MODELS[family]
    model = detector(kind, name, 3, channels=32, head_convs=1, min_size=250, max_size=330, backbone_kwargs=kwargs, **FEW[kind])
    losses = model([torch.rand(3, *size) for size in SIZES], targets(*SIZES))
    assert all(loss.isfinite() for loss in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    assert untrained(model) == []
    model.eval()
    with torch.no_grad():
        found = model([torch.rand(3, *SIZES[1])])[0]
    assert {"boxes", "labels", "scores"} <= set(found)
    if kind == "maskrcnn":
        assert found["masks"].shape[1:] == (1, *SIZES[1])


@pytest.mark.parametrize("kind", SEGMENTERS)
@pytest.mark.parametrize("family", MODELS)
def test_every_family_trains_in_every_segmenter(family, kind):
    name, kwargs = MODELS[family]
    model = segmenter(kind, name, 5, channels=32, aux=kind == "upernet", backbone_kwargs=kwargs)
    logits, aux = model.with_aux(torch.randn(2, 3, *SIZES[1]))
    assert logits.shape == (2, 5, *SIZES[1])
    loss = logits.square().mean()
    if kind == "upernet":
        assert aux is not None
        assert aux.shape == logits.shape
        loss = loss + aux.square().mean()
    loss.backward()
    assert untrained(model) == []
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, *SIZES[0])).shape == (1, 5, *SIZES[0])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vit_small_patch14_reg4_dinov2", ["resized by 14/16", "stride 4 is made from the map at stride 16 (up)"]),
        ("shvit_s1", ["stride 4 is made from the map at stride 16 (up)"]),
        ("volo_d1_224", ["224x224 only", "stride 4 is made from the map at stride 16 (up)"]),
        ("crossvit_9_240", ["240x240 only", "stride 4 is made from the map at stride 12"]),
        ("nat_micro", ["stride 32 is made from the map at stride 16 (down)"]),
        ("convnext_atto", []),
    ],
)
def test_the_adapter_says_what_it_did(name, words):
    maps = Maps(name, **({"depth": 4} if "dinov2" in name else {})).eval()
    assert bool(maps.notes) == bool(words)
    for word in words:
        assert any(word in note for note in maps.notes), maps.notes
    with torch.no_grad():
        shapes = [tuple(m.shape[2:]) for m in maps(torch.randn(1, 3, 250, 330))]
    assert shapes == [(63, 83), (32, 42), (16, 21), (8, 11)]


def test_a_pyramid_that_fits_is_handed_on_as_it_is():
    maps = Maps("swin_tiny_patch4_window7_224", norm=False, depths=(1, 1, 1, 1)).eval()
    x = torch.randn(1, 3, 70, 93)
    with torch.no_grad():
        for ours, theirs in zip(maps(x), maps.body(x), strict=True):
            assert torch.equal(ours, theirs)
    assert maps.notes == []


def test_the_simple_feature_pyramid_reads_the_last_block_and_dpt_four():
    assert Maps("vit_tiny_patch16_224", depth=8).body.feature_info.module_name() == ["blocks.7"]
    taps = segmenter("dpt", "vit_tiny_patch16_224", 2, channels=32, backbone_kwargs={"depth": 8}).maps
    assert taps.body.feature_info.module_name() == ["blocks.1", "blocks.3", "blocks.5", "blocks.7"]
    assert taps.sources == [0, 1, 2, 3]


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_frozen_stages_neither_learn_nor_drop(frozen):
    maps = Maps("swin_tiny_patch4_window7_224", frozen=frozen, depths=(2, 2, 2, 2), drop_path_rate=0.5, strides=(4, 8, 16, 32))
    model = maps.train().model
    assert not any(p.requires_grad for p in model.stem.parameters())
    for i, stage in enumerate(model.stages):
        assert {p.requires_grad for p in stage.blocks.parameters()} == {i >= frozen}
        assert stage.blocks.training == (i >= frozen)
    assert maps.norms.training
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(maps.body.model.stages[:frozen](model.stem(x)), maps.body.model.stages[:frozen](model.stem(x)))


def test_stages_are_recomputed_one_by_one_and_nothing_changes():
    torch.manual_seed(0)
    plain, saving = (Maps("nat_micro", checkpoint_stages=stages) for stages in ((), (0, -1)))
    assert [stage.grad_checkpointing for stage in saving.model.stages] == [True, False, True]
    saving.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 50, 70)
    for maps in (plain, saving):
        sum(m.square().mean() for m in maps(x)).backward()
    for a, b in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: detector("maskrcn", "nat_micro", 3), "Did you mean 'maskrcnn'"),
        (lambda: segmenter("upperent", "nat_micro", 3), "Did you mean 'upernet'"),
        (lambda: detector("fcos", "nat_mikro", 3), "nat_micro"),
        (lambda: detector("fcos", "nat_micro", 3, scores_thresh=0.1), "Did you mean 'score_thresh'"),
        (lambda: Maps("nat_micro", (4, 6)), "ascending powers of two"),
        (lambda: Maps("nat_micro", (8, 4)), "ascending powers of two"),
        (lambda: Maps("nat_micro", frozen=9), r"frozen is 9.*0 to 3"),
        (lambda: Maps("nat_micro", checkpoint_stages=(5,)), r"stage 5.*0 to 2"),
        (lambda: Maps("convnext_atto", frozen=1), "leave frozen None"),
        (lambda: segmenter("unet", "nat_micro", 3, dropout=0.5), "no dropout"),
        (lambda: detector("fcos", "nat_micro", 3, channels=40, dyhead=1), "do not divide 40"),
    ],
)
def test_what_is_wrong_is_said(build, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build()


@pytest.mark.parametrize("kind", DETECTORS)
def test_images_without_objects_have_a_loss(kind):
    model = detector(kind, "nat_micro", 3, channels=32, head_convs=1, min_size=96, max_size=128, **FEW[kind])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty["masks"] = torch.zeros(0, 96, 96, dtype=torch.uint8)
    losses = model([torch.rand(3, 96, 96)] * 2, [empty, empty])
    loss = torch.stack(list(losses.values())).sum()
    assert loss.isfinite()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("kind", DETECTORS)
def test_detectors_run_in_bfloat16(kind):
    model = detector(kind, "nat_micro", 3, channels=32, head_convs=1, min_size=96, max_size=128, **FEW[kind])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = model([torch.rand(3, 96, 96)], [{**targets((160, 160))[0], "masks": torch.ones(2, 96, 96, dtype=torch.uint8)}])
    assert all(loss.isfinite() for loss in losses.values())


def test_anchors_lie_at_the_strides_of_the_pyramid():
    model = detector("retinanet", "nat_micro", 3, channels=32, min_size=800, max_size=800)
    maps = [torch.zeros(1, 32, n, n) for n in (100, 50, 25, 13, 7)]
    images = type("Images", (), {"tensors": torch.zeros(1, 3, 800, 800), "image_sizes": [(800, 800)]})
    anchors = model.anchor_generator(images, maps)[0]
    last = anchors[-9 * 49 :].reshape(7, 7, 9, 4)
    centres = (last[..., :2] + last[..., 2:]) / 2
    torch.testing.assert_close(centres[:, :, 0, 0], torch.arange(7.0).mul(128).expand(7, 7))
    torch.testing.assert_close(centres[:, :, 0, 1], torch.arange(7.0).mul(128)[:, None].expand(7, 7))


@pytest.mark.parametrize(
    "method", [{"name": "tome", "r": 5}, {"name": "evit", "keep_rate": 0.5}, "dynamicvit", "skipvit", "spa"]
)
def test_heads_run_on_a_backbone_with_fewer_tokens(method):
    backbone = {"token_reduction": method, "patch_size": 16}
    model = segmenter("fpn", backbone="vit_micro", num_classes=3, backbone_kwargs=backbone)
    labels = torch.randint(0, 3, (2, 90, 130))
    torch.nn.functional.cross_entropy(model(torch.randn(2, 3, 90, 130)), labels).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".attn." in name)
    found = detector("fcos", "vit_micro", 4, backbone_kwargs=backbone, min_size=(96,), max_size=130, **FEW["fcos"])
    images = [torch.rand(3, 150, 160)]
    sum(found(images, [{k: v for k, v in targets((150, 160))[0].items() if k != "masks"}]).values()).backward()
    with torch.no_grad():
        assert found.eval()(images)[0]["boxes"].shape[1] == 4


def test_a_backbone_that_reduces_nothing_gives_the_maps_it_gave():
    torch.manual_seed(0)
    plain = Maps("vit_micro", patch_size=16).eval()
    reduced = Maps("vit_micro", patch_size=16, token_reduction={"name": "tome", "r": 0}).eval()
    reduced.load_state_dict(plain.state_dict())
    x = torch.randn(1, 3, 90, 130)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(plain(x), reduced(x), strict=True))
    with pytest.raises(ValueError, match="whole map"):
        Maps("nat_micro", token_reduction="tome")
