"""What went wrong, in one sentence: which step and pictures, what the machine lacks, what does not fit."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vitzoo.data.errors import UserError, sentence

if TYPE_CHECKING:
    from vitzoo.tasks.base import Task

__all__ = ["in_words", "not_finite"]


def not_finite(task: Task, batch: int) -> str:
    """Where a loss was not finite, from which pictures (all of them in a file), and what to go on from.

    Args:
        task: Whose loss.
        batch: Counted over the run; below 0 where it was another process'.

    Returns:
        The sentence.
    """
    trainer = task.trainer
    saver = next((c for c in trainer.callbacks if hasattr(c, "kept")), None)
    kept = saver.kept() if saver is not None else "this run writes no checkpoints"
    way_out = "a lower --model.lr, --trainer.gradient_clip_val 1 or --trainer.precision 32-true may help"
    if batch < 0:
        return f"The loss of another process is not finite, see there; {kept}; {way_out}."
    epoch, place = divmod(batch, max(1, trainer.num_training_batches))
    where = f"epoch {epoch + 1}, batch {place + 1}, after {trainer.global_step} updates"
    names = trainer.datamodule.names_of(epoch, place) if trainer.datamodule is not None else []
    shown = f"; its pictures are {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
    try:
        listed = Path(trainer.default_root_dir) / f"not_finite-{trainer.global_rank}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("\n".join(names) + "\n", encoding="utf-8")
        shown += f", all in {listed}"
    except OSError:
        pass  # a full disk must not hide the reason
    return f"The loss is not finite in {where}{shown}. {kept}; {way_out}."


def in_words(error: BaseException) -> str | None:
    """One sentence for an error that a user can mend, or None for one that is a defect and deserves its traceback.

    Args:
        error: What reached ``train.py``.

    Returns:
        The sentence, without a line break.
    """
    text = " ".join(sentence(error).split())
    if isinstance(error, UserError):
        return text
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "The device's memory is too small for a step. Halve --data.batch_size and double "
            "--trainer.accumulate_grad_batches (the same update), or give --model.grad_checkpointing true."
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full ({error.filename or text}). Make room or give another --out; --ckpt_path last goes on."
    if isinstance(error, PermissionError):
        return f"{error.filename or text} may not be written or read. Give another --out or --data.root, or the rights."
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}. Is --out, --data.root or another path wrong?"
    if type(error).__name__ == "MisconfigurationException":  # Lightning's, and importing it here costs seconds
        return f"{text} (--trainer.accelerator cpu always works; --trainer.devices is the number to use.)"
    if isinstance(error, ValueError) and ("optimizer" in text or "parameter group" in text) and "loaded state" in text:
        return "The checkpoint's optimiser is another one: go on with the model.optimizer and decay it was trained with."
    return None
