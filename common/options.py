"""Typed configuration for every command: dataclass + YAML file + command line, through jsonargparse.

    @dataclass
    class Config:
        '''Train a thing.

        Args:
            lr: peak learning rate
        '''
        lr: float = 1e-3

    config = parse(Config, ["--config", "run.yaml", "--lr", "1e-4"], prog="train")

What this adds to jsonargparse: an error is one line (command_line.py), and names the nearest known key for an unknown
key; text in a YAML file needs no quotes (``zero: 2``); ``--dry-run`` is ``--dry_run``, and alone it means true; ``-k``
is ``--k``; ``--local_rank`` of the deepspeed launcher is removed first. The module imports nothing slow, so ``--help``
is fast.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace

from priorclip.common.command_line import ERROR, print_error

T = TypeVar("T")

# Options of the parser itself.
OWN_KEYS = ("help", "print_config", "print_shtab")

TAG = "tag:yaml.org,2002:"
NULL = TAG + "null"
# What an option of this type may be in a YAML file without being text.
PLAIN_TAGS: dict[Any, tuple[str, ...]] = {
    type(None): (NULL,),
    int: (TAG + "int",),
    float: (TAG + "int", TAG + "float"),
    bool: (TAG + "bool",),
}

UNKNOWN = re.compile(
    r"unrecognized arguments: --?(?P<flag>[\w.-]+)"
    r"|Group '(?P<group>[\w.]+)' does not accept option '(?P<option>[\w.]+)'"
    r"|Subcommand '\w+' does not accept option '(?P<child>[\w.]+)'"
    r"|Option '(?P<top>[\w.]+)' is not accepted"
    r"|[Kk]ey '(?P<key>[\w.]+)' is not expected"
)

# Messages of jsonargparse, and the same in fewer words.
PLAIN_ERRORS = [
    (re.compile(pattern, re.DOTALL), plain)
    for pattern, plain in (
        (r'Parser key "([\w.]+)":\s*', r"\1: "),
        (
            r"Does not validate against any of the Union subtypes\s+Subtypes: \[(.*?)\]\n.*Given value: ",
            r"expected \1, got ",
        ),
        (r"Expected an? (<class '\w+'>)\. Got value: ", r"expected \1, got "),
        (r"<class 'NoneType'>", r"null"),
        (r"<class '(\w+)'>", r"\1"),
        (r"(Problems parsing config|Unexpected config): .*", r"this is no YAML file of 'key: value' lines"),
    )
]


class Parser(ArgumentParser):
    """jsonargparse's parser with one-line errors that say "did you mean", and without abbreviated option names."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)
        self.config: type[Any] | None = None  # the dataclass of the options, if there are no sub-commands
        self.command: str | None = None  # the sub-command that runs, if there are some
        self.file: str | None = None  # the YAML file that is being read

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parses a YAML file, which errors then name."""
        self.file = str(path)
        try:
            namespace = super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            self.error(str(error))
        self.file = None
        return namespace

    def parse_string(self, *args: Any, **kwargs: Any) -> Namespace:
        """Parses the text of a YAML file. Values of text options need no quotes there: ``zero: 2``."""
        try:
            for name in {"content", "cfg_str"} & kwargs.keys():  # the second is the name in older versions
                kwargs[name] = quote_text(kwargs[name], self.config)
        except TypeError as error:
            self.error(str(error))
        return super().parse_string(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the process with one line that names the key, and exit code 2."""
        unknown = unknown_key(message)
        if unknown:
            known = [key for key in known_keys(self) if key != "config"]
            near = nearest(unknown, known)
            some = f"known keys: {', '.join(sorted(known))}" if len(known) <= 50 else "--help lists the keys"
            hint = f"did you mean '{near}'?" if near else some
            message = f"unknown key '{unknown}': {hint}"
            if unknown == near:  # with one dash, which argparse takes for letters
                message = f"unknown option '-{unknown}': write '--{unknown}'"
        for pattern, plain in PLAIN_ERRORS:
            message = pattern.sub(plain, message)
        if self.command and "arguments are required" in message:
            message = message.replace(f" {self.command}.", " ")
        prog = " ".join(filter(None, (self.prog.replace(" [options]", ""), self.command)))
        print_error(prog, f"{self.file}: {message}" if self.file else message)
        sys.exit(ERROR)


