"""SMT, from the arguments of the published class."""

from __future__ import annotations

from tests.golden.harness import GIVEN, MODELS, Golden, Pair, compare_model, judge, renamed
from vitzoo.models.smt import SMT

ARGUMENTS = {
    "embed_dims": "embed_dim",
    "mlp_ratios": "mlp_ratio",
    "head_conv": "stem_size",
    "expand_ratio": "expand",
    **{name: name for name in ("qkv_bias", "depths", "num_classes")},
    **dict.fromkeys(("ca_num_heads", "sa_num_heads", "ca_attentions", "use_layerscale")),
}


def check(golden: Golden) -> list[Pair]:
    published = golden.kwargs
    (scales,) = {heads for heads in published["ca_num_heads"] if heads > 0}
    # the published code alternates in its third stage, whatever it is told
    mixing = ["modulate" if modulates else "attend" for modulates in published["ca_attentions"]]
    mixing[2] = "alternate"
    model = SMT(
        **renamed(published, ARGUMENTS),
        mixing=tuple(mixing),
        scales=scales,
        num_heads=tuple(max(1, heads) for heads in published["sa_num_heads"]),
        layer_scale=1e-4 if published.get("use_layerscale") else None,
        drop_odd=True,
    )
    return judge(golden, compare_model(golden, model), MODELS, GIVEN)
