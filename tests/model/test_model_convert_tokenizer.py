"""The tokenizer of a converted CLIP gives the same ids as open_clip's."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, CLIPTokenizer

from priorclip.model.convert import clip_tokenizer

open_clip = pytest.importorskip("open_clip")
DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
SPECIAL = ("<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>")
TEXTS = [
    "a plane is parked near 25 houses, isn't it?",
    "  Many  GREEN\ttrees\nand a river ",
    "",
    "!!! ... -- (a) [b] #1 50% $3 a/b c\\d",
    "they've we'll I'm he'd you're 's 't",
    "caf\u00e9 cafe\u0301 na\u00efve \u00fcber stra\u00dfe \u0130stanbul",
    "\u201cquoted\u201d \u2018too\u2019 it\u2019s",
    "AT&amp;T &lt;b&gt; &quot;x&quot; &amp;amp; 5 &deg;",
    "\u673a\u573a\u548c\u98de\u673a \u7a7a\u6e2f \U0001f6e9\ufe0f \u0627\u0644\u0645\u0637\u0627\u0631",
    "\ufb01eld \uff21\uff22 \uff11\uff12",
    "x" * 300,
    "word " * 200,
    "1234567890 3.14 2,000 km\u00b2",
    "a\x00b\x07c",
]


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    clip_tokenizer.write_clip_tokenizer(folder, 77)
    return AutoTokenizer.from_pretrained(str(folder))


def assert_same_ids(ours, texts):
    found = ours(texts, padding="max_length", truncation=True, max_length=77)
    for text, ids, mask, expected in zip(
        texts, found["input_ids"], found["attention_mask"], open_clip.tokenize(texts).tolist(), strict=True
    ):
        real = sum(mask)
        assert ids[:real] == expected[:real], text
        assert expected[real:] == [0] * (77 - real), text


def test_ids_equal_open_clips(ours):
    assert (len(ours), ours.model_max_length) == (49408, 77)
    assert_same_ids(ours, TEXTS)


def has_no_special_token(text):
    """open_clip's names of the special tokens are not those of OpenAI and transformers. Hypothesis tries both."""
    return not any(token in text for token in SPECIAL)


@given(st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).filter(has_no_special_token))
def test_any_ascii_text(ours, text):
    assert_same_ids(ours, [text])


def test_special_tokens_in_a_text_are_those_of_transformers(ours):
    """As in OpenAI's code, ``<|endoftext|>`` in a caption is the token itself; open_clip reads its letters."""
    theirs = CLIPTokenizer.from_pretrained(ours.name_or_path)
    for text in ("a <|endoftext|> b", "<|startoftext|>", "<start_of_text>", "a <end_of_text>"):
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], text
    assert ours("<|startoftext|>")["input_ids"] == [49406, 49406, 49407]


@given(st.text(st.characters(categories=("L", "N", "P", "Z")), max_size=30))
def test_any_letters_of_any_script(ours, text):
    """Texts that ftfy does not change and whose lower case does not depend on the Unicode version."""
    from ftfy import fix_text

    if fix_text(text) == text and all(len(letter.lower()) == 1 for letter in text):
        assert_same_ids(ours, [text])


@pytest.mark.parametrize("name", ["rsicd/test_caps.txt", "rsitmd/test_caps.txt", "sydney/dataset_sydney.json"])
def test_captions_of_the_benchmarks(ours, name):
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"no {path}")
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".json":
        captions = [s["raw"] for image in json.loads(text)["images"] for s in image["sentences"]]
    else:
        captions = text.splitlines()
    assert_same_ids(ours, sorted(set(captions))[:2000])


def test_without_vocabulary_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(clip_tokenizer, "VOCABULARY", "no such file")
    monkeypatch.setattr(clip_tokenizer, "HUB", str(tmp_path / "nowhere"))
    with pytest.raises(OSError, match="pip install open_clip_torch, or name a folder by --tokenizer"):
        clip_tokenizer.write_clip_tokenizer(tmp_path, 77)
