"""``priorclip COMMAND ...``, the same as ``python -m priorclip COMMAND ...``: all commands under one name.

    priorclip pretrain --config rs5m-b32.yaml          # python -m pretrain
    priorclip pack --source karpathy ...               # python -m data_shards pack
    priorclip data_shards pack --source karpathy ...   # the same, in full
    priorclip evaluate --model export --data test      # python -m retrieval evaluate

A sub-command can stand alone if only one package has one of that name. `index` and `bench` need their package.
"""

from __future__ import annotations

import difflib
import runpy
import sys
from collections.abc import Sequence

# Package -> its sub-commands; a package without them is a command by itself.
COMMANDS: dict[str, tuple[str, ...]] = {
    "pretrain": (),
    "finetune": ("prior", "instruct", "closed"),
    "experiments": ("sweep", "resplit"),
    "data_shards": ("pack", "leakage", "verify", "stats", "tokenizer"),
    "model": ("convert", "export", "summary"),
    "retrieval": ("evaluate", "robustness", "search", "serve"),
    "cluster": ("check", "launch", "sbatch", "faults", "plan", "simulate"),
}
# A sub-command that two packages have is reached through its package: `priorclip retrieval index`.
ALONE = {name: package for package, names in COMMANDS.items() for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``priorclip PACKAGE ...`` or ``priorclip SUB-COMMAND ...``; returns 2 if there is no such command."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    package = words.pop(0) if words[0] in COMMANDS else ALONE.get(words[0])
    if package is None:
        close = difflib.get_close_matches(words[0], [*COMMANDS, *ALONE], n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see priorclip --help"
        print(f"priorclip: error: unknown command '{words[0]}': {hint}", file=sys.stderr)
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


def usage() -> str:
    """The list of commands, a line a package."""
    lines = [f"  {package:12} {' '.join(names)}" for package, names in COMMANDS.items()]
    return "\n".join(
        ["usage: priorclip COMMAND [options]; each command has its own --help", "", "commands:", *lines, "",
         "A sub-command stands alone (priorclip pack) or behind its package (priorclip data_shards pack)."]
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
