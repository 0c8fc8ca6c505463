"""One sample: the members of a tar that share a key. Parsing never unpickles anything.

airport/12.jpg  airport/12.json {"captions": [...], "label": "airport"}   our own shards: 12.txt repeats the first
                                                                         caption for other programs, we do not read it
airport/12.jpg  airport/12.txt                                            plain WebDataset
000123.img_content  000123.img_name  000123.caption                       RS5M as published
s0000012.webp  s0000012.cls or .txt                                       CLIP Benchmark, see foreign_layout.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from priorclip.data_shards.format.foreign_layout import PLAIN, Layout

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif", "jp2", "img_content")
CAPTION_MEMBER = "txt"
TEXT_MEMBERS = (CAPTION_MEMBER, "caption")
JSON_MEMBER, LABEL_MEMBER, NAME_MEMBER = "json", "cls", "img_name"
USED_MEMBERS = frozenset((*IMAGE_MEMBERS, *TEXT_MEMBERS, JSON_MEMBER, LABEL_MEMBER, NAME_MEMBER))


class BadSample(ValueError):
    """A sample that cannot be used. ``reason`` is one of a few phrases that are counted, ``detail`` gives more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type[BadSample], tuple[str, str]]:
        return BadSample, (self.reason, self.detail)


@dataclass(frozen=True)
class Sample:
    """The content of one key of a shard.

    Args:
        key: member name up to the first dot of its base name, with its folders (the WebDataset rule)
        image: encoded image bytes
        captions: captions that are not blank
        label: scene class or None
        info: all of KEY.json; in other layouts the fields that exist, e.g. ``img_name``
        shard: path of the tar, for messages
    """

    key: str
    image: bytes
    captions: list[str]
    label: str | None
    info: dict[str, Any] = field(default_factory=dict)
    shard: str = ""

    def texts(self, caption_field: str) -> list[str]:
        """Returns the captions of a field that are not blank. Raises BadSample if there are none."""
        texts = self.captions if caption_field == "captions" else captions_of(self.info, caption_field)
        if not texts:
            raise BadSample("no caption", f"no text in '{caption_field}'")
        return texts


def split_name(name: str) -> tuple[str, str]:
    """Splits a member name into (key, extension in lower case) at the first dot of the base name.

    ``a.b/c.seg.PNG`` -> (``a.b/c``, ``seg.png``), as webdataset's ``base_plus_ext`` does.
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def is_member(name: str) -> bool:
    """Returns True if a file in a tar belongs to a sample: it has an extension and is not hidden.

    This is webdataset's rule: macOS's ``._a.jpg`` and ``.DS_Store`` must not come between an image and its caption.
    """
    base = name.rpartition("/")[2]
    return not base.startswith(".") and "." in base


def parse_sample(key: str, members: Mapping[str, bytes], shard: str, layout: Layout = PLAIN) -> Sample:
    """Builds a Sample from members by extension. Raises BadSample for a missing image or text that does not parse."""
    image = next((members[name] for name in IMAGE_MEMBERS if name in members), None)
    if image is None:
        raise BadSample("no image", f"members: {', '.join(sorted(members))}")
    if not image:
        raise BadSample("empty image", "zero bytes")
    return Sample(key, image, *parse_text(members, layout), shard)


def parse_text(members: Mapping[str, bytes], layout: Layout = PLAIN) -> tuple[list[str], str | None, dict[str, Any]]:
    """Returns captions, label and JSON of a sample; needs no image. Raises BadSample."""
    info = _json(members.get(JSON_MEMBER))
    captions = captions_of(info, "captions")
    for name in TEXT_MEMBERS:
        if not captions and name in members:
            whole = _utf8(members[name], name)
            texts = whole.splitlines() if layout.caption_lines and name == CAPTION_MEMBER else [whole]
            captions = [text for each in texts if (text := clean_caption(each, name))]
    if not captions:
        captions = captions_of(info, "caption")
    if NAME_MEMBER in members:
        info.setdefault(NAME_MEMBER, _utf8(members[NAME_MEMBER], NAME_MEMBER))
    label = info.get("label")
    if label is None and LABEL_MEMBER in members:
        label = named_class(_utf8(members[LABEL_MEMBER], LABEL_MEMBER), layout.names)
    return captions, _label(label), info


def named_class(text: str, names: Sequence[str]) -> str:
    """Returns the name of the class whose number KEY.cls holds, or the text itself if there are no names.

    Raises BadSample for a number without a name.
    """
    number = text.strip()
    if not names:
        return text
    if number.isascii() and number.isdigit() and len(number) < 10 and int(number) < len(names):
        return names[int(number)]
    if number in names:
        return number
    raise BadSample("unknown class", f"'{number[:40]}' is not a line of classnames.txt, which has {len(names)}")


def _label(value: Any) -> str | None:
    """Returns a scene class as text. Numbers count as names, a blank is None."""
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        text = "" if value is None else str(value).strip()
        return require_encodable(text, "label") or None
    raise BadSample("bad json", f"'label' is a {type(value).__name__}, not a name")


def captions_of(info: Mapping[str, Any], name: str) -> list[str]:
    """Returns the strings of ``info[name]``, a list or one string, stripped and without blanks. Raises BadSample."""
    value = info.get(name) or []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise BadSample("bad json", f"'{name}' is not a list of strings")
    return [stripped for text in texts if (stripped := clean_caption(text, name))]


def clean_caption(text: str, name: str) -> str:
    """Returns a caption without NUL bytes and outer blanks. Raises BadSample if it cannot be encoded."""
    return require_encodable(text.replace("\0", " ").strip(), name)


def require_encodable(text: str, name: str) -> str:
    """Returns the text. Raises BadSample if it has half a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadSample("text is not UTF-8", f"'{name}': {error.reason} at {error.start}") from error
    return text


def _json(data: bytes | None) -> dict[str, Any]:
    if data is None:
        return {}
    try:
        info = json.loads(_utf8(data, JSON_MEMBER))
    except (ValueError, RecursionError) as error:  # ValueError also for integers of more than 4,300 digits
        if isinstance(error, BadSample):
            raise
        raise BadSample("bad json", str(error)) from error
    if not isinstance(info, dict):
        raise BadSample("bad json", f"an object was expected, not {type(info).__name__}")
    return info


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSample("text is not UTF-8", f"member .{name}: {error}") from error
