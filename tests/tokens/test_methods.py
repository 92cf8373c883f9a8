"""What each method's functions promise, on awkward data: ties, one token, more asked for than there is."""

from __future__ import annotations

import pytest
import torch

from tests.tokens.conftest import host, image
from tests.tokens.test_reduce import reduced
from vitzoo import tokens
from vitzoo.ops import attend
from vitzoo.tokens import ats, mstm, spa, tome, tps
from vitzoo.tokens._map import TokenMap, complement


@pytest.mark.parametrize("prefix", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 17, 40])
@pytest.mark.parametrize("r", [0, 1, 7, 1000])
@pytest.mark.parametrize("data", ["random", "all equal", "zeros"])
def test_matching_keeps_every_token_somewhere_and_the_prefix_in_front(prefix, length, r, data):
    metric = torch.randn(1, length, 4)
    metric = {"random": metric, "all equal": torch.ones_like(metric), "zeros": torch.zeros_like(metric)}[data]
    step = tome.bipartite_matching(metric, r, prefix)
    gone = max(0, min(r, (length - prefix) // 2))
    if gone == 0:
        assert step is None
        return
    x = torch.randn(1, length, 3)
    merged, size = step.average(x, torch.ones(1, length))
    assert merged.shape == (1, length - gone, 3)
    assert size.sum() == length
    assert (step.source >= 0).all()
    assert step.source[0, :prefix].tolist() == list(range(prefix))
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    torch.testing.assert_close((merged * size[..., None]).sum(1), x.sum(1), rtol=1e-4, atol=1e-5)


def test_a_batch_is_matched_image_by_image():
    metric = torch.randn(5, 21, 8)
    whole = tome.bipartite_matching(metric, 6, 1)
    for i in range(5):
        one = tome.bipartite_matching(metric[i : i + 1], 6, 1)
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole[:3], one[:3], strict=True))


def test_merging_equal_tokens_is_exact_and_untouched_ones_keep_their_bits():
    step = TokenMap(torch.tensor([[0, 1, 3]]), torch.tensor([[2, 4]]), torch.tensor([[1, 1]]), 5)
    x = torch.randn(1, 5, 3)
    x[:, 2] = x[:, 4] = x[:, 1]
    merged, size = step.average(x, torch.ones(1, 5))
    assert size.tolist() == [[1.0, 3.0, 1.0]]
    torch.testing.assert_close(merged[:, 1], x[:, 1])
    assert torch.equal(merged[:, [0, 2]], x[:, [0, 3]])
    assert torch.equal(step.unmerge(merged)[:, 4], merged[:, 1])
    with pytest.raises(ValueError, match="'sum', 'mean' or 'amax', got 'median'"):
        step.merge(x, "median")


def test_a_merge_has_the_gradient_of_a_mean():
    step = tome.bipartite_matching(torch.randn(2, 11, 4), 4, 1)
    x = torch.randn(2, 11, 3, dtype=torch.float64, requires_grad=True)
    size = torch.rand(2, 11, dtype=torch.float64) + 1
    assert torch.autograd.gradcheck(lambda t: step.average(t, size)[0], x)


def test_the_complement_is_what_is_left_in_order():
    assert complement(torch.tensor([[4, 0], [1, 2]]), 5).tolist() == [[1, 2, 3], [0, 3, 4]]


@pytest.mark.parametrize(
    ("depth", "r", "expected"),
    [(4, 3, (3, 3, 3, 3)), (4, [5, 1], (5, 1, 0, 0)), (2, [5, 1, 9], (5, 1)), (3, (4, -1.0), (8, 4, 0)), (1, 2, (2,))],
)
def test_merge_schedules(depth, r, expected):
    assert tokens.merge_schedule(depth, r) == expected


def test_a_wrong_schedule_is_refused():
    with pytest.raises(ValueError, match="cannot be negative"):
        tokens.merge_schedule(3, -1)
    with pytest.raises(ValueError, match="bends a single r"):
        tokens.merge_schedule(3, [1, 2], -1.0)
    with pytest.raises(ValueError, match=r"in \(0, 1\], got 1.5"):
        tokens.reduce(host("ours"), "evit", keep_rate=1.5)
    with pytest.raises(ValueError, match="the model has blocks 0 to 3"):
        tokens.reduce(host("ours"), "evit", layers=(4,))
    with pytest.raises(ValueError, match="3 rates and the model has 4 blocks"):
        tokens.reduce(host("ours"), "evit", keep_rate=(0.5, 0.5, 0.5))


@pytest.mark.parametrize("method", ["tome", "mstm"])
def test_sizes_count_every_patch_once(method):
    model = reduced("ours, registers and layer scale", method)
    with tokens._method.watching(model.token_reduction, range(4), 4) as watch, torch.no_grad():
        model(image())
    for i, state in watch.states.items():
        if state.size is not None:
            assert state.size.sum(1).tolist() == [69.0, 69.0], i
            counted = torch.zeros_like(state.size).scatter_add(1, state.source, torch.ones(state.source.shape))
            assert torch.equal(counted, state.size)


def test_a_larger_r_than_possible_leaves_the_prefix_and_one_patch():
    model = tokens.reduce(host("ours"), "tome", r=1000)
    with torch.no_grad():
        assert model.forward_features(image()).shape[1] == 1 + 64 // 2 // 2 // 2 // 2


def test_sampling_more_often_than_there_are_tokens_picks_all_that_matter():
    index, picked = ats.sample_tokens(torch.tensor([[0.25, 0.0, 0.25, 0.25, 0.25]]), 100)
    assert picked.sum() >= 3
    assert sorted(index[0].tolist()) == list(range(5))
    assert not picked[0, index[0].tolist().index(1)]


