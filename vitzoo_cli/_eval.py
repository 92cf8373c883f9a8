"""Top-1 and top-5 of a classifier on a folder of pictures (a folder a class) or on the embedded digits, at its own size."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLES = (
    "vitzoo eval --model nat_micro.digits --data digits",
    "vitzoo eval --model swin_tiny_patch4_window7_224 --data path/to/imagenet --batch-size 128 --device cuda",
    "vitzoo eval --checkpoint runs/folder/best.ckpt --data path/to/pictures --json",
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("--data", required=True, help="a folder with val/ in it or of class folders; or: digits")
    parser.add_argument("--model", metavar="NAME", help="a name of `vitzoo list` or of timm's, with its published weights")
    parser.add_argument("--checkpoint", type=Path, help="of a run of train.py, which knows its model; or weights for --model")
    parser.add_argument("--num-classes", type=int, help="of the weights given with --checkpoint and --model")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures (default 64)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--accept-license", action="store_true", help="its non-commercial licence has been read")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    if args.model is None and args.checkpoint is None:
        raise ValueError("Which model? --model NAME (`vitzoo list --pretrained`), or --checkpoint of a run.")
    import torch
    from rich.progress import track
    from torch.utils.data import DataLoader

    from vitzoo_cli._models import classifier

    model, transform, classes = classifier(args)
    data, names = _data(args.data, transform)
    if names and classes and len(names) == len(classes) and list(names) != list(classes) and model.num_classes != 1000:
        raise ValueError(f"The pictures' classes are {', '.join(names[:3])}, ..., the model's {', '.join(classes[:3])}, ...")
    if len(names) != model.num_classes:
        raise ValueError(f"{args.data} has {len(names)} classes and the model {model.num_classes}.")
    model = model.to(args.device)
    hits, top5, count = 0, 0, 0
    with torch.inference_mode():
        for images, labels in track(DataLoader(data, args.batch_size), "evaluating", transient=True, disable=args.json):
            best = model(images.to(args.device)).topk(min(5, model.num_classes)).indices.cpu()
            right = best == torch.as_tensor(labels)[:, None]
            hits, top5, count = hits + int(right[:, 0].sum()), top5 + int(right.any(1).sum()), count + len(labels)
    result = {"top1": 100 * hits / count, "top5": 100 * top5 / count, "pictures": count}
    print(
        json.dumps(result) if args.json else f"top-1 {result['top1']:.2f} %, top-5 {result['top5']:.2f} % on {count} pictures"
    )
    return 0


def _data(root: str, transform: object) -> tuple:
    """Pictures with labels, and the names of their classes."""
    from vitzoo.data.images import DigitImages

    if root == "digits":
        return DigitImages("val", transform), DigitImages.classes  # type: ignore[arg-type]
    folder = Path(root)
    folder = next((f for f in (folder / "val", folder / "validation", folder / "test") if f.is_dir()), folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {root}. --data takes a folder of class folders, or: digits.")
    from timm.data import ImageDataset

    data = ImageDataset(str(folder), transform=transform)
    return data, sorted(data.reader.class_to_idx, key=data.reader.class_to_idx.get)
