"""Typed configuration for every command: dataclass + YAML file + command line, through jsonargparse.

    @dataclass
    class Config:
        '''Train a thing.

        Args:
            lr: peak learning rate
        '''
        lr: float = 1e-3

    config = parse(Config, ["--config", "run.yaml", "--lr", "1e-4"], prog="train")

What this adds to jsonargparse: an unknown key, in the file or on the command line, is an error that names the nearest
known key; ``--dry-run`` is ``--dry_run``, and alone it means true; the ``--local_rank`` that the deepspeed launcher
passes to every process is taken off first. Nothing heavy is imported here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")

UNKNOWN = re.compile(
    r"unrecognized arguments: --?(?P<flag>[\w.-]+)"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'"
    r"|Subcommand '\w+' does not accept option '(?P<child>[\w.]+)'"
    r"|Option '(?P<top>[\w.]+)' is not accepted"
    r"|[Kk]ey '(?P<key>[\w.]+)' is not expected"
)


class Parser(ArgumentParser):
    """jsonargparse's parser with "did you mean" in its errors, and no guessing at the start of a name.

    Exits with code 2, as argparse does.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        unknown = unknown_key(message)
        if unknown:
            known = [key for key in known_keys(self) if key != "config"]
            near = nearest(unknown, known)
            hint = f"did you mean '{near}'?" if near else f"known keys: {', '.join(sorted(known))}"
            message = f"unknown key '{unknown}': {hint}\n({message})"
        super().error(message, ex)


def unknown_key(message: str) -> str | None:
    """The dotted key that a jsonargparse error says it does not know, or None for other errors."""
    found = UNKNOWN.search(message)
    if not found:
        return None
    parts = found.groupdict()
    if parts["option"]:
        return f"{parts['group']}.{parts['option']}"
    return parts["flag"] or parts["child"] or parts["top"] or parts["key"]


