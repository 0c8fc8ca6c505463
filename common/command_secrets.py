"""Removes the secrets of command lines by their structure, because every program names its credentials in its own way.

    mask_pipe("pipe:curl -u me:hunter2 https://host/a.tar")     ->  "pipe:curl -u *** https://host/a.tar"
    mask_flags("sshpass -p hunter2 ssh host cat a.tar")         ->  "sshpass -p *** ssh host cat a.tar"

In a ``pipe:`` shard, programs, hosts, paths, URLs and switches stay. The value of an option stays if it is a path, a
URL or a small number, or if the option is in ``HARMLESS``. The values of ``NAME=value`` and the words of ``echo`` are
masked. In other text only the known options for credentials are masked, because any other option may mean anything.
"""

from __future__ import annotations

import re

MASK = "***"
# A pipe: ends at the quote that stands before it (a shell writes ' inside '...' as '"'"'), or at the end of the line.
PIPE = re.compile(r"""(?<=')pipe:(?:'"'"'|[^'\n])*|(?<=")pipe:(?:\\.|[^"\\\n])*|(?<!['"\w])pipe:[^\n]*""")
ESCAPED = {"'": "'\"'\"'", '"': '\\"'}
WORD = re.compile(r"""(?:[^\s'"|;&()<>]|'(?:'"'"'|[^'])*'|"(?:\\.|[^"\\])*"|['"])+|\|\|?|&&?|;|<<<|[()<>]""")
NEW_COMMAND = ("|", "||", "&", "&&", ";", "(")
CREDENTIALS = re.compile(r"-(?:[pPuUHbk]|[a-zA-Z]\w*[^\w-].*|[a-zA-Z]\w{5,}|[a-zA-Z]*\d{4,})")
OPTIONS = "-X -h -o -l -C -f -n -c -t -T -m --request --region --profile --format --output --retry"
HARMLESS = frozenset(OPTIONS.split())
SECRET_NAME = re.compile(
    "pass|pw|secret|token|key|auth|cred|user|cookie|header|data|bearer|pin|otp|sas|sign", re.IGNORECASE
)
SWITCHES = re.compile(r"-(?:[qsSLvzNA46]|[a-zA-Z]{1,4}[^pPuUHbk\W\d])")  # they take no value
HARMLESS_NAMES = frozenset(("LANG", "LC_ALL", "TZ", "PATH", "HOME", "TMPDIR", "OMP_NUM_THREADS"))
PRINTS = ("echo", "printf")
PLAIN_VALUE = re.compile(r"[A-Za-z][\w.-]*(?:=[\w.-]+)?|\d{1,5}", re.ASCII)
PLACE = re.compile(r"['\"]?(?:/|\./|\.\./|~/|[a-z][a-z0-9+.-]*://)", re.IGNORECASE)

QUOTED = r"(?:'[^']*'|\"[^\"]*\"|[^\s'\",]+)"
FLAGS = tuple(
    (re.compile(pattern), kept)
    for pattern, kept in (
        (rf"(\bsshpass(?:['\"],)?\s+['\"]?-p(?:['\"],)?\s*)(?!\*\*\*){QUOTED}", rf"\1{MASK}"),
        (r"((?<![\w-])(?:-[uU]|--user|--proxy-user)(?:['\"],)?[\s=]*['\"]?)[^\s:'\"/=-][^\s:'\"/=]*:[^\s'\"]+",
         rf"\1{MASK}"),
        (r"((?<![\w-])(?:-H|--header|--proxy-header)(?:['\"],)?[\s=]*)'([\w-]+):[^']*'", rf"\1'\2: {MASK}'"),
        (r"((?<![\w-])(?:-H|--header|--proxy-header)(?:['\"],)?[\s=]*)\"([\w-]+):[^\"]*\"", rf'\1"\2: {MASK}"'),
        (r"((?<![\w-])(?:-H|--header|--proxy-header)[\s=]*)([\w-]+):(?!\s*\*\*\*)\s*\S+", rf"\1\2: {MASK}"),
        (rf"((?<![\w-])(?:--oauth2-bearer|--cookie|--passin|--pass)(?:['\"],)?[\s=]+)(?!-|\*\*\*){QUOTED}",
         rf"\1{MASK}"),
    )
)  # fmt: skip


def mask_pipes(text: str) -> str:
    """Returns the text with the secrets of each ``pipe:`` command masked."""
    if text.startswith("pipe:"):
        return mask_pipe(text)  # it may have several lines
    return PIPE.sub(_mask_found, text) if "pipe:" in text else text


def _mask_found(found: re.Match[str]) -> str:
    """Masks a command in a text. Within quotes its own quotes are escaped."""
    quote = found.string[found.start() - 1 : found.start()]
    if quote not in ESCAPED:
        return mask_pipe(found[0])
    return mask_pipe(found[0].replace(ESCAPED[quote], quote)).replace(quote, ESCAPED[quote])


def mask_flags(text: str) -> str:
    """Returns the text with ``***`` for the values of options that hold credentials in well-known programs."""
    for pattern, kept in FLAGS:
        text = pattern.sub(kept, text)
    return text


def mask_pipe(command: str) -> str:
    """Masks one ``pipe:`` command; see the module docstring."""
    masking = _PipeMask()
    head, rest = "pipe:", command.removeprefix("pipe:")
    return head + WORD.sub(lambda found: masking.word(found[0]), rest)


class _PipeMask:
    """Masks the words of a command one after the other. ``_flag`` is the option whose value may come next."""

    def __init__(self) -> None:
        self._program: str | None = None
        self._flag = ""

    def word(self, word: str) -> str:
        if word in NEW_COMMAND:
            self._program, self._flag = None, ""
            return word
        if word in ("<", ">", ")"):
            return word
        flag, self._flag = self._flag, ""
        if word == "<<<":
            self._flag = "-p"
            return word
        if word.startswith("-"):
            return self._option(word)
        if flag:
            is_port = flag == "-p" and self._program == "ssh" and word.isdigit()
            return word if is_port or keeps_value(flag, word) else MASK
        return self._plain(word)

    def _option(self, word: str) -> str:
        name, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            return word if keeps_value(name, value) else f"{name}={MASK}"
        if not word.startswith("--") and len(word) > 2 and CREDENTIALS.match(word):
            return word[:2] + MASK
        self._flag = "" if SWITCHES.fullmatch(word) else word
        return word

    def _plain(self, word: str) -> str:
        name, equals, _ = word.partition("=")
        if equals and re.fullmatch(r"\w+", name):
            return word if name in HARMLESS_NAMES else f"{name}={MASK}"
        if self._program is None:
            self._program = word
            return word
        return MASK if self._program in PRINTS else word


def keeps_value(flag: str, value: str) -> bool:
    """Tells whether the value of an option is no secret: a place, a small number, or that of a harmless option."""
    if flag[-1] in "pPuUHbk" if not flag.startswith("--") else SECRET_NAME.search(flag):
        return False
    if PLACE.match(value) or (value.isascii() and value.isdigit() and len(value) < 6):
        return True
    return flag in HARMLESS and bool(PLAIN_VALUE.fullmatch(value))
