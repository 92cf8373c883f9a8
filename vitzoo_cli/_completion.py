"""The script that completes this command. Commands, options and names of models come from ``vitzoo`` itself, without torch."""

from __future__ import annotations

import argparse

from vitzoo_cli import COMMANDS, _index, parser_of

EXAMPLES = (
    'eval "$(vitzoo completion bash)"                     # or into ~/.bashrc',
    "vitzoo completion zsh > ~/.zfunc/_vitzoo",
    "vitzoo completion fish > ~/.config/fish/completions/vitzoo.fish",
)
SCRIPTS = {
    "bash": """_vitzoo() {
    COMPREPLY=($(vitzoo completion --words "${COMP_WORDS[*]:1:COMP_CWORD-1}" --last "${COMP_WORDS[COMP_CWORD]}" 2>/dev/null))
}
complete -o default -F _vitzoo vitzoo""",
    "zsh": """#compdef vitzoo
_vitzoo() {
    local found
    found=(${(f)"$(vitzoo completion --words "${words[2,CURRENT-1]}" --last "${words[CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -a found; else _files; fi
}
compdef _vitzoo vitzoo""",
    "fish": """complete -c vitzoo -a '(set -l t (commandline -opc) (commandline -ct); \\
    vitzoo completion --words "$t[2..-2]" --last "$t[-1]" 2>/dev/null)'""",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what the command takes."""
    parser.add_argument("shell", nargs="?", choices=list(SCRIPTS), help="whose script is printed")
    parser.add_argument("--words", help=argparse.SUPPRESS)  # what stands before the word that is completed
    parser.add_argument("--last", default="", help=argparse.SUPPRESS)


def complete(words: list[str], last: str) -> list[str]:
    """What may follow.

    Args:
        words: what stands there, without the program's name.
        last: the beginning of the next word.

    Returns:
        Whole words that begin so.
    """
    if not words:
        return [name for name in COMMANDS if name.startswith(last)]
    if words[0] not in COMMANDS:
        return []
    actions = parser_of(words[0])._actions
    options = {option: action for action in actions for option in action.option_strings}
    before = options.get(words[-1])
    if before is not None and before.choices is not None:
        found = list(before.choices)
    elif last.startswith("-"):
        found = [option for option, action in options.items() if action.help is not argparse.SUPPRESS]
    else:
        places = [choice for a in actions if not a.option_strings and a.choices for choice in a.choices]
        takers = [before] if before is not None else [a for a in actions if not a.option_strings]
        wants_model = any(action.dest in ("model", "patterns") for action in takers)
        found = [*places, *([m["name"] for m in _index.read()] if wants_model else [])]
    return [str(word) for word in found if str(word).startswith(last)]


def run(args: argparse.Namespace) -> int:
    """Print the script, or what completes a line."""
    if args.words is not None or not args.shell:
        if args.words is None:
            raise ValueError(f"Which shell? vitzoo completion {' | '.join(SCRIPTS)}.")
        print("\n".join(complete(args.words.split(), args.last)))
    else:
        print(SCRIPTS[args.shell])
    return 0
