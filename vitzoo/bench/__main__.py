"""Times the zoo against its baselines and prints Markdown tables.

    python -m vitzoo.bench models                       # whole models against timm's, or against an unfold
    python -m vitzoo.bench models nat_tiny --forward-only
    python -m vitzoo.bench accelerate davit_tiny        # a model of timm's against what vitzoo.accelerate makes of it
    python -m vitzoo.bench tokens deit_small_patch16_224  # reduced models against the same model as it was
    python -m vitzoo.bench ops                          # ops against FlexAttention, unfold, SDPA with a bias, NATTEN, PyTorch
    python -m vitzoo.bench all --out DIR                # checks (on a GPU) and every table, as Markdown and JSON

Everything is measured in one process, interleaved; ratios are baseline over ours, so above 1 is faster or smaller.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vitzoo.bench import accelerate, calls, dense, models, ops, reduction, routed, token_ops
from vitzoo.bench.timing import environment


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m vitzoo.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    sub = commands.add_parser("models", help="whole models against timm's, or against an unfold")
    sub.add_argument("names", nargs="*", help="listed models; none: the default table")
    sub.add_argument("--batch", type=int, default=8, help="images (default 8)")
    sub.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    sub.add_argument("--forward-only", action="store_true", help="leave out training")
    sub.set_defaults(run=_models)

    sub = commands.add_parser("accelerate", help="timm's models against what vitzoo.accelerate makes of them")
    sub.add_argument("names", nargs="*", help="names of timm's; none: one of each kind")
    sub.add_argument("--batch", type=int, default=8, help="images (default 8)")
    sub.add_argument("--forward-only", action="store_true", help="leave out training")
    sub.set_defaults(run=_accelerate)

    sub = commands.add_parser("tokens", help="reduced models against the same model as it was")
    sub.add_argument("names", nargs="*", help=f"plain transformers of ours or timm's; none: {reduction.MODEL}")
    sub.add_argument("--method", action="append", help='METHOD or METHOD:JSON, as tome:{"r":13}; again for more; none: a table')
    sub.add_argument("--batch", type=int, help="images (default 16, on a GPU 256)")
    sub.set_defaults(run=_tokens)

    sub = commands.add_parser("routed", help="attend_routed against the form that gathers keys, at BiFormer's stages")
    sub.add_argument("--sizes", nargs="+", type=int, default=list(routed.SIZES), help="pixels on a side of the image")
    sub.add_argument("--batch", type=int, help="images (default 8 at 224 pixels, fewer where they are larger)")
    sub.set_defaults(run=_routed)

    sub = commands.add_parser("ops", help="ops against other ways to compute them")
    gpu = torch.cuda.is_available()
    sub.add_argument("--device", default="cuda" if gpu else "cpu", help="cuda or cpu (default: the GPU where there is one)")
    sub.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16" if gpu else "float32")
    sub.set_defaults(run=_ops)

    sub = commands.add_parser("dense", help="maps of whole images: time and peak memory against the image size")
    sub.add_argument("names", nargs="*", help="listed models; none: the default ones")
    sub.add_argument("--sizes", nargs="+", default=["512x512", "800x1333", "1024x2048"], help="rows x columns of the images")
    sub.add_argument("--train", action="store_true", help="forward and backward, plain and with every stage recomputed")
    sub.set_defaults(run=_dense)

    sub = commands.add_parser("data", help="pictures a second of the training loader against the training step")
    sub.add_argument("name", nargs="?", default="nat_tiny", help="model whose step is timed (default nat_tiny)")
    sub.add_argument("--root", help="folder of pictures; without: made-up JPEGs of 500 x 375")
    sub.add_argument("--config", help="of train.py: its data part says how pictures are augmented")
    sub.add_argument("--batch", type=int, default=64, help="pictures in a step (default 64)")
    sub.add_argument("--size", type=int, default=224, help="pixels on a side (default 224)")
    sub.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4, 8], help="loading processes (default 0 1 2 4 8)")
    sub.add_argument("--pictures", type=int, default=512, help="in a round (default 512)")
    sub.set_defaults(run=_data)

    sub = commands.add_parser("training", help="a step of train.py against a bare loop; with --timm, accuracy against timm's")
    sub.add_argument("--batches", nargs="+", type=int, default=[16, 32, 64, 128], help="pictures in a step of nat_micro")
    sub.add_argument("--steps", type=int, default=40, help="in a window (default 40)")
    sub.add_argument("--timm", type=Path, metavar="TRAIN_PY", help="timm's train.py: compare accuracies on the digits instead")
    sub.add_argument("--seeds", type=int, default=5, help="of the comparison (default 5)")
    sub.add_argument("--epochs", type=int, default=10, help="of the comparison (default 10)")
    sub.set_defaults(run=_training)

    for each in commands.choices.values():
        each.add_argument("--rounds", type=int, default=9, help="interleaved rounds (default 9)")
        each.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads of the CPU")
        each.add_argument("--json", type=Path, help="write the figures here as well")

    sub = commands.add_parser("all", help="checks and every table, one command for a GPU machine")
    sub.add_argument("--out", type=Path, required=True, help="folder for the tables; made where it is not there")
    args = parser.parse_args(argv)
    if args.command == "all":
        return _all(args.out)
    torch.set_num_threads(args.threads)
    return args.run(args, f"python -m vitzoo.bench {' '.join(argv)}")


def _report(command: str, facts: dict[str, str], text: str, rows: Sequence[Any], path: Path | None) -> None:
    print(f"`{command}`\n{', '.join(f'{key} {value}' for key, value in facts.items())}\n\n{text}")
    if path:
        path.write_text(json.dumps({"command": command, "environment": facts, "results": rows}, indent=2))


def _dense(args: argparse.Namespace, command: str) -> int:
    sizes = [(int(height), int(width)) for height, width in (size.split("x") for size in args.sizes)]
    cases = dense.cases(args.names or list(dense.MODELS), sizes, train=args.train)
    results = []
    for i, case in enumerate(cases):
        _progress(i, cases, f"{case.model}{' of timm' if case.theirs else ''}, {case.size[0]}x{case.size[1]}")
        results.append(dense.measure(case, args.rounds))
    _report(command, environment(), dense.table(results), [asdict(r) for r in results], args.json)
    return 0


def _models(args: argparse.Namespace, command: str) -> int:
    cases = [models.Case(n, args.batch, args.size, args.forward_only) for n in args.names] or list(models.CASES)
    results = []
    for i, case in enumerate(cases):
        _progress(i, cases, f"{case.model}, batch {case.batch}, {case.size} px")
        results.append(models.measure(case, args.rounds))
    _report(command, environment(), models.table(results), [asdict(r) for r in results], args.json)
    return 0


def _accelerate(args: argparse.Namespace, command: str) -> int:
    cases = [accelerate.Case(n, args.batch, args.forward_only) for n in args.names or accelerate.MODELS]
    results = []
    for i, case in enumerate(cases):
        _progress(i, cases, f"{case.model}, batch {case.batch}")
        results.append(accelerate.measure(case, args.rounds))
    _report(command, environment(), accelerate.table(results), [asdict(r) for r in results], args.json)
    return 0


def _tokens(args: argparse.Namespace, command: str) -> int:
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", "bfloat16") if gpu else ("cpu", "float32")
    try:
        settings = [reduction.parse(words) for words in args.method] if args.method else list(reduction.SETTINGS)
    except ValueError as error:
        sys.exit(f"error: {error}")
    batch = args.batch or (256 if gpu else 16)
    cases = [reduction.Case(n, *s, batch, device, dtype) for n in args.names or [reduction.MODEL] for s in settings]
    results = []
    for i, case in enumerate(cases):
        _progress(i, cases, f"{case.model}, {case.method} {case.setting}")
        results.append(reduction.measure(case, args.rounds))
    _report(command, environment(device, dtype), reduction.table(results), [asdict(r) for r in results], args.json)
    return 0


def _routed(args: argparse.Namespace, command: str) -> int:
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    cases = routed.cases(args.sizes, args.batch, device, dtype)
    results = []
    for i, case in enumerate(cases):
        _progress(i, cases, f"{case.size} pixels, stride {case.stride}")
        results.append(routed.measure(case, args.rounds))
    _report(command, environment(device, dtype), routed.table(results), [asdict(r) for r in results], args.json)
    return 0


def _data(args: argparse.Namespace, command: str) -> int:
    from vitzoo.bench import data

    results = data.loading(
        args.name, root=args.root, config=args.config, batch=args.batch, size=args.size, workers=args.workers,
        pictures=args.pictures, rounds=args.rounds,
    )  # fmt: skip
    gpu = torch.cuda.is_available()
    facts = environment("cuda" if gpu else "cpu", "bfloat16 autocast" if gpu else "float32")
    _report(command, facts, data.table(results), [data.as_json(r) for r in results], args.json)
    return 0


def _training(args: argparse.Namespace, command: str) -> int:
    from vitzoo.bench import training

    if args.timm is not None:
        found = training.parity(args.timm, list(range(args.seeds)), args.epochs)
        _report(command, environment(), training.parity_table(found), [found], args.json)
        return 0
    results = []
    for i, batch in enumerate(args.batches):
        _progress(i, args.batches, f"nat_micro, batch {batch}")
        results.append(training.measure_step(batch, args.rounds, args.steps))
    _report(command, environment(), training.table(results), [asdict(r) for r in results], args.json)
    return 0


def _ops(args: argparse.Namespace, command: str) -> int:
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch sees no GPU. Leave --device out for the CPU table.")
    gpu = device.type == "cuda"
    cases = [*(ops.GPU_CASES if gpu else ops.CPU_CASES), *(token_ops.GPU_CASES if gpu else token_ops.CPU_CASES)]
    results, wrong = [], []
    for i, case in enumerate(cases):
        _progress(i, cases, str(case))
        try:
            measure: Any = ops.measure if isinstance(case, ops.OpCase) else token_ops.measure
            results.append(measure(case, device, getattr(torch, args.dtype), args.rounds))
        except RuntimeError as reason:  # wrong, or out of memory: the others are still worth their time
            wrong.append(str(reason).splitlines()[0])
    text = calls.table(results) + "".join(f"\n\nNot timed: {line}" for line in wrong)
    _report(command, environment(device, args.dtype), text, [calls.as_json(r) for r in results], args.json)
    return 1 if wrong else 0


def _progress(i: int, cases: Sequence[object], what: str) -> None:
    print(f"[{i + 1}/{len(cases)}] {what} ...", file=sys.stderr, flush=True)


def _all(out: Path) -> int:
    """The checks that need a GPU, where there is one, then every table, each in a process of its own."""
    out.mkdir(parents=True, exist_ok=True)
    bench = [sys.executable, "-m", "vitzoo.bench"]
    steps = [("ops", [*bench, "ops", "--json", str(out / "ops.json")])]
    if torch.cuda.is_available():
        tests = Path(__file__).resolve().parents[2] / "tests"
        steps.insert(0, ("checks", [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-n", "0", str(tests)]))
    for name in ("models", "tokens", "routed"):
        steps.append((name, [*bench, name, "--rounds", "5", "--json", str(out / f"{name}.json")]))
    failed = []
    for name, command in steps:
        print(f"== {name}", file=sys.stderr, flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        (out / f"{name}.md").write_text(done.stdout)
        if done.returncode:
            failed.append(name)
    print(f"Tables in {out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
