"""timm's own tests of its models, run on ours: a plugin for pytest that filters timm's list of names to vitzoo's.

    python -m pytest -p tests.timm_suite -k "not torchscript" TIMM/tests/test_models.py

TIMM is a checkout of timm at the installed version; ``OURS="swin* nat*"`` narrows the names. TorchScript, which PyTorch has
deprecated, is left out with ``-k``; the tests that would download are, too, since nothing is listed as pretrained here.

``test_model_default_cfgs`` asks every model for a map with rows and columns ("TODO add 1D sequence support") and exempts plain
transformers with a class token by name, ``vit_*`` and ``deit*``, which have a test for their tokens instead. Ours of that kind
have other names in timm's registry and go where timm's own go.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from typing import Any

import timm

import vitzoo

WITH_CLASS_TOKEN = ("vz_vit_*", "vz_deit*", "agent_deit_*", "flatten_deit_*")

_timms_list = timm.list_models


def _ours() -> set[str]:
    return {vitzoo.model_info(name).timm_name for name in vitzoo.list_models(os.environ.get("OURS", "*").split())}


def _list_models(
    filter: str | Sequence[str] = "",  # noqa: A002  # timm's name for it
    exclude_filters: str | Sequence[str] = "",
    pretrained: bool = False,
    **ignored: Any,  # ignored: modules of timm among them, which would leave all of ours out
) -> list[str]:
    def chosen(name: str, patterns: str | Sequence[str]) -> bool:
        wanted = [patterns] if isinstance(patterns, str) else list(patterns)
        if "deit*" in wanted:
            wanted += WITH_CLASS_TOKEN
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted)

    names = [] if pretrained else sorted(OURS)
    return [name for name in names if (not filter or chosen(name, filter)) and not chosen(name, exclude_filters)]


OURS = _ours()
timm.list_models = _list_models
timm.list_pretrained = lambda *args, **kwargs: []
