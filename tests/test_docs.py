"""What README and documentation say to type runs, unless marked; and the site builds without a warning."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image, ImageChops, ImageStat

import vitzoo
from tests.data import coco
from tests.data.pictures import ade20k, by_class
from vitzoo_cli import COMMANDS, _index, main, parser_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
RUN_ELSEWHERE = ("quickstart", "tests")  # commands of the README that .ci/run types, or a test of test_train.py


class Block(NamedTuple):
    """A fenced block; ``excused`` is why it cannot run here (``<!-- not run: the reason -->`` above it)."""

    page: str
    number: int
    language: str
    text: str
    excused: str

    def __str__(self) -> str:
        return f"{self.page}-{self.number}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of a page."""
    fence = re.compile(r"^(?:<!-- ([^\n]+) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    found = fence.finditer(path.read_text(encoding="utf-8"))
    return [Block(path.name, i, m[2], m[3], m[1] or "") for i, m in enumerate(found)]


BLOCKS = [block for path in PAGES for block in blocks_of(path)]
SHELL = [block for block in BLOCKS if block.language in {"bash", "sh", "console"} and not block.excused]
PYTHON = [block for block in BLOCKS if block.language == "python" and not block.excused and block.page != "README.md"]


def lines_of(text: str) -> list[list[str]]:
    """Commands as words; a line may go on behind a backslash."""
    joined = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in joined if shlex.split(line, comments=True)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """``runs`` of a classifier, a detector and a segmenter that train.py has trained, a batch or two each."""
    folder = tmp_path_factory.mktemp("trained")
    pictures = by_class(folder / "pictures")
    brief = ["--trainer.max_epochs", 1, "--trainer.accelerator", "cpu", "--data.num_workers", 0, "--data.batch_size", 4]
    scenes = ["--data.train_scenes", 4, "--data.val_scenes", 2, "--data.scene_size", 64, *brief]
    scenes += ["--trainer.check_val_every_n_epoch", 1]
    train("fit", "--config", ROOT / "configs/finetune/folder.yaml", "--data.root", pictures, "--model.name", "nat_micro",
          "--model.pretrained", "false", "--data.img_size", 32, *brief, "--out", folder / "runs/folder")  # fmt: skip
    for task, extra in (("detection", []), ("segmentation", ["--data.crop", 64])):
        train("fit", "--config", ROOT / f"configs/{task}/quickstart.yaml", *scenes, *extra, "--out", folder / "runs" / task)
    return folder


@pytest.fixture
def there(tmp_path, monkeypatch, trained) -> Path:
    """A folder with the files that the commands name."""
    from vitzoo.data.images import DigitImages

    digits = DigitImages("val", lambda picture: picture)
    digits.picture(digits.labels.index(2)).save(tmp_path / "digit.png")
    noise = torch.rand(9, 13, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((noise * 255).byte().numpy()).resize((320, 240)).save(tmp_path / "photo.jpg")
    torch.manual_seed(0)
    theirs = vitzoo.create_model("nat_micro", num_classes=10, in_chans=1)
    torch.save({"model": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "theirs.pth")
    (tmp_path / "path/to").mkdir(parents=True)
    for name in ("path/to/pictures", "path/to/imagenet", "IMAGENET"):
        (tmp_path / name).symlink_to(trained / "pictures")
    coco.write(tmp_path / "path/to/coco")
    ade20k(tmp_path / "path/to/ade20k")
    shutil.copytree(trained / "runs", tmp_path / "runs")
    for name in ("configs", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(*words: object) -> None:
    """Run train.py in this process."""
    import train as script

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, words)])
        try:
            script.main()
        except SystemExit as stop:
            if stop.code:
                pytest.fail(f"train.py {' '.join(map(str, words))}: {stop.code}")


def one_step(words: Sequence[str]) -> list[str]:
    """What a command of train.py gets besides: one update of few and small pictures, on the CPU, without a download."""
    line = " ".join(words)
    dense, scenes = "/detection/" in line or "/segmentation/" in line, "n/quickstart" in line
    extra = ["--trainer.fast_dev_run", "1", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
    extra += ["--data.batch_size", "2" if dense else "4", "--data.num_workers", "0", "--model.pretrained", "false"]
    extra += ["--trainer.sync_batchnorm", "false"] if dense else []
    extra += ["--data.train_scenes", "4", "--data.val_scenes", "2"] if scenes else []
    extra += ["--model.min_size", "[96]", "--model.max_size", "128"] if "/detection/" in line else []
    extra += ["--data.crop", "96"] if "/segmentation/" in line else []
    return [*extra, *(["--data.size", "96"] if "/segmentation/" in line and not scenes else [])]


def launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a command of torchrun: two processes in place of eight, one on each of two machines that are this one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    several = "--nnodes" in words
    values = {"--nproc_per_node": "1" if several else "2", "--nnodes": "2", "--master_addr": "127.0.0.1"}
    values |= {"--trainer.num_nodes": "2", "--master_port": str(free_port())}
    words = [values.get(before, word) for before, word in pairwise(["", *words])]
    words += [*one_step(words), "--trainer.devices", values["--nproc_per_node"]]
    nodes = [[str(node) if word == "NODE" else word for word in words] for node in range(2 if several else 1)]
    program = [sys.executable, "-m", "torch.distributed.run"]
    running = [subprocess.Popen(program + node[1:], stdout=-1, stderr=subprocess.STDOUT, text=True) for node in nodes]
    said = [process.communicate(timeout=200)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(nodes), "\n".join(said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_every_command_of_the_documentation_runs(block, there, capsys, monkeypatch):
    for words in lines_of(block.text):
        words = words[1:] if words[0] == "srun" else words
        if words[:2] == ["vitzoo", "bench"]:
            least = ["--batch", "1"] if words[2] == "accelerate" else []
            assert main([*words[1:], "--rounds", "1", *least]) == 0, capsys.readouterr().err
        elif words[0] == "vitzoo":
            assert main(words[1:]) == 0, capsys.readouterr().err
        elif words[:2] == ["python", "train.py"]:
            alone = ["--trainer.num_nodes", "1", "--trainer.devices", "1"] if "--trainer.num_nodes" in words else []
            train(*words[2:], *one_step(words), *alone)
        elif words[0] == "torchrun":
            launched(words, monkeypatch)
        else:
            pytest.fail(f"{block}: nobody runs {' '.join(words)}")
    for path in there.iterdir():
        assert path.stat().st_size > 0


def test_commands_that_do_not_run_here_are_excused_with_a_reason():
    excused = [block for block in BLOCKS if block.excused]
    assert all(re.match(rf"not run: .+|command: ({'|'.join(RUN_ELSEWHERE)})$", block.excused) for block in excused)


def test_every_example_of_the_documentation_runs(there):
    # in a process of its own: they register models and mixers
    code = f"""
import sys, types
for name, text in {[(str(block), block.text) for block in PYTHON]!r}:
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, "exec"), module.__dict__)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=there, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_example_of_a_help_text_is_a_line_that_its_command_takes():
    for command in COMMANDS:
        parser = parser_of(command)
        examples = [line.strip() for line in parser.epilog.splitlines()[1:]]
        assert examples
        for line in examples:
            program, name, *words = shlex.split(line.split(" #")[0]) if line.startswith("vitzoo") else ["vitzoo", command]
            assert (program, name) == ("vitzoo", command), line
            if command not in {"bench", "completion"}:
                parser.parse_args(words)


def test_every_page_has_its_place_and_every_family_its_page():
    # .ci/run builds the site, with warnings as errors
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    models = [model for model in _index.read() if model["family"] == "nat"]
    page = hooks.page_of("nat", models, drawn=True)
    assert "| `nat_tiny` | 27.90 M | 4." in page
    assert "[shi-labs" in page.lower()
    assert all(hooks.docstring_of(family) for family in vitzoo.list_families())
    assert hooks.picture_of([model for model in models if model["name"] == "nat_micro"]).startswith(b"\x89PNG")
    drawn, kept = hooks.nouns().convert("RGB"), Image.open(ROOT / "docs" / "patterns.png").convert("RGB")
    assert drawn.size == kept.size
    assert ImageStat.Stat(ImageChops.difference(drawn, kept)).mean < [0.5] * 3, "Run: python docs/hooks.py"  # but for the font
    places = re.findall(r"^  - .+: (.+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    written = {path.name for path in (ROOT / "docs").glob("*.md")} | {"performance.md", "families/index.md"}
    assert sorted(places) == sorted(written)
