"""CLIP's tokenizer as a transformers folder, with the same token ids as open_clip's ``SimpleTokenizer``.

    write_clip_tokenizer("converted", context_length=77)       # tokenizer.json, tokenizer_config.json

The vocabulary (byte-level BPE, 49,408 entries) is read from the installed open_clip_torch without importing it, or from
the hub. transformers' own CLIP tokenizer does not clean a text as open_clip does (ftfy, HTML entities) and splits
punctuation further. So the pipeline is built here. It has the repairs of ftfy that captions need: quotes, ligatures,
full-width letters, control characters. It does not repair mojibake.
"""

from __future__ import annotations

import gzip
import html.entities
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from priorclip.common.output import get_logger
from priorclip.common.packages import package_folder
from priorclip.common.safe_tokenizer import open_tokenizer

log = get_logger(__name__)

START, END = "<|startoftext|>", "<|endoftext|>"
HUB = "openai/clip-vit-base-patch32"
VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2
CLIP_ENTRIES = MERGES + 2 * 256 + 2
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
QUOTES = {"[\u2018\u2019\u201a\u201b\u02bc]": "'", "[\u201c\u201d\u201e\u201f]": '"'}
LIGATURES = {"\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl", "\ufb05": "\u017ft"}
LIGATURES |= {"\ufb06": "st", "\u0132": "IJ", "\u0133": "ij", "\u0149": "\u02bcn"}
CONTROL = "[\\x00-\\x08\\x0b\\x0e-\\x1f\\x7f\\ufeff]"
ESCAPES = "\\x1b\\[[0-?]*[ -/]*[@-~]"


def write_clip_tokenizer(folder: str | Path, context_length: int) -> None:
    """Writes the tokenizer's files into the folder.

    Raises OSError that says what to install if the vocabulary cannot be found.
    """
    vocabulary = installed_vocabulary()
    if vocabulary is None:
        log.info("open_clip_torch is not installed: the tokenizer is taken from the hub, %s", HUB)
        tokenizer = from_hub()
    else:
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=build_tokenizer(read_merges(vocabulary)),
            bos_token=START,
            eos_token=END,
            pad_token=END,
            unk_token=END,
        )
    tokenizer.model_max_length = context_length
    tokenizer.save_pretrained(str(folder))


def installed_vocabulary() -> Path | None:
    """Returns the vocabulary file of the installed open_clip_torch, or None."""
    try:
        path = package_folder("open_clip") / VOCABULARY
    except FileNotFoundError:
        return None
    return path if path.is_file() else None


def from_hub() -> Any:
    try:
        return open_tokenizer(HUB)
    except OSError as error:
        raise OSError(
            f"CLIP's vocabulary is neither in an installed open_clip_torch nor on the hub ({HUB}): "
            f"pip install open_clip_torch, or name a folder by --tokenizer ({error})"
        ) from error


def read_merges(path: Path) -> list[tuple[str, str]]:
    """Returns the merges in their order; the first line is a title, and the file has more merges than CLIP uses."""
    lines = gzip.decompress(path.read_bytes()).decode("utf-8").split("\n")[1 : MERGES + 1]
    return [(left, right) for left, right in (line.split() for line in lines)]


def build_tokenizer(merges: list[tuple[str, str]]) -> Tokenizer:
    """Builds the pipeline: clean, lower case, split into words, bytes, BPE, start and end token."""
    alphabet = byte_alphabet()
    entries = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges), START, END]
    vocabulary = {entry: place for place, entry in enumerate(entries)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token=END))
    core.normalizer = build_cleaning()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
    special = [(START, vocabulary[START]), (END, vocabulary[END])]
    core.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    core.add_special_tokens([AddedToken(name, normalized=False, special=True) for name, _ in special])
    return core


def build_cleaning() -> normalizers.Normalizer:
    """Builds open_clip's cleaning of a text: simple repairs of ftfy, HTML entities (twice), blanks, lower case."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(Regex(ESCAPES), "")]
    steps += [normalizers.Replace(Regex(CONTROL), "")]
    steps += [normalizers.Replace(Regex(pattern), plain) for pattern, plain in QUOTES.items()]
    steps += [normalizers.Replace(letter, plain) for letter, plain in LIGATURES.items()]
    steps += [normalizers.Replace(chr(code), chr(code - 0xFEE0)) for code in range(0xFF01, 0xFF5F)]
    steps += [normalizers.Replace("\u3000", " "), normalizers.NFC()]
    named = {"&quot;": '"', "&#34;": '"', "&#39;": "'", "&apos;": "'", "&lt;": "<", "&gt;": ">", "&nbsp;": " "}
    entities = {name: f"&{name};" for name in ("deg", "times", "frac12", "sup2", "middot")}
    named |= {entity: html.entities.html5[f"{name};"] for name, entity in entities.items()}
    for _ in range(2):
        steps += [normalizers.Replace("&amp;", "&")]
        steps += [normalizers.Replace(entity, plain) for entity, plain in named.items()]
    steps += [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    return normalizers.Sequence(steps)


def byte_alphabet() -> list[str]:
    """Returns a printable letter for each byte in the order of CLIP's vocabulary: printable bytes come first."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [chr(0x100 + place) for place in range(256 - len(own))]
    return [*map(chr, own), *others]
