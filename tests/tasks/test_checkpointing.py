from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest
import torch

from vitzoo.data import UserError
from vitzoo.tasks.checkpointing import AtomicCheckpointIO
from vitzoo.tasks.stopping import StopRequest


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def crash(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(UserError, match=r"No space left on device\); the one written before, .*last\.ckpt, is whole"):
        io.save_checkpoint({"step": 2}, path)
    assert torch.load(path) == {"step": 1}
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]  # the half that was written gives its room back


def test_weights_that_are_no_run_are_sent_to_another_key(tmp_path):
    torch.save({"state_dict": {"head.weight": torch.zeros(2)}}, tmp_path / "published.pth")
    with pytest.raises(UserError, match=r"--model\.weights"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "published.pth")


class Strategy:
    """Of a trainer with two processes: what the other one says is set from outside."""

    launcher, other, asked = None, False, 0

    def reduce_boolean_decision(self, mine, all):  # noqa: A002
        self.asked += 1
        return mine or self.other


def test_processes_agree_on_stopping_without_an_exchange_after_every_batch():
    trainer = SimpleNamespace(strategy=Strategy(), world_size=2)
    request = StopRequest()
    for _ in range(19):
        assert not request.agreed(trainer)
    assert trainer.strategy.asked == 1
    trainer.strategy.other = True
    assert request.agreed(trainer)
    assert request.agreed(trainer)  # and stays so until a batch that may be saved
    assert trainer.strategy.asked == 2


def test_a_warning_from_slurm_puts_the_job_back_into_the_queue(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ > {tmp_path}/said\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    request = StopRequest()
    request.signum = signal.SIGUSR1
    with pytest.raises(SystemExit) as stopped:
        request.stop(SimpleNamespace(global_step=3, is_global_zero=True), "kept")
    assert stopped.value.code == 143
    assert (tmp_path / "said").read_text() == "requeue 7\n"


def test_nothing_that_could_run_code_is_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"x": Hostile()}, tmp_path / "hostile.ckpt")
    with pytest.raises(UserError, match="could run code"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
