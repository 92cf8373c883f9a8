"""Tuning on a GPU: it chooses, it leaves files, the next process reads them, and results stay right."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from vitzoo.ops import attend, attend2d, channel_attend, linear_attend
from vitzoo.ops._triton import tuning
from vitzoo.patterns import neighborhood, window

pytestmark = pytest.mark.gpu


def everything() -> list[torch.Tensor]:
    """Outputs and gradients of a call of every op that tunes."""
    torch.manual_seed(0)
    maps = torch.randn(8, 28, 28, 3, 3, 32, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    found = []
    for run in (
        lambda q, k, v: attend2d(q, k, v, window(7, shift=3), impl="triton"),
        lambda q, k, v: attend2d(q, k, v, neighborhood(7), impl="triton"),
        lambda q, k, v: attend(*(t.flatten(1, 2) for t in (q, k, v)), impl="triton"),
        lambda q, k, v: linear_attend(*(t.flatten(1, 2) for t in (q.abs(), k.abs(), v)), impl="triton"),
        lambda q, k, v: channel_attend(*(t.flatten(1, 2) for t in (q, k, v)), scale=0.05, impl="triton"),
    ):
        out = run(*maps.unbind(3))
        found += [out.detach(), *torch.autograd.grad(out.float().square().sum(), maps)]
    return found


def test_every_op_chooses_once_in_seconds_and_stays_right(monkeypatch, tmp_path):
    expected = everything()
    monkeypatch.setenv("VITZOO_AUTOTUNE", "1")
    monkeypatch.setenv("VITZOO_CACHE", str(tmp_path))
    tuning._tuner.cache_clear()
    try:
        for actual, value in zip(everything(), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=5e-2, atol=5e-2 * float(value.abs().max()))
        files = {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
        assert {name.split("-")[0] for name in files} >= {"attend2d", "attend", "outer_sums", "times_matrix", "linear_out"}
        begin = time.monotonic()
        command = "from tests.ops.triton.test_gpu_tuning import everything; everything()"
        subprocess.run([sys.executable, "-c", command], check=True, cwd=Path(__file__).parents[3])
        assert time.monotonic() - begin < 120
        assert files == {file.name: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    finally:
        tuning._tuner.cache_clear()
