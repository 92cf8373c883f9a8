"""Every constructor against the published procedure, written here from the papers' code and not from the span rule.

Each procedure labels or gathers the coordinates as its authors do; who sees whom follows from that.
"""

from __future__ import annotations

import numpy as np
import pytest

from vitzoo.patterns import Pattern, axial, dilated_window, everywhere, grid, halo, neighborhood, stripe, window

Sees = np.ndarray  # [H, W, H, W] bool: query, key


def sees(pattern: Pattern, H: int, W: int) -> Sees:
    found = np.zeros((H, W, H, W), bool)
    for y in range(H):
        for x in range(W):
            rows, cols = pattern.keys(y, x, H, W)
            found[y, x, np.array(rows)[:, None], np.array(cols)] = True
    return found


def same_label(labels: np.ndarray) -> Sees:
    return labels[:, :, None, None] == labels[None, None]


def swin(H: int, W: int, w: int, s: int) -> Sees:
    """Roll by -s, cut into windows, forbid pairs of different regions (cuts at -w and -s), roll back."""
    region = np.zeros((H, W), int)
    cuts = (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
    for count, (rows, cols) in enumerate((a, b) for a in cuts for b in cuts):
        region[rows, cols] = count
    number = (np.arange(H)[:, None] // w) * (W // w) + np.arange(W) // w
    return same_label(np.roll(number * 9 + region, (s, s), (0, 1)))


def maxvit_grid(H: int, W: int, g: tuple[int, int]) -> Sees:
    """x.reshape(g, H // g, g, W // g): a group is what shares the two inner indices."""
    labels = np.arange(H // g[0] * (W // g[1])).reshape(1, H // g[0], 1, W // g[1])
    return same_label(np.broadcast_to(labels, (g[0], H // g[0], g[1], W // g[1])).reshape(H, W))


def crossformer_long_distance(H: int, W: int, g: int, interval: int) -> Sees:
    """Pad to a multiple of g * interval, x.reshape(R, g, I, S, g, I): a group shares R, S and the two I; padding is masked."""
    block = g * interval
    R, S = -(-H // block), -(-W // block)
    labels = np.arange(R * S * interval**2).reshape(R, 1, interval, S, 1, interval)
    return same_label(np.broadcast_to(labels, (R, g, interval, S, g, interval)).reshape(R * block, S * block)[:H, :W])


def cswin_stripes(H: int, W: int, rows: int, cols: int) -> Sees:
    """img2windows with stripes of rows x cols."""
    labels = np.arange(H // rows * (W // cols)).reshape(H // rows, 1, W // cols, 1)
    return same_label(np.broadcast_to(labels, (H // rows, rows, W // cols, cols)).reshape(H, W))


def halonet(H: int, W: int, block: int, margin: int) -> Sees:
    """F.pad by the halo, unfold patches of block + 2 * halo every block; padding is masked."""
    index = np.pad(np.arange(H * W).reshape(H, W), margin, constant_values=-1)
    found = np.zeros((H, W, H * W), bool)
    for y in range(0, H, block):
        for x in range(0, W, block):
            patch = index[y : y + block + 2 * margin, x : x + block + 2 * margin]
            found[y : y + block, x : x + block, patch[patch >= 0]] = True
    return found.reshape(H, W, H, W)


def natten_axis(n: int, kernel: int, dilation: int, stride: int) -> np.ndarray:
    """NATTEN's definition: inside a dilation group, the leader of the query's stride group picks the window, clamped."""
    found = np.zeros((n, n), bool)
    for i in range(n):
        group = np.arange(i % dilation, n, dilation)
        position = i // dilation
        leader = min(position // stride * stride + stride // 2, len(group) - 1)
        start = min(max(leader - kernel // 2, 0), len(group) - kernel)
        found[i, group[start : start + kernel]] = True
    return found


def natten(H: int, W: int, kernel: tuple[int, int], dilation: tuple[int, int], stride: tuple[int, int]) -> Sees:
    rows, cols = (natten_axis(n, *each) for n, each in zip((H, W), zip(kernel, dilation, stride, strict=True), strict=True))
    return rows[:, None, :, None] & cols[None, :, None, :]


@pytest.mark.parametrize("w", [2, 3, 4, 7])
def test_shifted_window_equals_roll_and_region_mask(w):
    for s in range(w):
        assert (sees(window(w, shift=s), 2 * w, 3 * w) == swin(2 * w, 3 * w, w, s)).all(), s


def test_window_covers_a_ragged_map_as_a_padded_one_does():
    assert (sees(window(3), 7, 11) == swin(9, 12, 3, 0)[:7, :11, :7, :11]).all()


@pytest.mark.parametrize(("g", "size"), [((2, 2), (6, 8)), ((3, 5), (12, 10)), ((7, 7), (14, 7))])
def test_grid_equals_maxvit_partition(g, size):
    assert (sees(grid(g), *size) == maxvit_grid(*size, g)).all()


@pytest.mark.parametrize(("g", "interval"), [(2, 2), (4, 2), (3, 3), (7, 1)])
@pytest.mark.parametrize("size", [(12, 12), (13, 9), (4, 17)])
def test_dilated_window_equals_crossformer_reshape(g, interval, size):
    assert (sees(dilated_window(g, interval), *size) == crossformer_long_distance(*size, g, interval)).all()


@pytest.mark.parametrize("s", [1, 2, 3])
def test_stripes_equal_cswin_windows(s):
    assert (sees(stripe(rows=s), 6, 5) == cswin_stripes(6, 5, s, 5)).all()
    assert (sees(stripe(cols=s), 5, 6) == cswin_stripes(5, 6, 5, s)).all()


def test_axial_attention_stays_in_its_row_or_column():
    y, x = np.arange(5)[:, None, None, None], np.arange(4)[None, :, None, None]
    v, u = np.arange(5)[None, None, :, None], np.arange(4)[None, None, None, :]
    assert (sees(axial("row"), 5, 4) == (y == v) & (x == x)).all()
    assert (sees(axial("column"), 5, 4) == (x == u) & (y == y)).all()
    assert sees(everywhere, 5, 4).all()


@pytest.mark.parametrize(("block", "margin"), [(4, 1), (3, 2), (8, 3), (2, 0)])
@pytest.mark.parametrize("size", [(8, 12), (13, 7)])
def test_halo_equals_unfold_with_masked_padding(block, margin, size):
    assert (sees(halo(block, margin), *size) == halonet(*size, block, margin)).all()


@pytest.mark.parametrize(
    ("kernel", "dilation", "stride"),
    [
        ((3, 3), (1, 1), (1, 1)),
        ((7, 5), (1, 1), (1, 1)),
        ((3, 5), (4, 2), (1, 1)),
        ((6, 4), (1, 2), (1, 1)),
        ((5, 5), (1, 1), (2, 3)),
        ((6, 3), (2, 3), (3, 2)),
    ],
)
@pytest.mark.parametrize("size", [(13, 17), (14, 12)])
def test_neighborhood_equals_natten_definition(kernel, dilation, stride, size):
    assert (sees(neighborhood(kernel, dilation, stride), *size) == natten(*size, kernel, dilation, stride)).all()
