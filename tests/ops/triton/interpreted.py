"""The kernels in Triton's interpreter: a process of its own, because TRITON_INTERPRET counts when triton is first imported.

Reads names of cases of any op from standard input, one a line, and answers each with a line of JSON: the largest absolute error
of every result against the fp64 oracle, relative to the largest value where that exceeds 1; or {"raised": traceback}.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import torch

from tests.ops.triton import (
    attend2d_cases,
    attend_cases,
    candidate_cases,
    point_cases,
    product_cases,
    routed_cases,
    sample_cases,
    scan_cases,
)

MODULES = (attend2d_cases, attend_cases, candidate_cases, point_cases, product_cases, routed_cases, sample_cases, scan_cases)

if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fills uninitialised memory with NaN
    torch.utils.deterministic.fill_uninitialized_memory = True
    for line in sys.stdin:
        try:
            name = line.strip()
            if name == "spans":
                answer: dict[str, float] = attend2d_cases.spans()
            else:
                module = next(module for module in MODULES if name in module.CASES)
                answer = module.measure(module.CASES[name])
        except Exception:  # whatever it is, the test that asked raises it
            answer = {"raised": traceback.format_exc()}
        print(json.dumps(answer), flush=True)
