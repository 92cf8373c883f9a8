"""Agent attention: every step beside PyTorch's own, at sizes that divide nothing, and what it costs."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

import vitzoo
from vitzoo.layers import AgentAttention, OnTokens, Slot, build_mixer
from vitzoo.layers import agent as layer

# rows, columns, agents' rows and columns: ragged, smaller than the grid, one token, no square
GRIDS = [(14, 14, (3, 3)), (11, 5, (4, 4)), (5, 3, (9, 7)), (1, 1, (7, 7)), (19, 27, (4, 5))]


@pytest.fixture(params=[True, False], ids=["operators", "products"])
def form(request, monkeypatch):
    """PyTorch's own operators, or products with matrices, which every other place takes."""
    monkeypatch.setattr(layer, "_eager_on_cpu", lambda x: request.param)


def mixer(size: tuple[int, int] = (6, 9), **kwargs: object) -> AgentAttention:
    """A mixer with weights that hide nothing."""
    torch.manual_seed(0)
    slot_kwargs = {key: kwargs.pop(key) for key in ("prefix_tokens", "lepe", "packed") if key in kwargs}
    built = build_mixer("agent", Slot(16, 2, size, **slot_kwargs), kwargs).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return built


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("height", "width", "grid"), GRIDS)
def test_agents_are_adaptive_averages(form, height, width, grid):
    x = image(2, height, width, 3 * 8)[..., 8:16]  # a part of a packed projection
    expected = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), grid).flatten(2).transpose(1, 2)
    torch.testing.assert_close(layer.pool_map(x, grid), expected)


@pytest.mark.parametrize(("height", "width", "grid"), [(6, 9, (2, 2)), *GRIDS])
def test_biases_are_bilinear_over_the_map_and_then_over_the_agents(form, height, width, grid):
    coarse, row, col = image(2, 4, 7, 7), image(2, 4, 6), image(2, 4, 9)
    over_map = F.interpolate(coarse, size=(height, width), mode="bilinear")
    over_map = over_map + F.interpolate(row[..., None] + col[..., None, :], size=(height, width), mode="bilinear")
    agents_last = over_map.flatten(2).transpose(1, 2).unflatten(2, (2, 2)).flatten(0, 1)
    expected = F.interpolate(agents_last[:, None], size=grid, mode="bilinear")
    expected = expected.reshape(2, height * width, grid[0] * grid[1]).transpose(1, 2)
    torch.testing.assert_close(layer.map_bias(coarse, row, col, image(1, height, width, 1), grid), expected)


