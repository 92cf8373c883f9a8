"""Stop when the machine asks for it: save at the next batch where a run can go on exactly, and say so by the exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from typing import Any

from lightning.pytorch import Trainer

from vitzoo.tasks.progress import say

__all__ = ["StopRequest", "Stopped", "any_process"]

_EVERY = 10  # batches between two exchanges among processes


def any_process(trainer: Trainer, mine: bool, batches: int) -> bool:
    """Whether ``mine`` holds in any process; several of them exchange it after every tenth batch only, else it is False."""
    if trainer.world_size == 1:
        return mine
    return batches % _EVERY == 0 and bool(trainer.strategy.reduce_boolean_decision(mine, all=False))


class Stopped(SystemExit):
    """The run was asked to stop and has; status 143 (128 + SIGTERM), so that a launcher does not take it for a success."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopRequest:
    """Notes SIGTERM and SIGUSR1; nothing happens inside a signal's handler.

    SIGTERM is what Kubernetes, Slurm at the end of its patience, and ``kill`` send. SIGUSR1 is what ``#SBATCH
    --signal=USR1@120`` sends some time before; after it the job is put into Slurm's queue again.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._batches, self._agreed = 0, False

    def listen(self, trainer: Trainer) -> None:
        """Take both signals over from Lightning, which gives them back when the run ends."""

        def note(signum: int, _: Any) -> None:
            first, self.signum = self.signum is None, signum
            launcher = trainer.strategy.launcher
            if first and hasattr(launcher, "kill"):
                launcher.kill(signum)  # the processes that this one started

        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, note)
            signal.signal(signal.SIGUSR1, note)

    def agreed(self, trainer: Trainer) -> bool:
        """Whether any process was asked to stop; all of them call this after each batch and get the same answer."""
        self._batches += 1
        self._agreed = self._agreed or any_process(trainer, self.signum is not None, self._batches)
        return self._agreed

    def stop(self, trainer: Trainer, kept: str) -> None:
        """Say what was kept, put the job back into Slurm's queue where that was asked for, and raise :class:`Stopped`."""
        say(f"\nstopped by {signal.Signals(self.signum or signal.SIGTERM).name} after {trainer.global_step} updates; {kept}")
        job = os.environ.get("SLURM_JOB_ID")
        if self.signum == signal.SIGUSR1 and job and trainer.is_global_zero:
            array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
            job = f"{array}_{task}" if array and task else job
            try:
                done = subprocess.run(["scontrol", "requeue", job], check=False).returncode == 0
            except OSError:
                done = False
            say(f"job {job} is in the queue again" if done else f"scontrol could not requeue job {job}")
        raise Stopped
