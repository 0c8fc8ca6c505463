"""The rules that look at a caption alone: its length, its language, and words that it must not contain.

    rules = TextRules(min_words=3, max_words=60, languages=("en",), certainty=0.5, words=("stock photo",))
    rules.judge("a dock")                       # ("too few words", "2 words")
    rules.judge("ein Hafen mit vielen Booten")  # ("other language", "de, 0.99")
    rules.judge("a harbour with ten boats")     # None

The language comes from py3langid, whose model is part of the package. A short caption can look like another language,
so a caption counts as one of another language only if the model is certain.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from priorclip.common.untrusted_json import read_regular

FEW, MANY, LANGUAGE, WORD = "too few words", "too many words", "other language", "unwanted word"
LONGEST_LIST = 10_000_000  # bytes of a list of words
Verdict = tuple[str, str]  # the rule, and what it saw


@dataclass(frozen=True)
class TextRules:
    """What a caption must be; None and an empty tuple switch a rule off.

    Args:
        min_words, max_words: words, parted by blanks
        languages: ISO 639-1 codes of the languages to keep
        certainty: probability from which another language counts
        words: words and phrases that no caption may contain; case is ignored, and a word must be whole
    """

    min_words: int | None = None
    max_words: int | None = None
    languages: tuple[str, ...] = ()
    certainty: float = 0.5
    words: tuple[str, ...] = ()

    def judge(self, caption: str) -> Verdict | None:
        """Returns the first rule that the caption breaks, with what it saw; None if it breaks none."""
        count = len(caption.split())
        if self.min_words is not None and count < self.min_words:
            return FEW, f"{count} words"
        if self.max_words is not None and count > self.max_words:
            return MANY, f"{count} words"
        if self.words and (found := phrase_pattern(self.words).search(caption)):
            return WORD, found.group().lower()
        if self.languages:
            language, probability = identifier().classify(caption)
            if language not in self.languages and probability >= self.certainty:
                return LANGUAGE, f"{language}, {probability:.2f}"
        return None


@lru_cache(maxsize=2)
def phrase_pattern(phrases: tuple[str, ...]) -> re.Pattern[str]:
    """Returns a pattern that finds each phrase as whole words, whatever the case and the blanks between the words."""
    parts = [r"\s+".join(map(re.escape, phrase.split())) for phrase in phrases]
    return re.compile(rf"(?<!\w)(?:{'|'.join(parts)})(?!\w)", re.IGNORECASE)


@lru_cache(maxsize=1)
def identifier() -> Any:
    """Returns the language model. Each process loads it once."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def check_languages(languages: Sequence[str]) -> None:
    """Raises ValueError for a language that the model does not know, or if its library is not installed."""
    if not languages:
        return
    if find_spec("py3langid") is None:
        raise ValueError("--languages needs py3langid: pip install 'priorclip-pretraining[curate]'")
    known = {str(name) for name in identifier().labels}
    unknown = [name for name in languages if name not in known]
    if unknown:
        raise ValueError(f"--languages: {', '.join(unknown)} is not known; codes are {', '.join(sorted(known))}")


def read_words(option: str | None) -> tuple[str, ...]:
    """Returns the phrases of ``--words``: a text file with one a line, or phrases parted by commas.

    Raises:
        ValueError: the file has no phrase, is too large, or is not UTF-8
    """
    if option is None:
        return ()
    path = Path(option)
    try:
        text = read_regular(path, LONGEST_LIST).decode() if path.is_file() else option.replace(",", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"--words {option} is not text in UTF-8: {error}") from error
    phrases = tuple(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))
    if not phrases:
        raise ValueError(f"--words {option}: there is no word in it")
    return phrases


def judge_captions(rules: TextRules, first: int, captions: Sequence[str]) -> tuple[int, list[Verdict | None]]:
    """Returns ``first`` and the verdict on each caption: one job of a worker process."""
    return first, [rules.judge(caption) for caption in captions]
