# PYTHON_ARGCOMPLETE_OK
"""``priorclip COMMAND ...``, the same as ``python -m priorclip COMMAND ...``: all commands under one name.

    priorclip pretrain --config rs5m-b32.yaml          # python -m pretrain
    priorclip pack --source karpathy ...               # python -m data_shards pack
    priorclip data_shards pack --source karpathy ...   # the same, in full
    priorclip evaluate --model export --data test      # python -m retrieval evaluate

A sub-command stands alone if only one package has one of that name. `index` and `bench` need their package.

Completion of commands and options with the Tab key, for bash and zsh; the second line belongs into ~/.bashrc:

    pip install 'priorclip-pretraining[completion]'
    eval "$(register-python-argcomplete priorclip)"
"""

from __future__ import annotations

import argparse
import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Literal, get_args, get_origin

# Package -> its sub-commands; a package without them is a command itself. `finetune sweep` is `experiments sweep`.
COMMANDS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "finetune": ("prior", "instruct", "closed"),
    "experiments": ("sweep", "resplit", "collect", "tables", "fit", "shift"),
    "data_shards": ("pack", "synthetic", "leakage", "index", "verify", "stats", "tokenizer", "bench"),
    "model": ("convert", "export", "push", "fetch", "summary", "bench"),
    "retrieval": (
        "evaluate",
        "robustness",
        "pictures",
        "belief-truth",
        "curate",
        "index",
        "approximate",
        "add",
        "remove",
        "search",
        "serve",
    ),
    "cluster": ("check", "launch", "sbatch", "faults", "plan", "simulate"),
}
# Sub-command -> the packages that have it.
PACKAGES: dict[str, list[str]] = {}
for package, names in COMMANDS.items():
    for name in names:
        PACKAGES.setdefault(name, []).append(package)
ALONE = {name: packages[0] for name, packages in PACKAGES.items() if len(packages) == 1}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``priorclip PACKAGE ...`` or ``priorclip SUB-COMMAND ...``; returns 2 if there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if "_ARGCOMPLETE" in os.environ:
        return complete()
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    package = words.pop(0) if words[0] in COMMANDS else ALONE.get(words[0])
    if package is None:
        print(f"priorclip: error: unknown command '{words[0]}': {hint(words[0])}", file=sys.stderr)
        return 2
    sys.argv = [f"priorclip {package}", *words]
    try:
        runpy.run_module(f"priorclip.{package}", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


def complete() -> int:
    """Answers the Tab key by argcomplete's protocol and ends the process; returns 2 if the line has an unknown command.

    jsonargparse completes the options of a parser, but not those of its sub-commands, and no values of a Literal. So we
    give it the parser of the sub-command, with choices. ``_ARGCOMPLETE`` is the number of words that argcomplete skips.
    For the value of another option argcomplete fails, and the shell completes file names.
    """
    import argcomplete
    from jsonargparse import capture_parser

    start = int(os.environ["_ARGCOMPLETE"])
    words = argcomplete.split_line(os.environ["COMP_LINE"], int(os.environ["COMP_POINT"]))[3]
    if "--" in words:  # priorclip launch [options] -- pretrain [options]
        start = words.index("--") + 1
    os.environ["_ARGCOMPLETE"] = str(start)
    if len(words) == start:
        commands = argparse.ArgumentParser()
        commands.add_argument("command", choices=[*COMMANDS, *ALONE])
        argcomplete.autocomplete(commands)
    package = ALONE.get(words[start], words[start])
    if package not in COMMANDS:
        return 2
    sys.argv = ["priorclip"]
    parser = capture_parser(lambda: runpy.run_module(f"priorclip.{package}", run_name="__main__"))
    if words[start] == package:
        start += 1
    children = next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})
    if words[start : start + 1] and words[start] in children:
        parser = children[words[start]]
        start += 1
    os.environ["_ARGCOMPLETE"] = str(start)
    for action in parser._actions:
        kind = getattr(action, "_typehint", None)
        kinds = [each for each in (kind, *get_args(kind)) if get_origin(each) is Literal]
        action.choices = [value for each in kinds for value in get_args(each)] or action.choices
    parser.parse_args([])
    return 0


def hint(command: str) -> str:
    """Says what to type instead of a command that does not exist."""
    if command in PACKAGES:
        return "did you mean " + " or ".join(f"'{package} {command}'" for package in PACKAGES[command]) + "?"
    close = difflib.get_close_matches(command, [*COMMANDS, *PACKAGES], n=1)
    return f"did you mean '{close[0]}'?" if close else "see priorclip --help"


def usage() -> str:
    """The list of commands, a line a package."""
    lines = [f"  {package:12} {' '.join(names)}" for package, names in COMMANDS.items()]
    return "\n".join(
        ["usage: priorclip COMMAND [options]; each command has its own --help", "", "commands:", *lines, "",
         "A sub-command stands alone (priorclip pack) or behind its package (priorclip data_shards pack).",
         "index and bench need their package."]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
