"""One adapter for each family: a function from a golden file to comparisons. Adding a family is adding an adapter."""

from __future__ import annotations

from collections.abc import Callable

from tests.golden.families import (
    a2mamba,
    adopted,
    agent,
    attention_modules,
    attnet,
    biformer,
    byoanet,
    crossformer,
    cswin,
    dat,
    explain,
    ffnet,
    flatten,
    glnet,
    maxvit,
    nat,
    ops,
    patchconvnet,
    smt,
    spectformer,
    swin,
    tap_adl,
    tokens,
    van,
)
from tests.golden.harness import Golden, Pair

ADAPTERS: dict[str, Callable[[Golden], list[Pair]]] = {
    "dat": dat.check,
    "explain": explain.check,
    "agent": agent.check,
    "biformer": biformer.check,
    "crossformer": crossformer.check,
    "cswin": cswin.check,
    "swin": swin.check,
    "swinv2": swin.check,
    **dict.fromkeys(("twins", "davit", "gcvit"), adopted.check),
    "flatten": flatten.check,
    "maxvit": maxvit.check,
    "nat": nat.check,
    "van": van.check,
    "spectformer": spectformer.check,
    "ffnet": ffnet.check,
    "attention_modules": attention_modules.check,
    "attnet": attnet.check,
    "patchconvnet": patchconvnet.check,
    "glnet": glnet.check,
    "a2mamba": a2mamba.check,
    "smt": smt.check,
    "tap_adl": tap_adl.check,
    "ops": ops.check,
    **dict.fromkeys(("halonet", "botnet", "lambdanet"), byoanet.check),
    **dict.fromkeys(
        (f"tokens_{name}" for name in ("tome", "evit", "dynamicvit", "ats", "tps", "tap", "sparsifiner", "fastervlm")),
        tokens.check,
    ),
}
