"""The options of `python -m data_shards`: one dataclass a sub-command, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from priorclip.data_shards.corpus import Shards


@dataclass
class PackConfig:
    """Pack images with captions or scene labels into shards.

    Args:
        source: synthetic, csv, rs5m, karpathy, precomp, webdataset, parquet, imagefolder, millionaid, fmow, bigearthnet
        output: folder to write; new, or half packed with the same options
        images: folder of the images (all sources but synthetic and webdataset). Where --json, --csv, --precomp or
            --parquet name several files, with commas between them or as a YAML list, give one folder for each or one
            for all; keys then begin with the name of the data set
        csv: table with a column for the file name, and for caption and/or label, split (source csv); a metadata CSV of
            RS5M's image-only release: img_name or file_name, caption or text, url, country, month, meta_caption (rs5m)
        json: Karpathy JSON: RSICD, RSITMD, UCM, Sydney (source karpathy)
        precomp: folder of SPLIT_caps.txt and SPLIT_filename.txt (source precomp)
        shards: folder, pattern or URL of tars: RS5M's published shards, img2dataset's output (source webdataset)
        parquet: file, folder or pattern of Parquet files with the images or their paths (source parquet);
            metadata.parquet of BigEarthNet v2, if it is not in --images (source bigearthnet)
        labels: CSV of file names and scenes, or "none"; null, and nothing between two commas, takes them from the
            annotation or the file name's stem (sources karpathy, precomp)
        caption_field: columns that hold captions, comma-separated or a list; all that are not blank are taken. null
            takes the first there is of caption, captions, raw, text, title, sentence (sources csv, rs5m, parquet;
            webdataset: lists in KEY.json)
        image_field: column of the images; null finds it (source parquet)
        label_field: column of the scene; null finds it (source parquet)
        fmow_kind: rgb, msrgb or both (source fmow)
        crop_margin: cut out each bounding box and this share of its longer side around it; null keeps the whole picture
            (source fmow)
        reflectance_max: reflectance that becomes white; 4095 keeps 12 bits (source bigearthnet)
        split: keep the records of this split; null keeps all
        count: scenes to draw (source synthetic)
        size: side of a drawn scene in pixels (source synthetic)
        captions: fine, coarse, or both: fine in `captions`, coarse in `coarse_captions` (source synthetic)
        first_index: index of the first scene: other ranges of one seed do not overlap (source synthetic)
        seed: of drawing, shuffling and template captions
        caption_from: template captions images that have only a label; none leaves them without; relabel captions all
            labelled images from templates, also those that have captions
        captions_per_image: template captions an image
        classes: keep the records of these scene classes, multi-label ones if any fits; null keeps all
        max_side: shrink images whose longer side exceeds this many pixels
        quality: re-encode every image as JPEG of this quality; null keeps the bytes of jpg, png and webp
        max_pixels: leave out larger images
        shard_size: samples a shard
        prefix: shards are named PREFIX-000000.tar; null takes the split or "shard"
        shuffle: pack in random order, so that each shard mixes the classes; Parquet's row groups stay together
        limit: pack at most this many records, taken after the shuffle
        duplicates: of records with the same image, keep all, drop all but the first, or merge their captions into the
            first; duplicates.jsonl names them
        near_duplicates: images are the same also where at most this many of 64 bits of their perceptual hashes differ
            (0 to 16; 6 finds re-encoded and resized copies, 10 slightly cropped ones); null compares bytes only
        exclude: evaluation sets whose images are left out, exact or near and turned or mirrored too, and named in
            excluded.jsonl: Karpathy JSON or CSV files, folders of images, packed shards; comma-separated
        exclude_images: image folder of the JSON and CSV files of --exclude: one for all or one each, comma-separated
        exclude_split: splits that are taken of these files where they have splits, comma-separated; all takes all
        exclude_distance: bits of 64 up to which an image is one of the evaluation; null compares bytes only
        workers: processes; null takes one a core; under mpirun the ranks take their place
        array: in a SLURM array task, or a step of several tasks without MPI, pack this task's share of the shards into
            the folder that all tasks have in common; false packs everything, into a folder of this task's own
        overwrite: remove what an earlier pack wrote to the folder
    """

    source: str
    output: str
    images: str | list[str] | None = None
    csv: str | list[str] | None = None
    json: str | list[str] | None = None
    precomp: str | list[str] | None = None
    shards: str | list[str] | None = None
    parquet: str | list[str] | None = None
    labels: str | list[str] | None = None
    caption_field: str | list[str] | None = None
    image_field: str | None = None
    label_field: str | None = None
    fmow_kind: str = "rgb"
    crop_margin: float | None = None
    reflectance_max: int = 2000
    split: str | None = None
    count: int = 1000
    size: int = 128
    captions: str = "both"
    first_index: int = 0
    seed: int = 0
    caption_from: str = "template"
    captions_per_image: int = 1
    classes: list[str] | None = None
    max_side: int | None = None
    quality: int | None = None
    max_pixels: int = 100_000_000
    shard_size: int = 1000
    prefix: str | None = None
    shuffle: bool = True
    limit: int | None = None
    duplicates: str = "keep"
    near_duplicates: int | None = None
    exclude: str | None = None
    exclude_images: str | None = None
    exclude_split: str = "test"
    exclude_distance: int | None = 8
    workers: int | None = None
    array: bool = True
    overwrite: bool = False


@dataclass
class LeakageConfig:
    """Look for evaluation images in packed shards; exit 1 and name them where there are any. Nothing is changed.

    Args:
        shards: folder or pattern
        exclude: the evaluation sets, as those of `pack`: Karpathy JSON or CSV files, folders of images, packed shards;
            comma-separated
        exclude_images: image folder of the JSON and CSV files: one for all or one each, comma-separated
        exclude_split: splits that are taken of these files where they have splits, comma-separated; all takes all
        exclude_distance: bits of 64 of the perceptual hashes up to which two images are the same, turned or mirrored
            or not; null compares bytes only
        output: JSON-lines file for what was found; null prints it
        max_pixels: larger images are compared by nothing, and counted
        workers: processes; null takes one a core
    """

    shards: str | list[str]
    exclude: str
    exclude_images: str | None = None
    exclude_split: str = "test"
    exclude_distance: int | None = 8
    output: str | None = None
    max_pixels: int = 100_000_000
    workers: int | None = None


@dataclass
class IndexConfig:
    """Write manifest.json and .idx files beside existing tars.

    Args:
        shards: folder, tar or pattern of local tars
        workers: processes; null takes one a core
        overwrite: replace a manifest that is there
    """

    shards: str | list[str]
    workers: int | None = None
    overwrite: bool = False


@dataclass
class VerifyConfig:
    """Re-check every hash, offset and count of packed shards; exit 1 and name each bad shard and member.

    Args:
        shards: folder that holds a manifest; with --sizes any shards, remote ones too
        workers: processes; null takes one a core
        sizes: only see that each is there, has its manifest's size and can be read at both ends
        json: print JSON, with --sizes
    """

    shards: str
    workers: int | None = None
    sizes: bool = False
    json: bool = False


@dataclass
class StatsConfig:
    """Print counts, caption lengths, words, class balance, image sizes and duplicates; draw plots and a contact sheet.

    Args:
        shards: folder, pattern, or a mix of them, of which each sample counts once
        output: folder for stats.txt, stats.json, stats.png and contact_sheet.png; null takes the working folder
        caption_field: captions or coarse_captions
        tokenizer: name or folder of a tokenizer, to count the tokens of captions too
        limit: count this many samples, drawn at random; null counts all
        workers: processes; null takes one a core
        images: images on the contact sheet
        seed: draws the samples of --limit and of the contact sheet
    """

    shards: Shards
    output: str | None = None
    caption_field: str = "captions"
    tokenizer: str | None = None
    limit: int | None = None
    workers: int | None = None
    images: int = 24
    seed: int = 0


@dataclass
class TokenizerConfig:
    """Train a tokenizer on the captions of shards.

    Args:
        shards: folder, pattern, or a mix of them, of which each sample counts once
        output: folder to write, which transformers' AutoTokenizer reads
        vocab_size: entries, among them 256 bytes and 4 special tokens
        context_length: tokens a caption is padded or cut to
        caption_field: one or several of captions and coarse_captions, comma-separated
    """

    shards: Shards
    output: str
    vocab_size: int = 8000
    context_length: int = 77
    caption_field: str = "captions"


@dataclass
class BenchConfig:
    """Measure images a second a core through the whole pipeline, against open_clip's on the same tars.

    Args:
        output: JSON file to write
        images: folder of photographs that the test JPEGs are made of; null draws scenes
        sizes: sides of the test JPEGs in pixels
        quality: JPEG quality, 1 to 100; null is that of the photographs, and 90 where there is none
        scales: smallest shares of the area that a random crop keeps: 0.9 is open_clip's default, 0.5 ours
        count: JPEGs a size
        image_size: side of the result in pixels
        batch: images a batch
        rounds: measurements of each, of which the median counts
        workers: also measure 1 against 2 decoding workers
    """

    output: str = "bench.json"
    images: str | None = None
    sizes: list[int] = field(default_factory=lambda: [256, 768])
    quality: int | None = None
    scales: list[float] = field(default_factory=lambda: [0.9, 0.5])
    count: int = 512
    image_size: int = 224
    batch: int = 64
    rounds: int = 5
    workers: bool = True

    def __post_init__(self) -> None:
        for name in ("count", "image_size", "batch", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.count < self.batch:
            raise ValueError(f"--count {self.count} does not fill one batch of {self.batch}")
        if not self.sizes or min(self.sizes) < 16:
            raise ValueError(f"--sizes: sides in pixels, 16 or more, not {self.sizes}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"--scales: shares of the area, 0 < scale <= 1, not {self.scales}")
