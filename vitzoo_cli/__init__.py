"""The ``vitzoo`` command. A package beside ``vitzoo``, because importing anything below that first imports torch and timm.

A command is a module of this package with ``EXAMPLES``, ``arguments(parser)`` and ``run(args)``, and a line in ``COMMANDS``.
Only the module of the command that was asked for is imported, and what it needs of ``vitzoo`` it imports inside ``run``: help,
completion and ``vitzoo list`` answer at once.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

__all__ = ["COMMANDS", "main", "parser_of", "share_cores"]

# command: what it does; its module is the command's name after `_`, which keeps clear of keywords and of `list`
COMMANDS: dict[str, str] = {
    "list": "models of the zoo: filter, sort, as a table or as JSON",
    "info": "one model: layers, parameters, multiply-adds, activations, who sees whom",
    "predict": "classify a picture, or find objects or regions in it",
    "eval": "figures of models on folders of pictures or ImageNet's sets, one table",
    "convert": "a checkpoint of the authors, of timm or of yours as safetensors, checked",
    "export": "a model as ONNX or as an exported program, checked against eager",
    "bench": "time the zoo against its baselines",
    "visualize": "pictures of attention, rollout, Grad-CAM, tokens, patterns",
    "report": "an evaluation as one HTML page",
    "completion": "the script that completes this command in bash, zsh or fish",
}


class Parser(argparse.ArgumentParser):
    """argparse with the nearest right word in its errors, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print one line and leave."""
        known = [option for action in self._actions for option in action.option_strings]
        for word in message.removeprefix("unrecognized arguments: ").split() if "unrecognized" in message else []:
            near = difflib.get_close_matches(word.split("=")[0], known, n=1)
            message += f" (did you mean {near[0]}?)" if near else ""
        self.exit(2, f"error: {message}. See {self.prog} --help.\n")


def share_cores() -> None:
    """Let OpenMP's threads wait awake for a moment and then asleep, unless the environment says otherwise.

    To be called before torch is imported. Threads that stay awake slow a step several times down where another process needs
    the core; threads that sleep at once are late for the next op, which small models notice.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def module_of(command: str) -> object:
    """The module of a command."""
    return importlib.import_module(f"vitzoo_cli._{command}")


def parser_of(command: str) -> Parser:
    """The parser of one command; importing it costs no torch."""
    module = module_of(command)
    examples = "\n".join(f"  {line}" for line in module.EXAMPLES)  # type: ignore[attr-defined]
    parser = Parser(
        prog=f"vitzoo {command}",
        description=module.__doc__,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.arguments(parser)  # type: ignore[attr-defined]
    return parser


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vitzoo COMMAND ... (vitzoo COMMAND --help has arguments and examples)",
            "",
            "Vision-transformer backbones on shared 2-D attention ops.",
            "",
            *lines,
            "",
            "examples:",
            "  vitzoo list 'nat*' --sort top1",
            "  vitzoo info nat_tiny",
            "  vitzoo predict photo.png --model nat_micro.digits",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: its words, without the program's name; None: those of the process.

    Returns:
        The exit status: 0, 1 where something could not be done (one sentence says what), 2 where the line was wrong.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0 if words else 2
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"vitzoo {version('vitzoo')}")
        return 0
    command = words[0]
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"Did you mean '{near[0]}'?" if near else f"Commands: {', '.join(COMMANDS)}."
        print(f"error: there is no command '{command}'. {hint}", file=sys.stderr)
        return 2
    share_cores()
    try:
        module = module_of(command)
        if hasattr(module, "forward"):  # a command line of its own, passed on as it is
            return int(module.forward(words[1:]) or 0)
        return int(module.run(parser_of(command).parse_args(words[1:])) or 0)  # type: ignore[attr-defined]
    except BrokenPipeError:  # `vitzoo list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, ImportError, NotImplementedError) as error:
        if os.environ.get("VITZOO_TRACEBACK"):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
