"""The options of `python -m retrieval`: one dataclass for each sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from priorclip.retrieval.test_set_options import (
    Device,
    GalleryConfig,
    Precision,
    TestSetConfig,
    listed,
    refuse_unknown,
)

TASKS = ("retrieval", "zeroshot", "probe")
Benchmark = Literal["rsicd", "rsitmd", "ucm"]


@dataclass(kw_only=True)
class EvaluateConfig(GalleryConfig):
    """Measure recall at 1, 5 and 10 in both directions, and optionally the scene classification of labelled images.

    Args:
        output: report to write, JSON; null only prints the tables
        caption_field: list in KEY.json that holds the captions: captions or coarse_captions
        features: folder that keeps the features, so that many evaluations encode them once; null keeps none
        tasks: tasks separated by commas: retrieval; zeroshot, classification by prompts; probe, a logistic regression
            on the frozen features
        bootstrap: resamples for the 95 % intervals, over images with their captions; 0 for none
        seed: of the resamples, and of the parts into which the probe splits the images
        benchmark: also print published results: rsicd, rsitmd or ucm
        confusions: picture (PNG) of the hardest confusions of the first task; null draws none
        templates: prompts of zeroshot: clip, remoteclip, scenes, or a text file with one template per line and {} for
            the class
        class_names: JSON file {label: name} with other words for classes
        probe_data: labelled images that train the probe, in the forms of --data; null splits the images of --data
        probe_images: folder of the images of probe_data, if that is a Karpathy JSON
        probe_split: split of probe_data
        train_share: share of each class that trains the probe, if probe_data is null
    """

    output: str | None = None
    caption_field: str = "captions"
    features: str | None = None
    tasks: str = "retrieval"
    bootstrap: int = 1000
    seed: int = 0
    benchmark: Benchmark | None = None
    confusions: str | None = None
    templates: str = "clip"
    class_names: str | None = None
    probe_data: str | None = None
    probe_images: str | None = None
    probe_split: str | None = None
    train_share: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown("--tasks", self.tasks, "task", TASKS)
        if not self.chosen:
            raise ValueError(f"--tasks is empty: name one or more of {', '.join(TASKS)}")
        if self.bootstrap < 0:
            raise ValueError(f"--bootstrap must be at least 0, not {self.bootstrap}")
        if not 0 < self.train_share < 1:
            raise ValueError(f"--train_share must be between 0 and 1, not {self.train_share}")

    @property
    def chosen(self) -> list[str]:
        return listed(self.tasks)


CORRUPTIONS = ("blur", "noise", "jpeg", "rotation", "cloud", "haze", "season")


@dataclass(kw_only=True)
class RobustnessConfig(TestSetConfig):
    """Measure the recall of models on corrupted images and swapped captions, at several severities.

    Args:
        models: NAME=EXPORT of each model, separated by blanks; models of one name are one line with mean and spread
        output: folder for robustness.json, robustness.md, robustness.png and cells.jsonl; the command resumes from it
        caption_field: list in KEY.json that holds the captions: captions or coarse_captions
        corruptions: some of blur, noise, jpeg, rotation, cloud, haze, season and captions, separated by commas
        severities: of the image corruptions, 1 to 5
        caption_shares: shares of the test set's captions to swap
        seed: of the corruptions
        bootstrap: resamples for the 95 % intervals, over images with their captions; 0 for none
        remember: folder that caches encoder outputs, for models that share an encoder, such as the seeds of a sweep;
            null caches nothing
    """

    models: list[str]
    output: str
    caption_field: str = "captions"
    corruptions: str = ",".join((*CORRUPTIONS, "captions"))
    severities: list[int] = field(default_factory=lambda: [1, 2, 3, 4, 5])
    caption_shares: list[float] = field(default_factory=lambda: [0.1, 0.2, 0.4])
    seed: int = 0
    bootstrap: int = 200
    remember: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown("--corruptions", self.corruptions, "corruption", (*CORRUPTIONS, "captions"))
        for severity in self.severities:
            if severity not in range(1, 6):
                raise ValueError(f"--severities must be 1 to 5, not {severity}")
        for share in self.caption_shares:
            if not 0 <= share <= 1:
                raise ValueError(f"--caption_shares must be between 0 and 1, not {share}")
        if not self.models:
            raise ValueError("--models is empty: name one or more models as NAME=EXPORT")

    @property
    def chosen(self) -> list[str]:
        return listed(self.corruptions)


PICTURES = ("tsne", "panel", "belief", "scenes")


@dataclass(kw_only=True)
class PicturesConfig(GalleryConfig):
    """Draw what a model does with a test set: t-SNE, best answers, belief maps, and recall by scene.

    Args:
        output: folder to write: tsne.png, panel.png, belief.png, scenes.png, and pictures.json with their figures
        other: export folder of a second model, beside the first in tsne.png and scenes.png
        only: some of tsne, panel, belief and scenes, separated by commas; null draws all that the model and data allow
        caption_field: list in KEY.json that holds the captions: captions or coarse_captions
        features: folder that keeps the features, shared with `evaluate`; null keeps none
        seed: of the drawn samples and of t-SNE; the same command draws the same pictures
        sample: most images in tsne.png, each with one of its captions, drawn with the seed
        count: images in panel.png and belief.png, drawn with the seed
        queries: keys of the images in panel.png and belief.png, separated by blanks; empty draws ``count`` images
        k: tokens that hard belief keeps in belief.png; null takes the model's own k, or half of the tokens
    """

    output: str
    other: str | None = None
    only: str | None = None
    caption_field: str = "captions"
    features: str | None = None
    seed: int = 0
    sample: int = 500
    count: int = 6
    queries: list[str] = field(default_factory=list)
    k: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_unknown("--only", self.only or "", "picture", PICTURES)
        if not self.chosen:
            raise ValueError(f"--only is empty: name one or more of {', '.join(PICTURES)}")
        for name, value, least, most in (
            ("seed", self.seed, 0, 2**32 - 1),
            ("sample", self.sample, 3, 20_000),
            ("count", self.count, 1, 100),
            ("queries", len(self.queries), 0, 100),
            ("k", 1 if self.k is None else self.k, 1, 2**31),
        ):
            if not least <= value <= most:
                raise ValueError(f"--{name} must be between {least} and {most}, not {value}")

    @property
    def chosen(self) -> list[str]:
        return list(PICTURES) if self.only is None else listed(self.only)


INTERVENTIONS = ("mask", "complement", "noise")


@dataclass(kw_only=True)
class BeliefTruthConfig(GalleryConfig):
    """Measure whether a model's belief lies on what the captions name, and what the true place would be worth.

    The data are drawn scenes with masks: `data_shards pack --source synthetic --masks true`.

    Args:
        output: folder for belief-truth.json, belief-truth.md and belief-truth.png
        caption_field: list in KEY.json that holds the captions: captions or coarse_captions
        replace: what takes the place of the belief when recall is measured again: some of mask, complement and noise,
            separated by commas; "none" leaves recall out
        bootstrap: resamples for the 95 % intervals, over images with their captions; 0 for none
        seed: of the resamples, of the noise and of the drawn images
        count: images in belief-truth.png
    """

    output: str
    caption_field: str = "captions"
    replace: str = ",".join(INTERVENTIONS)
    bootstrap: int = 1000
    seed: int = 0
    count: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replace != "none":
            refuse_unknown("--replace", self.replace, "belief", INTERVENTIONS)
        for name, value, least, most in (
            ("bootstrap", self.bootstrap, 0, 1_000_000),
            ("seed", self.seed, 0, 2**32 - 1),
            ("count", self.count, 1, 100),
        ):
            if not least <= value <= most:
                raise ValueError(f"--{name} must be between {least} and {most}, not {value}")

    @property
    def chosen(self) -> list[str]:
        return [] if self.replace == "none" else listed(self.replace)


@dataclass(kw_only=True)
class IndexConfig(GalleryConfig):
    """Encode images into an index that `search` and `serve` read. It needs no captions.

    The command goes on where a killed one has stopped.

    Args:
        output: folder to write
        dtype: number format of the stored embeddings
        overwrite: replace an existing index
        keep_every: a process keeps its work on the disk whenever it has encoded this many images more
        approximate: an approximate part, with which a search compares some of the images only; auto makes one from
            ``approximate_from`` images on, if faiss is installed
        approximate_from: number of images, see ``approximate``
        recall: share of the ten best images that approximate searches shall find
    """

    output: str
    dtype: Literal["float16", "float32"] = "float16"
    overwrite: bool = False
    keep_every: int = 4096
    approximate: Literal["auto", "always", "never"] = "auto"
    approximate_from: int = 1_000_000
    recall: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        check_recall(self.recall)
        if self.approximate_from < 1:
            raise ValueError(f"--approximate_from must be at least 1, not {self.approximate_from}")
        if self.keep_every < 1:
            raise ValueError(f"--keep_every must be at least 1, not {self.keep_every}")


def check_recall(recall: float) -> None:
    if not 0 < recall <= 1:
        raise ValueError(f"--recall must be above 0 and at most 1, not {recall}")


@dataclass(kw_only=True)
class ApproximateConfig:
    """Make the approximate part of an index anew, from its embeddings, or remove it. No image is encoded.

    Args:
        index: folder that `index` wrote
        recall: share of the ten best images that approximate searches shall find
        queries: file with a text in each line: the recall is measured with them; null takes the texts that the index
            keeps for that, or images of the index with noise
        remove: remove the approximate part, so that all searches are exact
        model: export folder that encodes ``queries``; null takes the one that the index names
        device: auto uses the GPU if there is one
        precision: number format of the activations
    """

    index: str
    recall: float = 0.95
    queries: str | None = None
    remove: bool = False
    model: str | None = None
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        check_recall(self.recall)
        if self.remove and self.queries is not None:
            raise ValueError("--remove makes no approximate part that --queries could measure: give one of them")


@dataclass(kw_only=True)
class AddConfig(TestSetConfig):
    """Encode images and add them to an index. Images that it has already are not encoded again.

    Args:
        index: folder that `index` wrote
        model: export folder; null takes the one that the index names; it has to be the one that made the index
    """

    index: str
    model: str | None = None


@dataclass(kw_only=True)
class RemoveConfig:
    """Remove images from an index: those that meet all the conditions. Their files stay.

    Args:
        index: folder that `index` wrote
        image_keys: keys of images, separated by blanks; * and ? stand for any characters
        shards: images that came from these shards, by path or file name, separated by blanks; * and ? stand for any
            characters
        bbox: images that touch WEST,SOUTH,EAST,NORTH in degrees; west above east goes across the dateline
        time: images acquired in 2024, 2024-06, 2024-06-30, or FROM/TO of these (UTC)
        scene: images of this scene; * and ? stand for any characters
    """

    index: str
    image_keys: list[str] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    bbox: str | None = None
    time: str | None = None
    scene: str | None = None

    def __post_init__(self) -> None:
        if not (self.image_keys or self.shards) and (self.bbox, self.time, self.scene) == (None, None, None):
            raise ValueError("say which images: by --image_keys, --shards, --bbox, --time or --scene")


@dataclass
class SearchConfig:
    """Rank the images of an index by their similarity to a text or an image.

    Args:
        index: folder that `index` wrote
        text: text to search for
        image: image file; search finds similar images
        queries: file with a text to search for in each line, which all are searched for; results have the text
        k: number of results
        format: table to read, or json, geojson, geoparquet or csv for other programs; geojson and geoparquet have the
            places of tiles, and of images whose pack kept lat and lon, or a box
        json: the same as --format json
        output: file to write; null prints the result
        bbox: only images that touch WEST,SOUTH,EAST,NORTH in degrees; west above east goes across the dateline
        time: only images acquired in 2024, 2024-06, 2024-06-30, or FROM/TO of these (UTC)
        scene: only images of this scene; * and ? stand for any characters
        exact: compare all images, also if the index has an approximate part
        model: export folder; null takes the one that the index names
        data: further folders, files and shards that hold images of the index, separated by blanks; those in the working
            directory and in the folder that holds the index need no option
        device: auto uses the GPU if there is one
        precision: number format of the activations
    """

    index: str
    text: str | None = None
    image: str | None = None
    queries: str | None = None
    k: int = 10
    format: Literal["table", "json", "geojson", "geoparquet", "csv"] = "table"
    json: bool = False
    output: str | None = None
    bbox: str | None = None
    time: str | None = None
    scene: str | None = None
    exact: bool = False
    model: str | None = None
    data: list[str] = field(default_factory=list)
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.text, self.image, self.queries)) != 1:
            raise ValueError('give either --text "...", --image FILE or --queries FILE')
        if self.json and self.format not in ("table", "json"):
            raise ValueError(f"--json and --format {self.format} name two formats: give one of them")
        self.format = "json" if self.json else self.format
        if self.format == "geoparquet" and self.output is None:
            raise ValueError("--format geoparquet is no text: name its file with --output")
        if self.k < 1:
            raise ValueError(f"--k must be at least 1, not {self.k}")


@dataclass
class ServeConfig:
    """Serve a search page for an index. The page is read-only and loads nothing from other hosts.

    Args:
        index: folder that `index` wrote
        host: address to listen on; 0.0.0.0 accepts other machines
        port: port to listen on; 0 takes a free one
        names: further host names under which browsers reach the page, as behind a proxy; others are refused
        scenes: folder of the scenes that tiles were cut from, as `pack --images` had it; the map shows their pixels
        value_range: black and white of the scenes on the map, as of `pack`: LOW,HIGH or a sensor; null: percentiles
        bands: bands of the scenes on the map, as of `pack`: such as red,green,blue; null takes the file's own
        exact: compare all images in every search, also if the index has an approximate part
        model: export folder; null takes the one that the index names
        data: further folders, files and shards that hold images of the index, separated by blanks; those in the working
            directory and in the folder that holds the index need no option
        device: auto uses the GPU if there is one
        precision: number format of the activations
    """

    index: str
    host: str = "127.0.0.1"
    port: int = 8008
    names: list[str] = field(default_factory=list)
    scenes: str | None = None
    value_range: str | None = None
    bands: str | None = None
    exact: bool = False
    model: str | None = None
    data: list[str] = field(default_factory=list)
    device: Device = "auto"
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be between 0 and 65535, not {self.port}")


@dataclass(kw_only=True)
class CurateConfig:
    """Drop bad pairs of shards by rules, report each drop with examples, and pack the rest into new shards.

    Args:
        shards: folder, tar or pattern of tars whose `captions` are curated
        output: folder for shards/, report.md, report.json, dropped.jsonl and scores/; the command resumes from it
        model: export folder of the model that scores the pairs; null scores nothing
        min_similarity: drop pairs whose cosine of image and caption is smaller
        drop_share: drop this share of the pairs, the least similar ones
        languages: keep captions in these languages, by their codes, such as en de; empty keeps all
        certainty: a caption counts as one of another language from this probability on
        min_words: drop captions with fewer words
        max_words: drop captions with more words
        words: drop captions that contain one of these words or phrases: a text file with one a line, or a list with
            commas; case is ignored
        near_duplicates: drop images of which at most this many of 64 bits of their perceptual hash differ from an
            earlier one, 0 to 16; null compares none
        semantic_duplicates: drop images whose embedding has at least this cosine with that of an earlier one
        examples: examples in the report at each threshold
        write: false writes the report only
        shard_size: samples per shard of the output
        batch_size: images, or captions, in a batch
        device: auto uses the GPU if there is one
        precision: number format of the activations
        workers: processes that decode images for the model; 0 decodes in the main process
        processes: processes that read captions, hash and pack; null takes one per core
        max_pixels: images with more pixels are refused before they are decoded
        array: in a SLURM array task, score and pack this task's share into one folder for all tasks
        overwrite: replace the shards of an earlier curation
    """

    shards: str
    output: str
    model: str | None = None
    min_similarity: float | None = None
    drop_share: float = 0.0
    languages: list[str] = field(default_factory=list)
    certainty: float = 0.5
    min_words: int | None = None
    max_words: int | None = None
    words: str | None = None
    near_duplicates: int | None = None
    semantic_duplicates: float | None = None
    examples: int = 5
    write: bool = True
    shard_size: int = 1000
    batch_size: int = 64
    device: Device = "auto"
    precision: Precision = "fp32"
    workers: int = 0
    processes: int | None = None
    max_pixels: int = 100_000_000
    array: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("min_words", "max_words", "shard_size", "batch_size", "processes", "max_pixels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, not {value}")
        for name, low, high in (
            ("min_similarity", -1, 1),
            ("drop_share", 0, 0.99),
            ("certainty", 0, 1),
            ("semantic_duplicates", 0.5, 1),
            ("examples", 0, 100),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name} must be between {low} and {high}, not {value}")
        if self.min_words and self.max_words and self.min_words > self.max_words:
            raise ValueError(f"--min_words {self.min_words} is above --max_words {self.max_words}: no caption fits")
        if self.workers < 0:
            raise ValueError(f"--workers must be at least 0, not {self.workers}")
        needs = {"min_similarity": self.min_similarity, "drop_share": self.drop_share or None}
        needs["semantic_duplicates"] = self.semantic_duplicates
        for name, value in needs.items():
            if value is not None and self.model is None:
                raise ValueError(f"--{name} {value} needs --model, the export folder of the model that scores pairs")


COMMANDS = {
    "evaluate": EvaluateConfig,
    "robustness": RobustnessConfig,
    "pictures": PicturesConfig,
    "belief-truth": BeliefTruthConfig,
    "curate": CurateConfig,
    "index": IndexConfig,
    "approximate": ApproximateConfig,
    "add": AddConfig,
    "remove": RemoveConfig,
    "search": SearchConfig,
    "serve": ServeConfig,
}
