"""The registry: timm's own, with our names in it.

``register_family`` turns a table of variants into timm entry points. Names are those of the papers; where timm has the
name already, ours carries ``vz_`` in timm's registry and timm's entry stays as it is. ``vitzoo.create_model`` takes the
bare name, prefers ours, and falls through to timm for everything else.
"""

from __future__ import annotations

import dataclasses
import difflib
import heapq
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from vitzoo import checkpoints, weights
from vitzoo.layers import with_our_attention
from vitzoo.models._contract import Backbone, configure, pair
from vitzoo.weights import Checkpoint

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One listed model: its names, family and config."""

    name: str
    timm_name: str
    family: str
    cls: type[Backbone]
    cfg: Any


_ENTRIES: dict[str, Entry] = {}
_REGISTRATIONS: dict[str, dict[str, Any]] = {}  # entry name: the keywords its family was registered with


def register_family(
    module: str,
    cls: type[Backbone],
    variants: Mapping[str, Any],
    *,
    first_conv: str,
    patch_first_conv: str | None = None,
    classifier: str | tuple[str, ...] = "head.fc",
    out_indices: int | None = None,
    data: Mapping[str, Any] | None = None,
    borrow: bool = False,
) -> None:
    """Put every variant of a family into timm's registry and into ours. May be called once for each class of a family.

    Args:
        module: the family's module, ``__name__``; its last part is the family's name and that of its manifest.
        cls: the model class; built with ``cls(cfg=variant, **keywords)``.
        variants: name to frozen config.
        first_conv: parameter prefix of the first convolution (timm adapts it to other ``in_chans``).
        patch_first_conv: the same for variants whose config sets ``patch_size`` where others have none.
        classifier: parameter prefix of the classifier, or several.
        out_indices: default outputs of ``features_only``: the last n; None: all.
        data: entries of timm's data config that differ from ImageNet's defaults.
        borrow: take the weights that timm has published for the same name; a row of the manifest adds to what it says of them.
    """
    family = module.rsplit(".", 1)[-1]
    owner = sys.modules[module]
    published = weights.manifest(family)
    cfgs: dict[str, Any] = {}
    names: dict[str, str] = {}
    # what timm says of its class, not of the weights; ours takes every size
    own_to_timm = ("architecture", "tag", "fixed_input_size")
    for name, cfg in variants.items():
        names[name] = f"vz_{name}" if timm.is_model(name) else name
        stem = patch_first_conv if patch_first_conv and cfg.patch_size is not None else first_conv
        base = {**_data_config(cfg), "first_conv": stem, "classifier": classifier, **(data or {})}
        tagged = {tag: row for tag, row in published.items() if tag.split(".")[0] == name}
        if borrow and names[name] != name:
            for tag, theirs in timm.models.get_arch_pretrained_cfgs(name).items():
                known = {k: v for k, v in theirs.to_dict(remove_null=True).items() if k not in own_to_timm}
                suffix = "." + tag.split(".", 1)[-1] if "." in tag else (f".{tag}" if tag else "")
                cfgs[names[name] + suffix] = {**base, **known}
        for tag, row in tagged.items():
            suffix = tag[len(name) :]
            cfgs[names[name] + suffix] = {**cfgs.get(names[name] + suffix, base), **_checkpoint_config(row)}
        if not any(key.split(".")[0] == names[name] for key in cfgs):
            cfgs[names[name]] = base
        elif all(row.file for row in tagged.values()) and tagged:
            cfgs[names[name] + ".*"] = (
                base  # the default: what we train on small pictures does not say how many classes there are
            )
    known_cfgs = getattr(owner, "default_cfgs", {})  # timm looks it up in the module
    owner.default_cfgs = {**known_cfgs, **generate_default_cfgs(cfgs)}  # type: ignore[attr-defined]
    keywords: dict[str, Any] = {"first_conv": first_conv, "patch_first_conv": patch_first_conv, "classifier": classifier}
    keywords |= {"out_indices": out_indices, "data": data}

    for name, cfg in variants.items():
        indices: Any = out_indices or tuple(range(len(getattr(cfg, "depths", ()))))
        entry = Entry(name, names[name], family, cls, cfg)
        build = _entry_point(entry, indices, module)
        register_model(build)
        setattr(owner, names[name], build)
        _ENTRIES[name] = entry
        _REGISTRATIONS[name] = keywords


def derive_family(
    module: str, variants: Mapping[str, tuple[str, Mapping[str, Any]]], *, data: Mapping[str, Any] | None = None
) -> None:
    """Register a family whose members are other families' models with another mixer.

    Args:
        module: the new family's module, ``__name__``.
        variants: new name to (name of the host's variant, fields of its config that differ). Hosts are looked up here, so
            that families need not import each other; ``vitzoo.models`` imports the hosts first.
        data: entries of timm's data config that differ from the hosts'.

    Raises:
        KeyError: a host that is not registered.
    """
    groups: dict[type[Backbone], dict[str, Any]] = {}
    for name, (host, fields) in variants.items():
        entry = _ENTRIES[host]
        groups.setdefault(entry.cls, {})[name] = (host, configure(entry.cfg, fields))
    for cls, members in groups.items():
        registration = _REGISTRATIONS[next(host for host, _ in members.values())]
        keywords = {**registration, "data": {**(registration["data"] or {}), **(data or {})}}
        register_family(module, cls, {name: cfg for name, (_, cfg) in members.items()}, **keywords)


def _entry_point(entry: Entry, out_indices: Any, module: str) -> Any:
    def build(pretrained: bool = False, accept_license: bool = False, **kwargs: Any) -> nn.Module:
        state, cfg = None, kwargs.get("pretrained_cfg")
        if pretrained and (cfg is None or isinstance(cfg, str)):
            row = _checkpoint_of(entry, cfg or "")
            state = checkpoints.read(_fetched(row, accept_license))
            kwargs["pretrained_cfg_overlay"] = {**(kwargs.get("pretrained_cfg_overlay") or {}), "state_dict": state}
        model = build_model_with_cfg(
            entry.cls,
            entry.timm_name,
            pretrained,
            model_cfg=entry.cfg,
            feature_cfg={"feature_cls": "getter", "out_indices": out_indices},
            pretrained_filter_fn=checkpoints.convert,
            **kwargs,
        )
        if state is not None:
            model.pretrained_cfg.pop("state_dict", None)
        return model

    build.__name__ = build.__qualname__ = entry.timm_name
    build.__module__ = module
    build.__doc__ = f"{entry.name}: {entry.cls.__doc__}"
    return build


def _data_config(cfg: Any) -> dict[str, Any]:
    """timm's data config for a variant at its own image size."""
    height, width = pair(cfg.img_size or 224)
    reduction = cfg.strides[-1]
    return {
        "url": "",
        "num_classes": cfg.num_classes,
        "input_size": (3, height, width),
        "pool_size": (-(-height // reduction), -(-width // reduction)),
        "crop_pct": 1.0 if height > 256 or height < 64 else 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
    }


def _checkpoint_config(row: Checkpoint) -> dict[str, Any]:
    """The part of a manifest's row that timm's config has a place for."""
    config: dict[str, Any] = {
        "url": row.url,
        "license": row.license,
        "origin_url": f"https://github.com/{row.source}" if row.source else None,
        "num_classes": row.num_classes,
        "input_size": (3, row.img_size, row.img_size),
    }
    known = {key: getattr(row, key) for key in ("crop_pct", "crop_mode", "interpolation", "mean", "std")}
    if row.file:
        config |= {"file": str(weights.folder() / row.file), "label_names": row.classes or None}
    return config | {key: value for key, value in known.items() if value is not None}


def entry_of(name: str) -> Entry | None:
    """Our entry for a name, with or without a tag or ``vz_``; None where it is not ours."""
    bare = name.split(".", 1)[0]
    return _ENTRIES.get(bare) or _ENTRIES.get(bare.removeprefix("vz_"))


def create_model(model_name: str, pretrained: bool | str = False, *, accept_license: bool = False, **kwargs: Any) -> nn.Module:
    """Build a model by name, as ``timm.create_model`` does: ours where we have the name, else timm's.

    Args:
        model_name: a name, optionally with a tag (``"swin_tiny_patch4_window7_224.ms_in22k"``).
        pretrained: load the published weights; a string names the tag.
        accept_license: for weights whose licence forbids commercial use: it has been read and is agreed to.
        **kwargs: what timm's ``create_model`` takes (``features_only``, ``out_indices``, ``checkpoint_path``, ...) and
            any field of the family's config: ``num_classes``, ``in_chans``, ``drop_path_rate``, ``depths``, ... Weights are
            made to fit other classes, channels, image and window sizes, and what was changed is logged.

    Returns:
        The model; with ``features_only=True`` a module that returns NCHW maps at the strides of ``feature_info``. timm's
        HaloNets and BoTNets come with ``layers.with_our_attention``: the same outputs, at any image size.

    Raises:
        ValueError: an unknown name (with the nearest known ones), a tag that the model does not have, weights that do
            not fit or cannot be fetched, a licence that was not accepted.
        TypeError: a keyword that the family's config does not have (with the nearest known one).
    """
    if isinstance(pretrained, str):
        model_name, pretrained = f"{model_name.split('.', 1)[0]}.{pretrained}", True
    entry = entry_of(model_name)
    if entry is None:
        if ":" not in model_name and not timm.is_model(model_name.split(".", 1)[0]):  # "hf-hub:..." is timm's to resolve
            raise ValueError(unknown_name(model_name))
        cfg = timm.get_pretrained_cfg(model_name) if pretrained and ":" not in model_name else None
        if cfg is not None:
            _agreed(Checkpoint(model_name, cfg.origin_url or "", cfg.license or "none stated", 0), accept_license)
        return with_our_attention(timm.create_model(model_name, pretrained=pretrained, **kwargs))
    tag = model_name.split(".", 1)[1] if "." in model_name else ""
    row = _checkpoint_of(entry, tag) if tag or pretrained else None
    path = kwargs.pop("checkpoint_path", None)
    if path is None and pretrained and row is not None:
        path = _fetched(row, accept_license)
    if row is not None and row.name != entry.name:
        tag = row.name.split(".", 1)[1]
    full = entry.timm_name + (f".{tag}" if tag else "")
    if path is None:
        return timm.create_model(full, **kwargs)
    if kwargs.pop("features_only", False):
        features = {k: kwargs.pop(k) for k in ("out_indices", "feature_cls") if k in kwargs}
        model = timm.create_model(full, features_only=True, **features, **kwargs)
        wanted = model.model.state_dict()  # the getter keeps the backbone in .model
        whole = timm.create_model(full, **{**kwargs, "num_classes": 0})
        state = checkpoints.load(whole, path, needed=wanted).state_dict()
        model.model.load_state_dict({k: state[k] for k in wanted})
        return model
    return checkpoints.load(timm.create_model(full, **kwargs), path)


def _checkpoint_of(entry: Entry, tag: str) -> Checkpoint:
    """The published checkpoint of a tag; without one the model's first."""
    rows = checkpoints_of(entry.name)
    if not rows and not tag:
        raise ValueError(
            f"No published weights are known for {entry.name}. Use pretrained=False, or checkpoint_path= for a file of yours."
        )
    if not tag:
        return next(iter(rows.values()))
    if f"{entry.name}.{tag}" not in rows:
        tags = [name.split(".", 1)[1] for name in rows if "." in name]
        raise ValueError(f"{entry.name} has no weights tagged '{tag}'. It has: {', '.join(tags) or 'no tags'}.")
    return rows[f"{entry.name}.{tag}"]


def _agreed(row: Checkpoint, accept_license: bool) -> None:
    """Stops where a licence forbids commercial use and nobody has agreed to it."""
    if row.noncommercial and not accept_license:
        source = row.source if "://" in row.source else f"https://github.com/{row.source}"
        raise ValueError(
            f"The weights of {row.name} are under {row.license}, which forbids commercial use. Read it at {source}, "
            "then pass accept_license=True (on the command line --accept-license)."
        )


def _fetched(row: Checkpoint, accept_license: bool) -> Path:
    _agreed(row, accept_license)
    if row.license.startswith("none"):
        _log.warning("%s: its authors (%s) state no licence for these weights", row.name, row.source)
    return weights.fetch(row, check=checkpoints.read)


def checkpoints_of(name: str) -> dict[str, Checkpoint]:
    """The published checkpoints of a model of ours, the default first.

    Args:
        name: of the model, without a tag.

    Returns:
        By name with tag: the rows of the manifest, and what timm has published for a shared architecture.

    Raises:
        ValueError: an unknown name (with the nearest known ones).
    """
    entry = entry_of(name)
    if entry is None:
        raise ValueError(unknown_name(name))
    manifest = weights.manifest(entry.family)
    found: dict[str, Checkpoint] = {}
    for theirs, cfg in timm.models.get_arch_pretrained_cfgs(entry.timm_name).items():
        full = entry.name + theirs.removeprefix(entry.timm_name)
        if full in manifest:
            found[full] = manifest[full]
        elif cfg.has_weights:
            found[full] = Checkpoint(
                name=full,
                source=cfg.origin_url or "huggingface/pytorch-image-models",
                license=cfg.license or "none stated",
                img_size=cfg.input_size[-1],
                hf_hub_id=cfg.hf_hub_id,
                num_classes=cfg.num_classes,
                crop_pct=cfg.crop_pct,
                interpolation=cfg.interpolation,
                mean=cfg.mean,
                std=cfg.std,
            )
    return found


def unknown_name(name: str) -> str:
    """A sentence that says which known names are nearest."""
    bare = name.split(".", 1)[0]
    near = _nearest(bare, list(_ENTRIES)) or _nearest(bare, timm.list_models())
    hint = f"Did you mean {' or '.join(repr(n) for n in near)}?" if near else "vitzoo.list_models() lists the known ones."
    return f"There is no model named '{name}'. {hint}"


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    """Up to three known names that are like ``name``, or that begin like it (published names are long)."""

    def likeness(candidate: str) -> float:
        whole, begin = (difflib.SequenceMatcher(None, name, c).ratio() for c in (candidate, candidate[: len(name) + 1]))
        return max(whole, begin)

    return [n for n in heapq.nlargest(3, known, key=likeness) if likeness(n) >= 0.7]
