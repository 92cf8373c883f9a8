"""Train a tiny run in several processes on this machine's CPU, as torchrun would start them, and nothing else.

    python tests/several_processes.py 1:auto,2:auto,2:fsdp2 -- ARGUMENTS OF train.py

{world} in the arguments stands for the number of processes and {strategy} for what follows the colon.
One process imports everything and forks the others, so that each run costs training and no imports. Exit status 1 where a
process failed; its output is then on standard error.
"""

import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def start(rank: int, world: int, port: int, arguments: list[str], log: str) -> int:
    """Fork a process that trains; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(world)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ["TORCHELASTIC_RUN_ID"] = "none"
        import train

        sys.argv = ["train.py", *arguments]
        train.main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
        print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Run each number of processes in turn."""
    os.chdir(ROOT)
    torch.set_num_threads(1)
    import vitzoo.tasks.cli  # noqa: F401 (so that the children need not)

    for run in sys.argv[1].split(","):
        number, strategy = run.split(":")
        world = int(number)
        arguments = [part.replace("{world}", number).replace("{strategy}", strategy) for part in sys.argv[3:]]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            logs = [f"{folder}/{rank}.log" for rank in range(world)]
            pids = [start(rank, world, port, arguments, log) for rank, log in enumerate(logs)]
            failed = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
            said = [Path(log).read_text() for log in logs]
        print(said[0], flush=True)
        if any(failed):
            sys.exit("\n".join(f"process {rank} of {world}:\n{text[-3000:]}" for rank, text in enumerate(said)))


if __name__ == "__main__":
    main()
