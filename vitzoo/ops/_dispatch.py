"""Which implementation of an op runs: one rule for all ops.

An implementation answers `supports(call)` with None or with a reason in plain words. A call that names none takes the first
in the op's order of preference that supports it. A call that names one gets it, or a ValueError with its reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_OPS: dict[str, Op] = {}
_watchers: list[Callable[[str, Any], tuple | None]] = []
_forced: list[str] = []  # a plain global: Dynamo guards on it, and compiles again inside another `using`


@dataclass(frozen=True)
class Implementation:
    """One way to run an op: `run(call)` returns the op's results (out, and lse or None) wherever `supports(call)` is None."""

    name: str
    supports: Callable[[Any], str | None]
    run: Callable[[Any], tuple]


@dataclass(frozen=True)
class Op:
    """A public function, how its arguments become a validated call, and its implementations, the preferred one first."""

    name: str
    prepare: Callable[..., Any]
    implementations: tuple[Implementation, ...]

    def __post_init__(self) -> None:
        _OPS[self.name] = self

    def choose(self, call: Any, impl: str | None) -> Implementation:
        """The implementation that runs `call`; raises ValueError where the one asked for cannot."""
        names = [each.name for each in self.implementations]
        wanted = impl
        for name in _forced:  # the innermost block that names one of this op's implementations
            if impl is None and name in names:
                wanted = name
        if wanted is None:
            for each in self.implementations:
                if each.supports(call) is None:
                    return each
            raise ValueError(f"No implementation of {self.name} takes this call. {_answers(self, call)}")
        for each in self.implementations:
            if each.name == wanted:
                reason = each.supports(call)
                if reason is not None:
                    raise ValueError(f"{self.name} cannot run as {wanted}: {reason}")
                return each
        raise ValueError(f"{self.name} has no implementation {wanted!r}; it has {', '.join(names)}.")

    def run(self, call: Any, impl: str | None) -> tuple:
        """The results of `call`, a tuple of fields with a tensor first. Autocast has been obeyed and is off inside."""
        if _watchers and not torch.compiler.is_compiling():
            seen = _watchers[-1](self.name, call)
            if seen is not None:
                return seen
        chosen = self.choose(call, impl)
        device = call[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return chosen.run(call)
        return chosen.run(call)


def _answers(op: Op, call: Any) -> str:
    return "; ".join(f"{each.name}: {each.supports(call) or 'yes'}" for each in op.implementations)


def explain(op: Callable, *args: Any, **kwargs: Any) -> str:
    """What every implementation of `op` says to a call, one line each; the one that would run carries an arrow.

    Takes the op and the arguments of the call: `print(explain(attend2d, q, k, v, window(7)))`. Runs nothing. Raises
    what the call itself would raise for its arguments.
    """
    entry = _OPS[op.__name__]
    impl = kwargs.pop("impl", None)
    call = entry.prepare(*args, **kwargs)
    try:
        chosen = entry.choose(call, impl)
    except ValueError:
        chosen = None
    lines = [
        f"{'->' if each is chosen else '  '} {entry.name} {each.name}: {each.supports(call) or 'supports this call'}"
        for each in entry.implementations
    ]
    return "\n".join(lines)


class using:
    """Run every op that has an implementation called `name` as that one: `with using("reference"): ...`

    Ops without one choose as they would outside the block, so that `using("sdpa")` holds for a model some of whose ops are
    computed in another way. Of nested blocks the innermost that means an op counts, and an `impl=` in a call counts more. An
    implementation that does not support a call raises ValueError, and so does a name that no op knows. The choice holds for
    the process, not for one thread.
    """

    def __init__(self, name: str) -> None:
        known = {each.name for op in _OPS.values() for each in op.implementations}
        if name not in known:
            raise ValueError(f"No op has an implementation {name!r}; there are {', '.join(sorted(known))}.")
        self.name = name

    def __enter__(self) -> using:
        _forced.append(self.name)
        return self

    def __exit__(self, *exc: object) -> None:
        _forced.pop()


class watching:
    """Show every call of an op inside the block to a function: `with watching(lambda name, call: ...): ...`

    It gets the op's name and the validated call. What it returns, unless None, is the result; the innermost block counts.
    Graphs that are being captured are not watched.
    """

    def __init__(self, watcher: Callable[[str, Any], tuple | None]) -> None:
        self.watcher = watcher

    def __enter__(self) -> watching:
        _watchers.append(self.watcher)
        return self

    def __exit__(self, *exc: object) -> None:
        _watchers.pop()
