"""Train, evaluate and apply a model of the zoo. With no arguments: the quick start, about a minute on two cores.

    python train.py                                                              # handwritten digits, nothing to download
    python train.py --model.name swin_micro                                      # the same with another model
    python train.py fit --config configs/finetune/folder.yaml --data.root DIR    # your own pictures
    python train.py fit --config configs/imagenet/nat_tiny.yaml --data.root DIR
    python train.py fit --config configs/detection/quickstart.yaml               # boxes around rendered shapes
    python train.py fit --config configs/segmentation/quickstart.yaml            # a class for every pixel of them
    python train.py fit --config ... --ckpt_path last                            # go on with a run that was stopped
    python train.py validate --config ...                                        # best.ckpt of the run's folder
    python train.py predict --config ... --data.predict FOLDER                   # predictions.csv in the run's folder

Any key of a config can be given on the command line: --model.lr 1e-3, --data.batch_size 64, --trainer.max_epochs 10.
"""

import sys
from pathlib import Path

from vitzoo_cli import share_cores

share_cores()


def main() -> None:
    """Hand over to Lightning; an error that is the user's to mend is one sentence and exit status 1."""
    if len(sys.argv) == 1 or sys.argv[1].startswith(("--model.", "--data.", "--trainer.", "--out")):
        sys.argv[1:1] = ["fit", "--config", str(Path(__file__).parent / "configs/quickstart.yaml")]
    from vitzoo.tasks.cli import Command, quiet
    from vitzoo.tasks.faults import in_words

    quiet()
    try:
        Command()
    except Exception as error:
        said = in_words(error)
        if said is None:
            raise  # a defect of ours: its traceback is what a report needs
        sys.exit(f"error: {said}")


if __name__ == "__main__":
    main()
