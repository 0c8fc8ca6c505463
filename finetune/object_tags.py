"""Objects that captions name, as targets of a prior: a fixed list of nouns, found word by word.

    tags_of(["two planes are parked on the apron near a terminal"])     # {"airplane", "terminal"}
    targets = TagTargets(shards, "captions")
    targets(image_ids)                                                  # (B, K): 1 if any caption of the image names it

The list was made from the most frequent nouns of RSICD's and UC Merced's training captions: things and land cover that
can be seen in an image. Words of a scene as a whole (city, resort, school), of colour, form and number are not in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.stream.batch_fetcher import SampleSource

# Tag -> the words that name it, in the singular. A plural in -s, -es or -ies counts too.
WORDS: dict[str, tuple[str, ...]] = {
    "airplane": ("airplane", "aeroplane", "plane", "aircraft", "airliner", "jet"),
    "bare land": ("bareland", "bare land", "barren land", "bare soil"),
    "baseball field": ("baseball field", "baseballfield", "baseball diamond"),
    "basketball court": ("basketball court", "basketball field"),
    "beach": ("beach",),
    "boat": ("boat", "yacht", "ship", "ferry", "vessel"),
    "bridge": ("bridge",),
    "building": ("building", "skyscraper"),
    "car": ("car", "vehicle", "truck", "bus", "van"),
    "chimney": ("chimney",),
    "church": ("church",),
    "container": ("container",),
    "crop": ("crop", "farmland", "farm", "cropland"),
    "desert": ("desert", "dune"),
    "dock": ("dock", "wharf", "pier", "jetty"),
    "factory": ("factory", "workshop", "plant area"),
    "forest": ("forest", "wood", "jungle"),
    "golf course": ("golf course",),
    "grass": ("grass", "lawn", "meadow", "grassland"),
    "harbour": ("harbour", "harbor", "port", "marina"),
    "highway": ("highway", "freeway", "motorway", "expressway"),
    "house": ("house", "villa", "cottage"),
    "intersection": ("intersection", "crossroad", "roundabout"),
    "island": ("island",),
    "lake": ("lake",),
    "mountain": ("mountain", "hill", "ridge"),
    "parking lot": ("parking lot", "carpark", "car park", "parking space"),
    "path": ("path", "trail", "footpath"),
    "playground": ("playground", "football field", "soccer field", "pitch"),
    "pond": ("pond",),
    "railway": ("railway", "rail", "railroad"),
    "river": ("river", "stream", "creek"),
    "road": ("road", "street", "lane"),
    "roof": ("roof",),
    "runway": ("runway",),
    "sand": ("sand",),
    "sea": ("sea", "ocean"),
    "snow": ("snow",),
    "square": ("plaza",),
    "stadium": ("stadium",),
    "storage tank": ("tank", "storage tank"),
    "swimming pool": ("pool", "swimming pool"),
    "tennis court": ("tennis court",),
    "terminal": ("terminal",),
    "train": ("train",),
    "tree": ("tree", "palm"),
    "viaduct": ("viaduct", "overpass", "flyover"),
    "wave": ("wave", "spray", "surf"),
}
TAGS = tuple(WORDS)


def tags_of(captions: Iterable[str]) -> set[str]:
    """Returns the tags that any of the captions names."""
    found = {match[0] for caption in captions for match in pattern().finditer(caption.lower())}
    return {owners()[word] for word in found}


@cache
def owners() -> dict[str, str]:
    """Each word, in the singular and in the plural, and its tag."""
    return {form: tag for tag, words in WORDS.items() for word in words for form in (word, plural(word))}


@cache
def pattern() -> re.Pattern[str]:
    # Longer words first, so that "car park" is a parking lot and not a car.
    words = sorted(owners(), key=len, reverse=True)
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})\b")


def plural(word: str) -> str:
    """Returns the regular plural: plane -> planes, bus -> buses, factory -> factories, bridge -> bridges."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}es" if word.endswith(("s", "x", "ch", "sh")) else f"{word}s"


class TagTargets:
    """Multi-hot targets of images, from all their captions. Each image's captions are read once.

    Args:
        source: the samples of the stream
        caption_field: where the captions are
    """

    def __init__(self, source: SampleSource, caption_field: str) -> None:
        self.source, self.caption_field = source, caption_field
        self.columns: dict[int, list[int] | None] = {}

    def __call__(self, image_ids: Tensor) -> Tensor:
        """Sample indices (B,) -> float (B, K) of 0 and 1; a row of -1 for an image without captions."""
        targets = torch.zeros(len(image_ids), len(TAGS))
        for row, image in enumerate(image_ids.tolist()):
            if image not in self.columns:
                self.columns[image] = self.read(image)
            columns = self.columns[image]
            if columns is None:
                targets[row] = -1
            else:
                targets[row, columns] = 1
        return targets

    def read(self, image: int) -> list[int] | None:
        """Returns the numbers of the tags that the captions of an image name, None if it has no captions."""
        try:
            named = tags_of(self.source.captions(image, self.caption_field))
        except BadSample:
            return None
        return [number for number, tag in enumerate(TAGS) if tag in named]

    def require_captions(self, what: str) -> None:
        """Raises ValueError that names the shards if none of the first 100 images has a caption."""
        if all(self.read(image) is None for image in range(min(100, len(self.source)))):
            raise ValueError(
                f"{what}: no image has a text in '{self.caption_field}', and --targets tags finds objects in captions: "
                "use --targets scenes, or shards with captions"
            )
