"""Train once undisturbed and once with SIGKILLs at random moments, each time resumed; compare bit for bit.

    python tests/kill_and_resume.py FOLDER --kills 5 [--writing 5] [--seed 0] [--epochs 4] [--workers 0] [--term 1]

The first ``--kills`` come at random moments, the next ``--writing`` while a checkpoint lies on the disk half written (its
writing is slowed down for that), the next ``--term`` stops are SIGTERM, after which the run must have saved and exited with
143. One process imports everything and forks a child for each attempt, so that an attempt costs training and no imports. The
run is small but has what makes resuming hard: gradient accumulation over a number of batches that it does not divide,
several epochs with a validation each, mixup and cutmix, drop path, random augmentation, averaged weights, clipping, a
schedule by update, a checkpoint after every update (so that many kills fall into its writing). Prints one line of JSON.
"""

import argparse
import csv
import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

RUN = [
    "fit",
    "--config",
    "configs/quickstart.yaml",
    "--trainer.limit_train_batches",
    "9",
    "--trainer.limit_val_batches",
    "2",
    "--trainer.accumulate_grad_batches",
    "2",
    "--trainer.accelerator",
    "cpu",
    "--data.batch_size",
    "16",
    "--data.auto_augment",
    "rand-m9-mstd0.5-inc1",
    "--data.re_prob",
    "0.25",
    "--model.mixup",
    "0.8",
    "--model.cutmix",
    "1.0",
    "--model.drop_path",
    "0.3",
    "--model.ema",
    "0.9",
    "--model.warmup_epochs",
    "1",
    "--save_every",
    "1",
    "--ckpt_path",
    "last",
]


def child(out: Path, log: Path, given: argparse.Namespace) -> int:
    """Start an attempt in a process of its own; returns its id."""
    pid = os.fork()
    if pid:
        os.setpgid(pid, pid)  # by both, so that a kill finds the group however late the child comes to it
        return pid
    os.setpgid(0, 0)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = 1
    try:
        import train

        torch.save = halting(torch.save)
        sys.argv = ["train.py", *RUN, "--out", str(out)]
        sys.argv += ["--data.num_workers", str(given.workers), "--trainer.max_epochs", str(given.epochs)]
        train.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def halting(save):
    """``torch.save`` that rests where half of the file is on the disk."""

    def slow(checkpoint, file):
        whole = io.BytesIO()
        save(checkpoint, whole)
        content = whole.getvalue()
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(0.02)
        file.write(content[len(content) // 2 :])

    return slow


def interrupt_writing(pid: int, out: Path, number: int) -> bool:
    """Kill a child in the middle of its ``number``-th checkpoint from now; whether it still ran."""
    beside, seen, before = out / "last.ckpt.tmp", 0, None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0
            return False
        now = stamp(beside)
        if now is not None and now[0] != before:
            seen, before = seen + 1, now[0]
            if seen >= number:
                time.sleep(0.004)
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return True
        if now is None:
            before = None
        time.sleep(0.001)


def terminate(pid: int, out: Path, then: float) -> int:
    """Ask a child to stop once it has written a checkpoint; its exit status."""
    first = stamp(out / "last.ckpt")
    while stamp(out / "last.ckpt") == first:
        time.sleep(0.002)
    time.sleep(then)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def finish(pid: int, watched: Path | None = None, updates: int = 0, then: float = 0.0) -> int | None:
    """Wait for a child; kill its group ``then`` seconds after it has written ``watched`` ``updates`` times.

    Returns its exit status, or None where it was killed.
    """
    written, last, moment = 0, stamp(watched), None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if watched is not None:
            last, before = stamp(watched), last
            written += last != before
            if moment is None and written >= updates:
                moment = time.monotonic() + then
            if moment is not None and time.monotonic() > moment:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return None
        time.sleep(0.002)


def stamp(path: Path | None) -> tuple[int, int] | None:
    """What changes when a file is replaced."""
    if path is None or not path.exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_mtime_ns


def differences(a: dict, b: dict, path: str = "") -> list[str]:
    """Where two nested checkpoints are not equal, tensors by ``torch.equal``."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        keys = a.keys() | b.keys()
        return [d for k in keys for d in (differences(a[k], b[k], f"{path}/{k}") if k in a and k in b else [f"{path}/{k}"])]
    if isinstance(a, (list, tuple)):
        same = len(a) == len(b)
        return (
            [d for i, pair in enumerate(zip(a, b, strict=False)) for d in differences(*pair, f"{path}/{i}")] if same else [path]
        )
    return [] if a == b else [path]


def figures(out: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without what depends on the clock."""
    with open(out / "metrics.csv") as file:
        return [{k: v for k, v in row.items() if k not in ("seconds", "images_per_second")} for row in csv.DictReader(file)]


def main() -> None:
    """Run both, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--writing", type=int, default=0)
    parser.add_argument("--term", type=int, default=0)
    parser.add_argument("--longest", type=float, default=0.3, help="seconds at most between a checkpoint and the kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--workers", type=int, default=0)
    given = parser.parse_args()
    os.chdir(ROOT)
    torch.set_num_threads(1)
    import vitzoo.tasks.cli  # noqa: F401 (so that the children need not)

    given.folder.mkdir(parents=True, exist_ok=True)
    calm, rough = given.folder / "calm", given.folder / "rough"
    began = time.monotonic()
    assert finish(child(calm, given.folder / "calm.log", given)) == 0, (given.folder / "calm.log").read_text()

    draw, kills, attempts, halves, terms = random.Random(given.seed), 0, 0, 0, 0
    while True:
        attempts += 1
        pid = child(rough, given.folder / "rough.log", given)
        if kills < given.kills:
            status = finish(pid, rough / "last.ckpt", draw.randrange(4), draw.uniform(0, given.longest))
        elif halves < given.writing:
            if interrupt_writing(pid, rough, draw.randrange(1, 4)):
                halves += (rough / "last.ckpt.tmp").exists()
                continue
            break
        elif terms < given.term:
            status = terminate(pid, rough, draw.uniform(0, given.longest))
            if status == 143:
                terms += 1
                assert not (rough / "last.ckpt.tmp").exists()
                continue
        else:
            status = finish(pid)
        if status is None:
            kills += 1
            continue
        assert status == 0, (given.folder / "rough.log").read_text()[-3000:]
        break
    a, b = (torch.load(out / "last.ckpt", weights_only=True) for out in (calm, rough))
    parts = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    differ = [d for part in parts for d in differences(a[part], b[part], part)]
    print(
        json.dumps(
            {
                "kills": kills,
                "half_written": halves,
                "stopped": terms,
                "attempts": attempts,
                "updates": a["global_step"],
                "differences": differ[:10],
                "rows_equal": figures(calm) == figures(rough),
                "rows": len(figures(rough)),
                "tensors": len(a["state_dict"]),
                "seconds": round(time.monotonic() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