@pytest.mark.parametrize("scores", [torch.ones(1, 1), torch.ones(2, 6), torch.zeros(1, 4)])
def test_sampling_of_ties_picks_something(scores):
    index, picked = ats.sample_tokens(scores.clamp(min=1e-12), 8)
    assert picked.any(dim=1).all()
    assert index.sort(1).values.tolist() == [list(range(scores.shape[1]))] * len(scores)


def test_packing_a_sampled_batch_leaves_out_padding_only():
    loose, packed = (tokens.reduce(host("ours"), "ats", layers=(3,), pack=pack) for pack in (False, True))
    with torch.no_grad():
        assert loose.forward_features(image()).shape[1] == 65
        assert packed.forward_features(image()).shape[1] < 65
        torch.testing.assert_close(packed(image()), loose(image()))


def test_squeezing_in_training_equals_squeezing_in_evaluation():
    x = torch.randn(2, 9, 5)
    kept = torch.tensor([[0, 2, 5, 7], [1, 2, 3, 8]])
    gone = complement(kept, 9)
    mask = torch.zeros(2, 9).scatter(1, kept, 1.0)
    squeezed, _ = tps.squeeze(*(torch.take_along_dim(x, i[..., None], 1) for i in (kept, gone)))
    masked = tps.squeeze_masked(x, mask, torch.ones(2, 9))
    torch.testing.assert_close(torch.take_along_dim(masked, kept[..., None], 1), squeezed)


def test_packed_attention_of_whole_images_is_attention():
    q, k, v = torch.randn(3, 2, 7, 3, 4)
    packed = spa.pack(torch.ones(2, 7, dtype=torch.bool))
    flat = [t.flatten(0, 1) for t in (q, k, v)]
    torch.testing.assert_close(spa.packed_attend(*flat, packed.image, 7).view(2, 7, 3, 4), attend(q, k, v))


def test_packed_images_never_see_each_other():
    chosen = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    packed = spa.pack(chosen)
    assert packed.image.tolist() == [0, 0, 0, 1, 1, 1]
    q, k, v = torch.randn(3, 6, 2, 4)
    before = spa.packed_attend(q, k, v, packed.image, 4)
    other = k.clone()
    other[:3] += 1.0
    after = spa.packed_attend(q, other, v, packed.image, 4)
    assert torch.equal(before[3:], after[3:])
    assert not torch.equal(before[:3], after[:3])


def test_spa_with_every_gate_open_is_attention_on_gated_tokens():
    model = tokens.reduce(host("ours"), "spa", threshold=-1.0)
    for i in model.token_reduction.where:
        torch.nn.init.zeros_(model.blocks[i].gate.weight)
        torch.nn.init.constant_(model.blocks[i].gate.bias, 50.0)  # sigmoid 1
    with torch.no_grad():
        torch.testing.assert_close(model(image()), host("ours")(image()), rtol=1e-4, atol=1e-5)


def test_skipped_patches_come_back_where_they_were():
    model = tokens.reduce(host("ours"), "skipvit", keep_rate=0.4, drop_layer=1, return_layer=3)
    plain = host("ours")
    assert tokens.reduce(plain, "skipvit", drop_layer=2, return_layer=2)(image()).equal(host("ours")(image()))
    x = image().requires_grad_()
    with tokens._method.watching(model.token_reduction, range(4), 4) as watch:
        model(x)
    assert [watch.states[i].x.shape[1] for i in range(4)] == [65, 27, 27, 65]
    assert watch.states[3].source is None
    model(x).sum().backward()
    assert x.grad.isfinite().all()


def test_merging_into_crucial_patches_goes_by_direction():
    x = torch.tensor([[[9.0, 9.0], [1.0, 0.0], [0.0, 1.0], [5.0, 0.1], [0.1, 5.0]]])
    step = mstm.merge_into_crucial(x, torch.tensor([[0, 1]]), prefix=1)
    assert step.source.tolist() == [[0, 1, 2, 1, 2]]


def test_selected_tokens_keep_the_order_of_the_image():
    features, scores = torch.randn(2, 6, 3), torch.tensor([[1.0, 5, 2, 4, 3, 0], [1, 1, 1, 1, 1, 1]])
    kept, index, mask = tokens.select_tokens(features, scores, 3)
    assert index[0].tolist() == [1, 3, 4]
    assert index[1].tolist() == sorted(index[1].tolist())
    assert torch.equal(kept, features[mask].view(2, 3, 3))
    assert torch.equal(tokens.select_tokens(features, scores, 6)[0], features)
    with pytest.raises(ValueError, match="7 tokens of 6"):
        tokens.select_tokens(features, scores, 7)


@pytest.mark.parametrize("name", ["ours, registers and layer scale", "clip", "deit, distilled", "post-norm"])
def test_an_encoders_output_is_chosen_by_a_dense_softmax(name):
    model, x = host(name), image()
    with torch.no_grad():
        kept, index, _ = tokens.encode_and_select(model, x, 9)
        weights = []
        attn = model.blocks[2].attn
        handle = attn.register_forward_pre_hook(lambda m, given: weights.append(given[0]))
        hidden = model.forward_intermediates(x, indices=[2], output_fmt="NLC", intermediates_only=True)[0]
        handle.remove()
        q, k, _ = attn.qkv(weights[0]).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        row = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1).mean(1)[:, 0]
        best = row[:, model.num_prefix_tokens :].topk(9).indices.sort(1).values
    assert torch.equal(index, best)
    torch.testing.assert_close(kept, torch.take_along_dim(hidden, best[..., None], 1))
    with pytest.raises(ValueError, match="has no class token"):
        tokens.encode_and_select(host("siglip"), x, 9)
