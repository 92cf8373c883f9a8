"""Names, counts and what is said to somebody who mistypes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import timm
import torch

import vitzoo
from vitzoo.models._registry import entry_of
from vitzoo.models.swin import Swin

# exact counts, measured on the published classes
PUBLISHED = [
    (row["name"], int(row["num_classes"]), int(row["params"]))
    for row in csv.DictReader((Path(__file__).parent / "params.csv").open(encoding="utf-8"))
]


@pytest.mark.parametrize(("published", "classes", "params"), PUBLISHED)
def test_has_the_parameter_count_of_the_published_model(published, classes, params):
    assert vitzoo.model_info(published, num_classes=classes).params == params


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def timms_own(name: str) -> bool:
    entry = entry_of(name)
    return entry is not None and entry.timm_name == f"vz_{name}"


def test_every_published_variant_is_counted():
    uncounted = set(vitzoo.list_models()) - {name for name, _, _ in PUBLISHED}
    assert {name for name in uncounted if not timms_own(name)} == {n for n in vitzoo.list_models() if n.endswith("_micro")}


@pytest.mark.parametrize("shared", [name for name in vitzoo.list_models() if timms_own(name)])
def test_counts_what_timms_model_of_that_name_counts(shared):
    with torch.device("meta"):
        theirs = timm.create_model(shared, num_classes=1000)
    assert "vitzoo" not in type(theirs).__module__
    assert vitzoo.model_info(shared, num_classes=1000).params == count(theirs)


@pytest.mark.parametrize("listed", vitzoo.list_models())
def test_model_info_counts_the_model_that_create_model_builds(listed):
    with torch.device("meta"):
        assert vitzoo.model_info(listed).params == count(vitzoo.create_model(listed))


def test_timms_own_entry_stays_as_it_was():
    with torch.device("meta"):
        theirs = timm.create_model("swin_tiny_patch4_window7_224")
        ours = timm.create_model("vz_swin_tiny_patch4_window7_224")
        preferred = vitzoo.create_model("swin_tiny_patch4_window7_224")
    assert type(theirs).__module__ == "timm.models.swin_transformer"
    assert type(ours) is type(preferred) is Swin


def test_one_call_reaches_timms_field():
    assert "timm" in type(vitzoo.create_model("test_vit")).__module__


@pytest.mark.parametrize("create", [vitzoo.create_model, timm.create_model], ids=["vitzoo", "timm"])
def test_nat_tiny_gives_four_nchw_maps_at_250_by_330(create):
    backbone = create("nat_tiny", features_only=True)
    with torch.inference_mode():
        maps = backbone(torch.randn(1, 3, 250, 330))
    assert [tuple(m.shape) for m in maps] == [(1, 64, 63, 83), (1, 128, 32, 42), (1, 256, 16, 21), (1, 512, 8, 11)]
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("nat_tyni", "nat_tiny"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("vz_nat_smal", "nat_small"),
        ("resnet51", "resnet50"),
    ],
)
def test_an_unknown_name_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=f"'{wrong}'.*'{near}'"):
        vitzoo.create_model(wrong)


def test_a_name_like_nothing_leads_to_the_list():
    with pytest.raises(ValueError, match="list_models"):
        vitzoo.create_model("qqqqqqqq")


def test_list_models_filters():
    everything = vitzoo.list_models()
    assert everything == sorted(everything)
    assert vitzoo.list_models("nat_*") == [n for n in everything if n.startswith("nat_")]
    assert vitzoo.list_models(["nat_*", "swin_*"], exclude="*base*", family="nat") == [
        n for n in everything if n.startswith("nat_") and "base" not in n
    ]
    assert set(vitzoo.list_models(family="swin")) >= {"swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"}
    assert "swin_tiny_patch4_window7_224.ms_in22k" in vitzoo.list_models("swin_tiny*", pretrained=True)
    with pytest.raises(ValueError, match=r"'swim'.*swin"):
        vitzoo.list_models(family="swim")


def test_pretrained_without_known_weights_says_so():
    with pytest.raises(ValueError, match="No published weights are known for cswin_micro"):
        vitzoo.create_model("cswin_micro", pretrained=True)


def test_an_unknown_tag_names_the_known_ones():
    with pytest.raises(ValueError, match=r"'ms_in21k'.*ms_in22k"):
        vitzoo.create_model("swin_tiny_patch4_window7_224.ms_in21k")


def test_model_info_tells_what_is_published():
    info = vitzoo.model_info("swin_tiny_patch4_window7_224")
    assert (info.family, info.img_size, info.strides, info.channels) == (
        "swin",
        (224, 224),
        (4, 8, 16, 32),
        (96, 192, 384, 768),
    )
    assert info.top1["swin_tiny_patch4_window7_224"] == 81.2
    assert info.published_gmacs == 4.5