def known_keys(parser: ArgumentParser) -> list[str]:
    """Every dotted key of the parser, those of its sub-commands too."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        if isinstance(choices, Mapping) and all(isinstance(child, ArgumentParser) for child in choices.values()):
            for child in choices.values():
                keys += known_keys(child)
        else:
            keys += [option[2:] for option in action.option_strings if option.startswith("--")]
    keys = [key for key in dict.fromkeys(keys) if not key.endswith("+") and key not in ("help", "print_config")]
    groups = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    return [key for key in keys if key not in groups]


def nearest(unknown: str, known: Sequence[str]) -> str | None:
    """The known key most like the unknown one: in its own group first (``optim.wd`` -> ``optim.weight_decay``), then
    by the whole name, then by the last part alone (``lr`` -> ``optim.lr``)."""
    group, _, leaf = unknown.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if group and key.rpartition(".")[0] == group}
    leaves = {key.rpartition(".")[2]: key for key in known}
    for wanted, candidates, cutoff in (
        (leaf, siblings, 0.25),
        (unknown, {k: k for k in known}, 0.6),
        (leaf, leaves, 0.6),
    ):
        close = difflib.get_close_matches(wanted, list(candidates), n=1, cutoff=cutoff)
        if close:
            return candidates[close[0]]
    return None


Defaults = Callable[[dict[str, Any]], dict[str, Any]]


def parse(
    config: type[T],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    defaults: Defaults | None = None,
) -> T:
    """Parse ``argv`` (default: the process's) into an instance of the dataclass ``config``.

    Later options win over earlier ones, and the command line over ``--config FILE``. ``defaults`` gets the plain
    top-level values that were given (``preset`` ...) and returns nested defaults that follow from them, which any
    option still overrides. Exits with code 2 and a message naming the key on bad input.
    """
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=prog, description=description or first_line(config))
    words = plain_words(words, config)
    fill_parser(parser, config, words, defaults)
    return build(parser, config, instances(parser, words))


def fill_parser(parser: Parser, config: type[Any], words: Sequence[str], defaults: Defaults | None) -> None:
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(config)
    if defaults is not None:
        try:
            parser.set_defaults(known_defaults(parser, defaults(peek(config, words))))
        except (OSError, ValueError, KeyError) as error:
            parser.error(str(error))


def peek(config: type[Any], words: Sequence[str]) -> dict[str, Any]:
    """Plain top-level values before parsing proper: the dataclass's defaults, then each ``--config``, then options."""
    names = [item.name for item in fields(config)]
    found = {item.name: item.default for item in fields(config) if item.default is not MISSING}
    rest = iter(words)
    for word in rest:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or (name not in names and name != "config"):
            continue
        text = value if equals else next(rest, "")
        if name != "config":
            found[name] = yaml.safe_load(text)
        elif os.path.isfile(text):
            with open(text) as file:
                content = yaml.safe_load(file)
            found.update({key: value for key, value in (content or {}).items() if key in names})
    return found


def known_defaults(parser: Parser, nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested defaults by dotted key, cut where the parser's own keys end (a ``dict`` option stays a dict)."""
    leaves = set(known_keys(parser))
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        dotted = f"{prefix}{name}"
        if dotted in leaves:
            flat[dotted] = value
        elif isinstance(value, dict):
            flat.update(known_defaults(parser, value, f"{dotted}."))
        else:
            raise KeyError(f"'{dotted}' is not a key of this command")
    return flat


def parse_command(
    commands: Mapping[str, type[Any]],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str | None = None,
    positional: Mapping[str, str] | None = None,
    defaults: Mapping[str, Defaults] | None = None,
) -> tuple[str, Any]:
    """Parse ``PROG COMMAND [options]``: returns the command's name and an instance of its dataclass.

    ``positional`` maps a command to the one field of its dataclass that stands without its ``--name``; an option of
    that name works as well. ``defaults`` is as in :func:`parse`, by command.
    """
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    if words and words[0] in commands:
        words = [words[0], *plain_words(words[1:], commands[words[0]])]
    parser = Parser(prog=prog, description=description)
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, config in commands.items():
        child = Parser(prog=f"{prog} {name}", description=first_line(config))
        fill_parser(child, config, words[1:], (defaults or {}).get(name) if words[:1] == [name] else None)
        subcommands.add_subcommand(name, child, help=first_line(config))
    field = (positional or {}).get(words[0]) if words else None
    if field and len(words) > 1 and not words[1].startswith("-"):
        words = [words[0], f"--{field}", *words[1:]]
    namespace = instances(parser, words)
    return namespace.command, build(parser, commands[namespace.command], namespace[namespace.command])


def instances(parser: Parser, words: Sequence[str]) -> Namespace:
    """The parsed words with nested dataclasses built; what a dataclass says of a bad value is a command error."""
    namespace = parser.parse_args(words)
    try:
        return parser.instantiate_classes(namespace)
    except ValueError as error:
        parser.error(str(error))


def build(parser: Parser, config: type[T], namespace: Namespace) -> T:
    """An instance of the dataclass from the namespace, whose nested dataclasses are instances already."""
    values = dict(vars(namespace))
    values.pop("config", None)
    try:
        return config(**values)
    except ValueError as error:
        parser.error(str(error))


def first_line(config: type[Any]) -> str:
    return (config.__doc__ or "").strip().split("\n")[0]


def plain_words(words: Sequence[str], config: type[Any]) -> list[str]:
    """``--dry-run`` as ``--dry_run=true``: dashes in a name are underscores, a true-or-false option may stand alone."""
    flags = {f"--{name}" for name in flag_keys(config)}
    plain: list[str] = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        alone = place + 1 == len(words) or words[place + 1].startswith("--")
        plain.append(f"{name}=true" if name in flags and not equals and alone else f"{name}{equals}{value}")
    return plain


def flag_keys(config: type[Any], prefix: str = "") -> list[str]:
    """Dotted keys of the dataclass, and of those within it, that are true or false."""
    keys: list[str] = []
    types = get_type_hints(config)
    for item in fields(config):
        if types[item.name] is bool:
            keys.append(f"{prefix}{item.name}")
        elif is_dataclass(types[item.name]):
            keys += flag_keys(types[item.name], f"{prefix}{item.name}.")
    return keys


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """``argv`` without the deepspeed launcher's ``--local_rank=N``, which becomes LOCAL_RANK where that is unset.

    Option names may be written with dashes as well: ``--max-side`` is ``--max_side``.
    """
    words: list[str] = []
    rest = iter(argv)
    for word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
        if name == "--local_rank":
            os.environ.setdefault("LOCAL_RANK", value or next(rest, "0"))
        else:
            words.append(name + equals + value)
    return words
