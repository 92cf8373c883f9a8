"""Classify a picture, or find objects (--task detect) or regions (--task segment) in it with a model that train.py has trained.

The picture is brought to the size, crop and normalisation that the weights were trained with. Nothing is downloaded for
nat_micro.digits, which is shipped with the package.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

EXAMPLES = (
    "vitzoo predict digit.png --model nat_micro.digits",
    "vitzoo predict a.jpg b.jpg --model swin_tiny_patch4_window7_224 --top 3 --json",
    "vitzoo predict photo.jpg --checkpoint runs/folder/best.ckpt",
    "vitzoo predict photo.jpg --task detect --checkpoint runs/detection/best.ckpt --out drawn.png",
    "vitzoo predict photo.jpg --task segment --checkpoint runs/segmentation/best.ckpt --out drawn.png",
)

DENSE = {"detect": "detection", "segment": "segmentation"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("images", nargs="+", type=Path, metavar="PICTURE", help="JPEG, PNG and whatever else Pillow reads")
    parser.add_argument("--task", choices=["classify", "detect", "segment"], default="classify", help="default: classify")
    parser.add_argument("--model", metavar="NAME", help="a name of `vitzoo list` or of timm's, with its published weights")
    parser.add_argument("--checkpoint", type=Path, help="of a run of train.py, which knows its model; or weights for --model")
    parser.add_argument("--num-classes", type=int, help="of the weights given with --checkpoint and --model")
    parser.add_argument("--top", type=int, default=5, help="how many classes (default 5)")
    parser.add_argument("--threshold", type=float, default=0.5, help="least score of an object (default 0.5)")
    parser.add_argument("--out", type=Path, help="the drawn picture: required to detect and to segment")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--accept-license", action="store_true", help="its non-commercial licence has been read")
    parser.add_argument("--json", action="store_true", help="for scripts")


def run(args: argparse.Namespace) -> int:
    """Predict and print, or draw."""
    for path in args.images:
        if not path.is_file():
            raise ValueError(f"There is no picture at {path}.")
    if args.task == "classify":
        if args.model is None and args.checkpoint is None:
            raise ValueError("Which model? --model NAME (`vitzoo list --pretrained`), or --checkpoint of a run.")
        return _classify(args)
    if args.checkpoint is None or args.out is None or len(args.images) != 1:
        raise ValueError(
            f"--task {args.task} takes one picture, --checkpoint RUN/best.ckpt and --out FILE.png. "
            f"To train one: python train.py fit --config configs/{DENSE[args.task]}/quickstart.yaml"
        )
    return _draw(args)


def _classify(args: argparse.Namespace) -> int:
    import torch

    from vitzoo.data.images import read_image
    from vitzoo_cli._models import classifier

    model, transform, classes = classifier(args)
    model = model.to(args.device)
    found: list[dict[str, Any]] = []
    for path in args.images:
        image = transform(read_image(path))[None].to(args.device)
        with torch.inference_mode():
            probabilities = model(image).float().softmax(-1)[0].cpu()
        top = probabilities.topk(min(args.top, len(probabilities)))
        rows = [
            {"class": int(i), "name": classes[int(i)] if int(i) < len(classes) else str(int(i)), "probability": float(p)}
            for p, i in zip(top.values, top.indices, strict=True)
        ]
        found.append({"path": str(path), "classes": rows})
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for picture in found:
        if len(found) > 1:
            print(picture["path"])
        for row in picture["classes"]:
            print(f"{100 * row['probability']:5.1f} %  {row['name']}")
    return 0


def _draw(args: argparse.Namespace) -> int:
    import numpy as np
    import torch

    from vitzoo.data.images import read_image
    from vitzoo.data.segmentation import Resize
    from vitzoo.tasks.draw import draw_boxes, draw_classes
    from vitzoo_cli._models import trained

    module, classes, data = trained(args.checkpoint, DENSE[args.task])
    module = module.to(args.device)
    pixels = np.array(read_image(args.images[0]))
    image = torch.from_numpy(pixels).permute(2, 0, 1).to(args.device)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        if args.task == "detect":
            found = {key: value.cpu().numpy() for key, value in module.detect([image.float() / 255])[0].items()}
            drawn = draw_boxes(pixels, **found, classes=classes, threshold=args.threshold)
            for box, label, score in zip(found["boxes"], found["labels"], found["scores"], strict=True):
                if score >= args.threshold:
                    corners = [round(float(v), 1) for v in box]
                    rows.append({"name": classes[label - 1], "score": round(float(score), 4), "box": corners})
        else:
            resize = Resize(data.get("size"), data.get("longest"), module.model.mean, module.model.std)
            inputs, _ = resize(image.cpu(), torch.zeros(1, 1))
            labels = module.segment(inputs.to(args.device), pixels.shape[:2]).argmax(0).cpu().numpy()
            drawn = draw_classes(pixels, labels, classes)
            for k, count in zip(*np.unique(labels, return_counts=True), strict=True):
                rows.append({"name": classes[int(k)], "share": round(float(count) / labels.size, 4)})
    drawn.save(args.out)
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    print(f"{len(rows)} {'objects' if args.task == 'detect' else 'classes'}, drawn in {args.out}")
    return 0