def quote_text(content: str, hint: Any) -> str:
    """Returns the YAML text with quotes around the values of options that are text by the type ``hint``.

    YAML reads ``zero: 2`` and ``dir: 2024-05-01`` as a number and a date.

    Raises:
        TypeError: a value that jsonargparse would overlook: null, or no group of keys
    """
    try:
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return content  # the parser reports the error
    if not isinstance(node, yaml.MappingNode):
        return content
    quote_node(node, hint)
    return yaml.serialize(node, allow_unicode=True)


def quote_node(node: yaml.Node, hint: Any, key: str = "") -> None:
    """Quotes the scalars at and under the node that are text by the type ``hint``, as in ``quote_text``."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if is_dataclass(hint) and not isinstance(node, yaml.MappingNode):
        given = node.value if isinstance(node, yaml.ScalarNode) else "a list"
        raise TypeError(f"{key}: expected keys of its own, such as {key}.{fields(hint)[0].name}, got {given}")
    if node.tag == NULL and hint in (str, int, float, bool):
        raise TypeError(f"{key}: expected {hint.__name__}, got null")
    if isinstance(node, yaml.ScalarNode):
        if any(is_text(kind) for kind in kinds) and not any(node.tag in PLAIN_TAGS.get(kind, ()) for kind in kinds):
            node.tag, node.style = TAG + "str", node.style or '"'
        return
    for kind in kinds:
        types = get_type_hints(kind) if is_dataclass(kind) else {}
        inner = get_args(kind)[-1] if get_origin(kind) in (list, tuple, dict) else None
        if isinstance(node, yaml.MappingNode) and get_origin(kind) in (dict, None):
            # A group without keys, "run:", is left out.
            node.value = [
                item for item in node.value if not (item[1].tag == NULL and is_dataclass(types.get(item[0].value)))
            ]
            for name, value in node.value:
                quote_node(value, types.get(name.value, inner), f"{key}.{name.value}" if key else str(name.value))
        elif isinstance(node, yaml.SequenceNode) and get_origin(kind) in (list, tuple):
            for value in node.value:
                quote_node(value, inner, key)


def is_text(hint: Any) -> bool:
    return hint is str or (get_origin(hint) is Literal and isinstance(get_args(hint)[0], str))


def unknown_key(message: str) -> str | None:
    """Returns the dotted key that a jsonargparse error calls unknown, or None for other errors."""
    found = UNKNOWN.search(message)
    if not found:
        return None
    parts = found.groupdict()
    if parts["option"]:
        return f"{parts['group']}.{parts['option']}"
    return parts["flag"] or parts["child"] or parts["top"] or parts["key"]


def known_keys(parser: ArgumentParser) -> list[str]:
    """Returns every dotted key of the parser and of its sub-commands."""
    keys: list[str] = []
    for action in parser._actions:
        choices = getattr(action, "choices", None)
        if isinstance(choices, Mapping) and all(isinstance(child, ArgumentParser) for child in choices.values()):
            for child in choices.values():
                keys += known_keys(child)
        else:
            keys += [option[2:] for option in action.option_strings if option.startswith("--")]
    keys = [key for key in dict.fromkeys(keys) if not key.endswith("+") and key not in OWN_KEYS]
    groups = {key.rsplit(".", 1)[0] for key in keys if "." in key}
    return [key for key in keys if key not in groups]


def nearest(unknown: str, known: Sequence[str]) -> str | None:
    """Returns the known key that is most similar to an unknown one.

    It looks in the same group first (``optim.wd`` -> ``optim.weight_decay``), then compares whole names, then the last
    parts (``lr`` -> ``optim.lr``).
    """
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
    """Parses ``argv`` (default: the process's arguments) into an instance of the dataclass ``config``.

    Later options override earlier ones, and the command line overrides ``--config FILE``. ``defaults`` gets the given
    plain top-level values (``preset`` ...) and returns nested defaults that depend on them; any option overrides these.
    Bad input ends the process with one line that names the key, and exit code 2.
    """
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    parser = Parser(prog=prog, description=description or first_line(config))
    words = plain_words(words, config)
    fill_parser(parser, config, words, defaults)
    return build(parser, config, instances(parser, words))


def fill_parser(parser: Parser, config: type[Any], words: Sequence[str], defaults: Defaults | None) -> None:
    parser.config = config
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(config)
    if defaults is not None:
        try:
            parser.set_defaults(known_defaults(parser, defaults(peek(config, words))))
        except (OSError, ValueError, KeyError) as error:
            parser.error(str(error))


def peek(config: type[Any], words: Sequence[str]) -> dict[str, Any]:
    """Returns the plain top-level values before the real parsing: defaults, then ``--config`` files, then options."""
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
            found.update({key: value for key, value in read_mapping(text, config).items() if key in names})
    return found


def read_mapping(path: str, config: type[Any]) -> dict[str, Any]:
    """Returns the top level of a YAML file, or nothing from a file that the parser will refuse."""
    try:
        content = yaml.safe_load(quote_text(Path(path).read_text(), config))
    except (yaml.YAMLError, TypeError, UnicodeDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def known_defaults(parser: Parser, nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested defaults by dotted key. The value of a ``dict`` option stays a dict."""
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
    """Parses ``PROG COMMAND [options]`` and returns the command's name and an instance of its dataclass.

    ``positional`` maps a command to the field of its dataclass that may stand without its ``--name``; a list takes
    all words up to the first option. ``defaults`` is as in :func:`parse`, for each command.
    """
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    if words and words[0] in commands:
        words = [words[0], *plain_words(words[1:], commands[words[0]])]
    parser = Parser(prog=prog, description=description)
    parser.command = words[0] if words[:1] and words[0] in commands else None
    subcommands = parser.add_subcommands(required=True, dest="command")
    for name, config in commands.items():
        child = Parser(prog=f"{prog} {name}", description=first_line(config))
        fill_parser(child, config, words[1:], (defaults or {}).get(name) if words[:1] == [name] else None)
        subcommands.add_subcommand(name, child, help=first_line(config))
    field = (positional or {}).get(words[0]) if words else None
    if field and len(words) > 1 and not words[1].startswith("-"):
        words = [words[0], *name_positional(words[1:], field, commands[words[0]])]
    namespace = instances(parser, words)
    return namespace.command, build(parser, commands[namespace.command], namespace[namespace.command])


def name_positional(words: Sequence[str], field: str, config: type[Any]) -> list[str]:
    """Puts ``--field`` before the words that stand without a name. Several words become a list."""
    if get_origin(get_type_hints(config)[field]) is not list:
        return [f"--{field}", *words]
    values = list(takewhile(lambda word: not word.startswith("-"), words))
    return [f"--{field}", json.dumps(values), *words[len(values) :]]


def instances(parser: Parser, words: Sequence[str]) -> Namespace:
    """Parses the words and builds nested dataclasses. A ValueError of a dataclass is an error of the command."""
    namespace = parser.parse_args(words)
    try:
        return parser.instantiate_classes(namespace)
    except ValueError as error:
        parser.error(str(error))


def build(parser: Parser, config: type[T], namespace: Namespace) -> T:
    """Returns an instance of the dataclass. The nested dataclasses in the namespace are instances already."""
    values = dict(vars(namespace))
    values.pop("config", None)
    try:
        return config(**values)
    except ValueError as error:
        parser.error(str(error))


def first_line(config: type[Any]) -> str:
    return (config.__doc__ or "").strip().split("\n")[0]


def plain_words(words: Sequence[str], config: type[Any]) -> list[str]:
    """Turns ``--dry-run`` into ``--dry_run=true``: dashes in a name become underscores, a bool may stand alone.

    An option of one letter may have one dash: ``-k`` is ``--k``.
    """
    flags = {f"--{name}" for name in flag_keys(config)}
    letters = {f"-{item.name}" for item in fields(config) if len(item.name) == 1}
    plain: list[str] = []
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        name = f"-{name}" if name in letters else name
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
        alone = place + 1 == len(words) or words[place + 1].startswith("--")
        plain.append(f"{name}=true" if name in flags and not equals and alone else f"{name}{equals}{value}")
    return plain


def flag_keys(config: type[Any], prefix: str = "") -> list[str]:
    """Returns the dotted keys of all bool fields of the dataclass and of the dataclasses in it."""
    keys: list[str] = []
    types = get_type_hints(config)
    for item in fields(config):
        if types[item.name] is bool:
            keys.append(f"{prefix}{item.name}")
        elif is_dataclass(types[item.name]):
            keys += flag_keys(types[item.name], f"{prefix}{item.name}.")
    return keys


def without_local_rank(argv: Sequence[str]) -> list[str]:
    """Returns ``argv`` without the deepspeed launcher's ``--local_rank=N``, which sets LOCAL_RANK if it is unset.

    Dashes in option names become underscores: ``--max-side`` is ``--max_side``.
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