def by_hand(m: AgentAttention, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Equations 4 to 6 on tokens ``[B, P + H * W, C]``, a head at a time."""
    q, k, v = m.qkv(x).chunk(3, dim=-1)
    p, d = m.prefix_tokens, m.head_dim
    pooled = F.adaptive_avg_pool2d(q[:, p:].transpose(1, 2).unflatten(2, (height, width)), m.grid).flatten(2).transpose(1, 2)
    heads = []
    for n in range(m.num_heads):
        qn, kn, vn, an = (t[..., n * d : (n + 1) * d] for t in (q, k, v, pooled))
        b1, b2 = (
            F.interpolate(t[n][None], size=(height, width), mode="bilinear")[0].flatten(1) for t in (m.an_bias, m.na_bias)
        )
        b1 = b1 + (m.ah_bias + m.aw_bias)[0, n].flatten(1)
        b2 = b2 + (m.ha_bias + m.wa_bias)[0, n].flatten(0, 1).T
        if p:
            b1, b2 = torch.cat([m.ac_bias[0, n], b1], dim=1), torch.cat([m.ca_bias[0, n].T, b2], dim=1)
        read = (an @ kn.transpose(1, 2) / math.sqrt(d) + b1).softmax(-1) @ vn
        heads.append((qn @ an.transpose(1, 2) / math.sqrt(d) + b2.T).softmax(-1) @ read)
    out = torch.cat(heads, dim=-1)
    local = m.local(v[:, p:].unflatten(1, (height, width))).flatten(1, 2)
    return m.proj(torch.cat([out[:, :p], out[:, p:] + local], dim=1))


@pytest.mark.parametrize("lepe", [False, True], ids=["dwc", "lepe"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_is_the_papers_equations(form, prefix, lepe):
    m = mixer(agents=4, prefix_tokens=prefix, lepe=lepe)
    x = image(2, prefix + 54, 16)
    torch.testing.assert_close(OnTokens(m, prefix)(x, 6, 9), by_hand(m, x, 6, 9))


def test_both_forms_give_the_same_gradients(monkeypatch):
    m = mixer(agents=9, agent_shape=(2, 5))
    x = image(2, 5, 11, 16)
    results = []
    for operators in (True, False):
        monkeypatch.setattr(layer, "_eager_on_cpu", lambda t, answer=operators: answer)
        m.zero_grad()
        m(x).square().sum().backward()
        results.append({name: p.grad.clone() for name, p in m.named_parameters()})
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], msg=name)


def test_keys_of_a_reduced_map_have_biases_of_its_size():
    m = mixer((7, 9), agents=4, kv_ratio=2)
    assert (m.ah_bias.shape, m.aw_bias.shape) == ((1, 2, 4, 4, 1), (1, 2, 4, 1, 5))  # padded to whole cells
    assert m(image(1, 7, 9, 16)).shape == (1, 7, 9, 16)


def test_cost_grows_with_the_number_of_pixels_not_with_its_square():
    def flops(side: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            m = build_mixer("agent", Slot(16, 2, (56, 56)), {"agents": 9})
            m(torch.empty(1, side, side, 16))
        return counter.get_total_flops()

    assert flops(112) <= 4.05 * flops(56)


def test_nothing_as_large_as_the_square_of_the_pixels_is_kept():
    m = mixer(agents=4).float()
    largest = 0

    def pack(t: torch.Tensor) -> torch.Tensor:
        nonlocal largest
        largest = max(largest, t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        m(torch.randn(1, 64, 64, 16)).sum()
    assert largest <= 64 * 64 * 3 * 16  # the packed projection


@pytest.mark.timeout(120)
@pytest.mark.parametrize("prefix", [0, 1])
def test_exports_with_dynamic_batch_height_and_width_beside_a_class_token_too(prefix):
    model = vitzoo.create_model(
        "vit_micro",
        mixer="agent",
        mixer_args={"agents": 9},
        class_token=bool(prefix),
        global_pool="token" if prefix else "avg",
    ).eval()
    shapes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=33, max=2048), 3: Dim("width", min=33, max=2048)}
    x = torch.randn(2, 3, 70, 94)
    exported = torch.export.export(model, (x,), dynamic_shapes=(shapes,), strict=False).module()
    for size in ((1, 3, 33, 47), (3, 3, 64, 64), (2, 3, 130, 37)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(exported(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("slot", "options", "sentence"),
    [
        ({}, {"agents": 10}, "10 agents do not fill a square: take 9 or 16"),
        ({"prefix_tokens": 1}, {"kv_ratio": 2}, "kv_ratio 2 reduces a map, and 1 prefix token"),
    ],
)
def test_what_cannot_be_built_says_why(slot, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_mixer("agent", Slot(16, 2, (4, 4), **slot), options)


def test_published_keys_of_a_plain_host_find_the_mixer_in_part_and_whole():
    model = vitzoo.create_model("vit_micro", mixer=("agent", 2))
    published = {key.replace(".mixer.", "."): value for key, value in model.state_dict().items()}
    assert set(vitzoo.checkpoints.convert(published, model)) == set(model.state_dict())
    assert set(vitzoo.checkpoints.convert(model.state_dict(), model)) == set(model.state_dict())
    one = {"blocks.1.attn.an_bias": torch.zeros(1)}
    assert set(vitzoo.checkpoints.convert(one, model)) == {"blocks.1.attn.mixer.an_bias"}


def test_a_checkpoint_of_another_image_size_gives_what_its_own_model_gives_at_that_size():
    model = vitzoo.create_model("agent_micro", img_size=(40, 56)).eval()
    larger = vitzoo.create_model("agent_micro", img_size=(72, 100)).eval()
    larger.load_state_dict(vitzoo.checkpoints.convert(model.state_dict(), larger), strict=True)
    x = torch.randn(1, 3, 72, 100)
    with torch.no_grad():
        torch.testing.assert_close(larger(x), model(x), rtol=1e-4, atol=1e-5)
