"""Which implementation runs, and what is said when one cannot."""

from __future__ import annotations

import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from vitzoo.layers import DeformableAttention
from vitzoo.ops import attend, attend2d, explain, using
from vitzoo.ops._dispatch import Implementation, Op
from vitzoo.patterns import window


@pytest.fixture
def q() -> torch.Tensor:
    return torch.randn(1, 4, 4, 2, 8)


def made_up_op(answers: dict[str, str | None]) -> Op:
    """An op on tensors whose implementations answer as told and return their own name."""
    return Op(
        "made_up",
        namedtuple("Call", "q"),
        tuple(
            Implementation(name, lambda call, answer=answer: answer, lambda call, name=name: (name, None))
            for name, answer in answers.items()
        ),
    )


def test_the_first_that_supports_the_call_runs(q):
    op = made_up_op({"fast": "it needs a GPU.", "middle": None, "slow": None})
    assert op.run(op.prepare(q), None)[0] == "middle"


def test_a_named_implementation_runs_or_gives_its_reason_and_never_another(q):
    op = made_up_op({"fast": "it needs a GPU.", "slow": None})
    assert op.run(op.prepare(q), "slow")[0] == "slow"
    with pytest.raises(ValueError, match=r"made_up cannot run as fast: it needs a GPU\."):
        op.run(op.prepare(q), "fast")
    with pytest.raises(ValueError, match="no implementation 'quick'; it has fast, slow"):
        op.run(op.prepare(q), "quick")


def test_when_nothing_supports_a_call_every_reason_is_told(q):
    op = made_up_op({"fast": "it needs a GPU.", "slow": "the map is too large."})
    with pytest.raises(ValueError, match=r"fast: it needs a GPU\.; slow: the map is too large\."):
        op.run(op.prepare(q), None)


def test_using_fixes_the_implementation_for_a_block(q, monkeypatch):
    ran = []
    for op in (attend2d, attend):
        entry = sys.modules[op.__module__].OP
        spied = tuple(
            Implementation(i.name, i.supports, lambda call, i=i: (ran.append(i.name), i.run(call))[1])
            for i in entry.implementations
        )
        monkeypatch.setattr(sys.modules[op.__module__], "OP", Op(entry.name, entry.prepare, spied))
    with using("reference"):
        attend2d(q, q, q, window(2))
        attend(q[0], q[0], q[0])
        with using("sdpa"):
            attend2d(q, q, q, window(2))
        attend2d(q, q, q, window(2), impl="sdpa")
        attend2d(q, q, q, window(2))
    with pytest.raises(RuntimeError, match="inside"), using("reference"):
        raise RuntimeError("inside")
    attend2d(q, q, q, window(2))
    assert ran == ["reference", "reference", "sdpa", "sdpa", "reference", "sdpa"]


def test_using_leaves_ops_without_such_an_implementation_their_choice(q):
    op = made_up_op({"nowhere_else": "it needs a GPU.", "sdpa": None, "slow": None})
    call = op.prepare(q)
    with using("triton"):  # another op's
        assert op.run(call, None)[0] == "sdpa"
        with pytest.raises(ValueError, match="made_up has no implementation 'triton'; it has nowhere_else, sdpa, slow"):
            op.run(call, "triton")
    with using("slow"), using("triton"):
        assert op.run(call, None)[0] == "slow"
    with using("nowhere_else"), pytest.raises(ValueError, match=r"cannot run as nowhere_else: it needs a GPU\."):
        op.run(call, None)
    op.run(call, None)


def test_using_runs_models_of_several_ops():
    layer, x = DeformableAttention(8, 2, (4, 4)), torch.randn(1, 4, 5, 8)  # sample2d has no implementation of the name sdpa
    expected = layer(x)
    with using("sdpa"):
        torch.testing.assert_close(layer(x), expected)


def test_using_refuses_a_name_that_no_op_has():
    with pytest.raises(ValueError, match=r"No op has an implementation 'cudnn'; there are .*reference, sdpa"):
        using("cudnn")


def test_explain_tells_what_would_run_and_runs_nothing(q):
    lines = explain(attend2d, q, q, q, window(2)).splitlines()
    assert "-> attend2d sdpa: supports this call" in lines
    assert "   attend2d reference: supports this call" in lines
    with using("reference"):
        assert "-> attend2d reference" in explain(attend2d, q, q, q, window(2))
    assert "-> attend sdpa" in explain(attend, q[0], q[0], q[0])
    with pytest.raises(ValueError, match="of one shape"):
        explain(attend2d, q, q, q[:, :2], window(2))


def test_importing_patterns_needs_no_torch_and_ops_no_kernels():
    program = """
import importlib.machinery, sys, types
package = types.ModuleType("vitzoo")
package.__path__ = [sys.argv[1]]
sys.modules["vitzoo"] = package
import vitzoo.patterns
assert "torch" not in sys.modules
import vitzoo.ops
loaded = [name for name in sys.modules if name.startswith("vitzoo") and "triton" in name and name.count(".") > 3]
assert not loaded, loaded
assert "torch._dynamo" not in sys.modules
assert "torch._inductor" not in sys.modules
"""
    folder = sys.modules["vitzoo.patterns"].__file__.removesuffix("patterns.py")
    subprocess.run([sys.executable, "-c", program, folder], check=True)
