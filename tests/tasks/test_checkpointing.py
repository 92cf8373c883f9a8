from __future__ import annotations

import pytest
import torch

from vitzoo.tasks.checkpointing import AtomicCheckpointIO


def test_a_crash_while_writing_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    io, path = AtomicCheckpointIO(), tmp_path / "new" / "last.ckpt"
    io.save_checkpoint({"step": 1}, path)

    def crash(checkpoint, file):
        file.write(b"half a checkpoint")
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="No space"):
        io.save_checkpoint({"step": 2}, path)
    assert io.load_checkpoint(path) == {"step": 1}


def test_nothing_that_could_run_code_is_loaded(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (print, ("code ran",))

    torch.save({"x": Hostile()}, tmp_path / "hostile.ckpt")
    with pytest.raises(Exception, match=r"[Ww]eights.only|Unsupported"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "hostile.ckpt", weights_only=False)
