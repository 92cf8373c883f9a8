"""Which configuration a kernel runs with: a rule's, a measured one's, or the fastest of a few on the GPU at hand.

Without tuning a launch takes what `TUNED` holds for its key, else what the rule of its op says; both look at shapes and the
GPU's generation only, so a call gives the same bits on every card of a generation. With `VITZOO_AUTOTUNE=1` in the environment
the first launch of a key times the rule's configuration and a few others on the tensors at hand, which takes seconds, mostly
those of the compiler. The fastest is kept for the process and in a file of its own, for the next one:

    <cache>/tuning/<GPU>, triton <version>, vitzoo <version>/<key>.json

`<cache>` is `VITZOO_CACHE`, else `$XDG_CACHE_HOME/vitzoo`, else `~/.cache/vitzoo`. A file that cannot be read is ignored, with
one warning, and written again. Under `torch.use_deterministic_algorithms` nothing is tuned, nor while a CUDA graph is captured.
"""

from __future__ import annotations

import functools
import json
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from vitzoo.ops._triton.limits import INTERPRETED

Key = tuple[Any, ...]
"""Op, pass, then what its configuration depends on: sizes, blocks of channels, generation of the GPU, dtype."""
Choice = TypeVar("Choice", bound=tuple)
Timer = Callable[[Callable[[], object]], float]

# What measurements know better than a rule, by key. None was made yet on a GPU; an entry belongs here only with the
# benchmark's table in the commit.
TUNED: dict[Key, tuple] = {}

SECONDS_PER_KEY = 10.0
"""When a key has taken so long, no further configuration is tried for it."""


def choose(key: Key, rule: Choice, others: Callable[[], Sequence[Choice]], run: Callable[[Choice], object]) -> Choice:
    """The configuration for `key`: a named tuple of integers like `rule`.

    Args:
        key: everything that the choice depends on.
        rule: what to take when nothing is known.
        others: what else is worth a try; asked only when something will be tried.
        run: launches the kernel with a configuration, on the tensors at hand; may be called many times or never.

    Returns:
        One of `rule`, `others()` and the entry of `TUNED`.
    """
    known = TUNED.get(key)
    if known is not None:
        return type(rule)(*known)
    if os.environ.get("VITZOO_AUTOTUNE", "0") != "1" or INTERPRETED or not torch.cuda.is_available():
        return rule
    if torch.are_deterministic_algorithms_enabled() or torch.cuda.is_current_stream_capturing():
        return rule
    return _tuner(torch.cuda.current_device()).choose(key, rule, others, run)


class Tuner:
    """Chooses by time, once for each key, and remembers in a folder.

    Args:
        folder: where choices are kept, one file each: processes that write different ones do not meet.
        timer: milliseconds of a call.
        clock: seconds, for what tuning itself may take.
    """

    def __init__(self, folder: Path, timer: Timer, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.timer, self.clock = folder, timer, clock
        self.chosen: dict[Key, Any] = {}
        self.warned = False

    def choose(self, key: Key, rule: Choice, others: Callable[[], Sequence[Choice]], run: Callable[[Choice], object]) -> Choice:
        """As the function `choose`, without its conditions."""
        if key not in self.chosen:
            candidates = list(dict.fromkeys([rule, *others()]))
            self.chosen[key] = self._read(key, candidates) or self._fastest(key, candidates, run)
        return self.chosen[key]

    def path(self, key: Key) -> Path:
        """The file of a key."""
        words = [str(part).removeprefix("torch.") for part in key]
        return self.folder / f"{_file_name('-'.join(words))}.json"

    def _fastest(self, key: Key, candidates: list[Choice], run: Callable[[Choice], object]) -> Choice:
        times: dict[Choice, float] = {}
        begin = self.clock()
        for candidate in candidates:
            if times and self.clock() - begin > SECONDS_PER_KEY:
                break
            try:
                times[candidate] = self.timer(lambda candidate=candidate: run(candidate))  # type: ignore[misc]
            except Exception as reason:
                if not _does_not_fit(reason):
                    raise
        if not times:
            return candidates[0]  # its launch will say what is wrong
        best = min(times, key=times.__getitem__)
        self._write(key, best, times)
        return best

    def _read(self, key: Key, candidates: list[Choice]) -> Choice | None:
        """What the file says, where it names one of the candidates: another version of the rules may have had others."""
        path = self.path(key)
        try:
            named = tuple(json.loads(path.read_text(encoding="utf-8"))["choice"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as reason:
            self._warn(f"{path} cannot be read and is ignored ({reason}).")
            return None
        return next((candidate for candidate in candidates if tuple(candidate) == named), None)

    def _write(self, key: Key, best: tuple, times: dict[Any, float]) -> None:
        """The whole file or nothing, whoever else writes it at the same time."""
        text = json.dumps(
            {
                "key": [str(part) for part in key],
                "choice": list(best),
                "milliseconds": [[list(candidate), took] for candidate, took in times.items()],
            }
        )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".part")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self.path(key))
        except OSError as reason:
            self._warn(f"Choices of kernels cannot be kept in {self.folder} ({reason}); the next process makes them again.")

    def _warn(self, sentence: str) -> None:
        if not self.warned:
            self.warned = True
            warnings.warn(f"{sentence} Set VITZOO_CACHE to another folder, or VITZOO_AUTOTUNE=0.", stacklevel=2)


def folder(device: str, triton_version: str, vitzoo_version: str) -> Path:
    """Where choices for a GPU are kept: what was fastest with another card or compiler says little."""
    home = os.environ.get("VITZOO_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "vitzoo"
    )
    return Path(home) / "tuning" / _file_name(f"{device}, triton {triton_version}, vitzoo {vitzoo_version}")


def _file_name(text: str) -> str:
    return re.sub(r"[^\w .,=+-]", "_", text)


@functools.cache
def _tuner(device: int) -> Tuner:
    from importlib.metadata import version

    where = folder(torch.cuda.get_device_name(device), version("triton"), version("vitzoo"))
    return Tuner(where, _milliseconds)


def _milliseconds(run: Callable[[], object]) -> float:
    """Median of a few launches, once the kernel is compiled and its inputs are as warm as they get."""
    for _ in range(2):
        run()
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def _does_not_fit(reason: Exception) -> bool:
    """Whether a configuration wants more of the GPU than it has, or than the compiler can do: then another one is right."""
    if isinstance(reason, torch.OutOfMemoryError):
        return True
    from triton.errors import TritonError

    return isinstance(reason, TritonError)
