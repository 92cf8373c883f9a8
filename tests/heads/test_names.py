"""A listed name at its full depth in every head, forward and backward.

Its maps of an image are computed once and handed to all ten heads, whose gradients go back through it together: as in ten
models, at the cost of one. Runs on a few small names; ``pytest tests/heads/test_names.py --models '*' --timeout 0`` runs it
on all of them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import vitzoo
from tests.heads.test_heads import FEW, SIZES, targets, untrained
from tests.models.zoo import chosen
from vitzoo.heads import DETECTORS, SEGMENTERS, Maps, detector, segmenter


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    patterns = metafunc.config.getoption("--models")
    metafunc.parametrize("name", chosen(patterns or ["nat_micro", "swin_micro"])[0])


class Shared(nn.Module):
    """A features-only model that computes the maps of one image size once, until ``backward``."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.feature_info = body, body.feature_info
        self.computed: dict[torch.Size, tuple[list[Tensor], list[Tensor]]] = {}

    @property
    def model(self) -> nn.Module:
        return getattr(self.body, "model", self.body)

    def forward(self, x: Tensor) -> list[Tensor]:
        if x.shape not in self.computed:
            maps = list(self.body(x))
            self.computed[x.shape] = maps, [m.detach().requires_grad_() for m in maps]
        return self.computed[x.shape][1]

    def backward(self) -> None:
        """What the heads' gradients by the maps are by the parameters."""
        for maps, handed in self.computed.values():
            pairs = [(m, h.grad) for m, h in zip(maps, handed, strict=True) if h.grad is not None]
            torch.autograd.backward([m for m, _ in pairs], [g for _, g in pairs])
        self.computed.clear()


def test_every_head_trains_on_it(name, monkeypatch):
    bodies: dict[int, Shared] = {}
    plain = hasattr(vitzoo.model_info(name).config, "depth")
    build = Maps._build

    def once(self, name, pretrained, taps, kwargs):
        """One model for all heads; DPT has another of a plain transformer, of which it reads other blocks."""
        taps = taps if plain else 1
        if taps not in bodies:
            bodies[taps] = Shared(build(self, name, pretrained, taps, kwargs)[0])
        return bodies[taps], None

    monkeypatch.setattr(Maps, "_build", once)
    detectors = {kind: detector(kind, name, 3, channels=32, head_convs=1, **FEW[kind]) for kind in DETECTORS}
    segmenters = {kind: segmenter(kind, name, 5, channels=32, aux=kind == "upernet") for kind in SEGMENTERS}

    for size in SIZES:
        for model in (*detectors.values(), *segmenters.values()):
            model.zero_grad()
        for model in detectors.values():
            model.transform.min_size, model.transform.max_size = (min(size),), max(size)
            losses = torch.stack(list(model([torch.rand(3, *size)] * 2, targets(size, size)).values()))
            assert losses.isfinite().all()
            losses.sum().backward()
        for model in segmenters.values():
            logits, aux = model.with_aux(torch.randn(2, 3, *size))
            assert logits.shape == (2, 5, *size)
            loss = logits.square().mean() + (0 if aux is None else aux.square().mean())
            assert loss.isfinite()
            loss.backward()
        for body in bodies.values():
            assert len(body.computed) == 1  # detectors and segmenters pad an image alike
            body.backward()
        for kind, model in (detectors | segmenters).items():
            assert untrained(model) == [], kind
