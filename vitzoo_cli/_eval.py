"""Top-1, top-5, loss, calibration and speed of classifiers on folders of pictures, the embedded digits, or ImageNet's sets.

A folder of pictures has a folder for each class. Several models and several sets make one table. Pictures come at each model's
own size and crop.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import glob
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

EXAMPLES = (
    "vitzoo eval --model nat_micro.digits --data digits",
    "vitzoo eval --model swin_tiny_patch4_window7_224 --data path/to/imagenet --batch-size 128 --device cuda",
    "vitzoo eval --checkpoint runs/folder/best.ckpt --data path/to/pictures --tables per_class --json",
    "vitzoo eval --checkpoint 'runs/*/best.ckpt' --data path/to/pictures --csv runs.csv --markdown runs.md",
    "vitzoo eval --model 'dinat_*' resnet50 --set imagenet imagenet-r --data IMAGENET IMAGENET_R --csv table.csv",
)
SETS = ("imagenet", "imagenet-v2", "imagenet-real", "imagenet-c", "imagenet-a", "imagenet-r", "imagenet-sketch")
# figure: its heading and how it is printed
COLUMNS = {
    "top1": ("top-1 %", ".2f"),
    "top5": ("top-5 %", ".2f"),
    "loss": ("loss", ".4f"),
    "ece": ("calibration error", ".4f"),
    "mce": ("mCE %", ".1f"),
    "images_per_second": ("img/s", ".0f"),
    "pictures": ("pictures", "d"),
    "unreadable": ("unreadable", "d"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--data", required=True, nargs="+", help="folders with val/ in them or of class folders; or: digits")
    parser.add_argument(
        "--set", nargs="+", choices=SETS, help="what each folder of --data is; without: any classes of your own"
    )
    parser.add_argument(
        "--model", metavar="NAME", nargs="+", help="names of `vitzoo list` (wildcards: those with weights) or of timm's"
    )
    parser.add_argument(
        "--checkpoint", nargs="+", help="of runs of train.py, which know their model; or weights for --model; wildcards"
    )
    parser.add_argument("--num-classes", type=int, help="of the weights given with --checkpoint and --model")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures (default 64)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load (default 0)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--accept-license", action="store_true", help="its non-commercial licence has been read")
    parser.add_argument("--csv", type=Path, help="write the table here")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--tables", type=Path, help="folder for accuracy by class and confusions of each model and set, as CSV")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if args.model is None and args.checkpoint is None:
        raise ValueError("Which model? --model NAME (`vitzoo list --pretrained`), or --checkpoint of a run.")
    if args.set is not None and len(args.set) != len(args.data):
        raise ValueError(f"--set names {len(args.set)} sets and --data {len(args.data)} folders: one folder for each set.")
    entries = list(_entries(args))
    rows: list[dict[str, Any]] = []
    for number, (name, options) in enumerate(entries):
        try:
            for row, found in _evaluated(name, options, args):
                rows.append(row)
                if args.tables is not None:
                    _leave(args.tables, f"{name}.{row['data']}", found)
        except (ValueError, OSError, ImportError, NotImplementedError, RuntimeError) as error:
            if len(entries) == 1:
                raise
            said = " ".join(str(error).split())
            print(f"error: [{number + 1}/{len(entries)}] {name}: {said}", file=sys.stderr)
            rows.append({"model": name, "data": "", "error": said})
    _write(args, rows)
    return 1 if any("error" in row for row in rows) else 0


def _entries(args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each row is called, and the model and file that it is of."""
    from vitzoo_cli import _index

    known = [tag["name"] for model in _index.read() for tag in model["weights"]]
    names: list[str | None] = []
    for name in args.model or ():
        found = fnmatch.filter(known, name) if any(c in name for c in "*?[") else [name]
        if not found:
            raise ValueError(f"No model with weights is called {name!r}: `vitzoo list --pretrained` shows them.")
        names += found
    files: list[str | None] = []
    for pattern in args.checkpoint or ():
        matching = [str(path) for path in sorted(glob.glob(pattern, recursive=True))]
        if not matching:
            raise ValueError(f"There is no file {pattern}.")
        files += matching
    if len(names) > 1 and files:
        raise ValueError("--checkpoint with --model are weights of one model: give one --model, or leave it out for runs.")
    for name in names or [None]:
        for file in files or [None]:
            yield file or str(name), {"model": name, "checkpoint": file and Path(file)}


