"""Token reduction: matchings and schedules, and whole models with a reduction in them. Indices exact, values to 1e-5."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.golden.families.tokens import averaging, learned, merging, pruning
from tests.golden.harness import GIVEN, OPS, Golden, Pair, judge

Check = Callable[[Golden], list[Pair]]


def check(golden: Golden) -> list[Pair]:
    family = golden.family.removeprefix("tokens_")
    case = golden.spec["builder"]
    return judge(golden, CHECKS[family, case](golden), OPS, GIVEN_ALSO.get(case, GIVEN))


CHECKS: dict[tuple[str, str], Callable[[Golden], Iterator[Pair]]] = {
    ("tome", "tome_parse_r"): merging.tome_schedules,
    ("tome", "tome_ops"): merging.tome_matching,
    ("tome", "tome_model"): merging.tome_model,
    ("evit", "evit_schedule"): pruning.evit_schedule,
    ("evit", "evit_model"): pruning.evit_model,
    ("evit", "evit_block"): pruning.evit_block,
    ("dynamicvit", "policy_softmax"): learned.policy_softmax,
    ("dynamicvit", "dyvit_loss"): learned.dynamic_loss,
    ("dynamicvit", "dyvit_eval"): lambda golden: learned.predictor_pairs(golden, "dynamicvit"),
    ("dynamicvit", "dyvit_train"): learned.dynamic_training,
    ("tps", "tps_model"): lambda golden: learned.predictor_pairs(golden, "tps"),
    ("tps", "tps_module"): learned.squeezing,
    ("ats", "ats_model"): pruning.ats_model,
    ("tap", "tap_pool"): averaging.tap_pooling,
    ("tap", "adl"): averaging.tap_diversification,
    ("tap", "tap_model"): averaging.tap_model,
    ("sparsifiner", "sparsifiner"): learned.sparse_model,
    ("fastervlm", "fastervlm"): pruning.fastervlm_selection,
}
GIVEN_ALSO = {
    "tome_ops": (*GIVEN, "metric", "size", "rand"),
    "evit_schedule": (*GIVEN, "iters_epoch"),
    "fastervlm": (*GIVEN, "logits"),
    "policy_softmax": (*GIVEN, "policy"),
    "dyvit_loss": (*GIVEN, "labels", "mask", "pred", "score/", "teacher_logits", "teacher_tokens", "token_pred"),
    "dyvit_train": (*GIVEN, "gumbel/"),
    "tps_module": (*GIVEN, "dropped", "keep", "keep_now", "prev"),
}