def _evaluated(name: str, options: dict[str, Any], args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Any]]:
    """A row and the whole of what was found, for each set."""
    from rich.progress import track

    from vitzoo.tasks.evaluation import evaluate
    from vitzoo_cli._models import classifier

    given = argparse.Namespace(num_classes=args.num_classes, accept_license=args.accept_license, **options)
    model, transform, classes = classifier(given)
    sigmoid = options["model"] is None and _by_sigmoid(options["checkpoint"])

    def watch(batches: Any) -> Any:
        return track(batches, f"{name} on {images.name}", transient=True, disable=args.json or not sys.stderr.isatty())

    for which, root in zip(args.set or [None] * len(args.data), args.data, strict=True):
        images = _pictures(which, root, transform, classes, model.num_classes)
        for note in images.notes:
            print(f"note: {note}", file=sys.stderr)
        found = evaluate(
            model, images, device=args.device, batch_size=args.batch_size, workers=args.workers, sigmoid=sigmoid, watch=watch
        )
        yield {"model": name, "data": images.name, **found.figures}, found


def _by_sigmoid(run: Path) -> bool:
    """Whether the run that wrote a checkpoint was trained with "bce", so that a confidence is a sigmoid."""
    from vitzoo import checkpoints

    return checkpoints.read(run).get("hyper_parameters", {}).get("loss") == "bce"


def _pictures(which: str | None, root: str, transform: Callable[[Any], Any], classes: Any, known: int) -> Any:
    """A named set, or a folder with classes of its own."""
    from vitzoo.data.images import DigitImages, FolderImages, class_folders, list_images
    from vitzoo.data.sets import EvalSet, named_set

    if which is not None:
        if known != 1000:
            raise ValueError(f"{which} is for models of ImageNet-1k's 1000 classes, and this one has {known}.")
        return named_set(which, root, transform)
    if root == "digits":
        digits, names = DigitImages("val", transform), list(DigitImages.classes)
        labels, digits.labels = digits.labels, list(range(len(digits)))
        images = EvalSet("digits", digits, [(label,) for label in labels], names)
    else:
        folder = Path(root)
        if not folder.is_dir():
            raise ValueError(f"There is no folder {root}. --data takes a folder of class folders, or: digits.")
        folder = next((f for f in (folder / "val", folder / "validation", folder / "test") if f.is_dir()), folder)
        names = class_folders(folder)
        found = [(path, label) for label, name in enumerate(names) for path in list_images(folder / name)]
        if not found:
            raise ValueError(f"{folder} holds no pictures in class folders.")
        samples = [(path, number) for number, (path, _) in enumerate(found)]
        data = FolderImages(samples, [], transform, skip_corrupt=True, exif=known != 1000)  # ImageNet is measured without
        images = EvalSet(
            folder.name if folder.name not in ("val", "test") else folder.parent.name, data, [(i,) for _, i in found], names
        )
    if len(names) != known:
        raise ValueError(f"{root} has {len(names)} classes and the model {known}.")
    if classes and len(names) == len(classes) and list(names) != list(classes) and known != 1000:
        raise ValueError(f"The pictures' classes are {', '.join(names[:3])}, ..., the model's {', '.join(classes[:3])}, ...")
    return images


def _leave(folder: Path, name: str, found: Any) -> None:
    from vitzoo.tasks.figures import class_rows, write_matrix, write_rows

    folder.mkdir(parents=True, exist_ok=True)
    stem = name.replace("/", "_").lstrip("._")
    write_rows(folder / f"{stem}.classes.csv", class_rows(found.confusion, found.classes))
    write_matrix(folder / f"{stem}.confusion.csv", found.confusion, found.classes)


def _write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The table, where it was asked for."""
    shown = ["model", "data", *(key for key in COLUMNS if any(row.get(key) is not None for row in rows))]
    shown += ["error"] if any("error" in row for row in rows) else []
    if args.csv is not None:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, shown, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
    head = [COLUMNS[key][0] if key in COLUMNS else key for key in shown]
    cells = [[_cell(key, row.get(key)) for key in shown] for row in rows]
    markdown = "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *cells))
    if args.markdown is not None:
        args.markdown.write_text(markdown + "\n", encoding="utf-8")
    if args.json:
        print(json.dumps(rows[0] if len(rows) == 1 else rows))
    elif len(rows) == 1:
        row = rows[0]
        said = [
            f"{COLUMNS[key][0].removesuffix(' %')} {_cell(key, row[key])}{' %' * COLUMNS[key][0].endswith('%')}"
            for key in shown[2:-2]
        ]
        lost = f" ({row['unreadable']} could not be read and count as wrong)" if row["unreadable"] else ""
        print(f"{', '.join(said)} on {row['pictures']} pictures{lost}")
    else:
        print(markdown)


def _cell(key: str, value: Any) -> str:
    return "" if value is None else format(value, COLUMNS[key][1]) if key in COLUMNS else str(value).replace("|", "/")
