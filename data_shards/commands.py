"""The options of `python -m data_shards`: one dataclass per command. It imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from priorclip.data_shards.corpus import Shards


@dataclass
class PackConfig:
    """Packs images with captions or scene labels into shards.

    Args:
        source: synthetic, csv, rs5m, skyscript, karpathy, precomp, webdataset, parquet, imagefolder, millionaid, fmow,
            bigearthnet, raster
        output: folder to write; new, or left unfinished by the same command
        images: folder of the images (all sources except synthetic and webdataset); for raster also URLs of cloud
            optimized GeoTIFFs, comma-separated or a list. File names in annotations are
            files under this folder. If --json, --csv, --precomp or --parquet name several files, comma-separated or as
            a YAML list, give one folder for each or one for all; keys then begin with the name of the data set
        csv: table with columns for the file name, caption or label, and split (source csv); or the metadata CSV of
            RS5M's image-only release: img_name or file_name, caption or text, url, country, month, meta_caption (rs5m);
            or a CSV of SkyScript: filepath, title, title_multi_objects (skyscript; --images is the folder of images2
            to images7, and of meta2 to meta7, which give box, time and tags);
            or texts of windows: scene, x, y, width, height, label or caption (raster)
        json: Karpathy JSON: RSICD, RSITMD, UCM, Sydney (source karpathy)
        precomp: folder of SPLIT_caps.txt and SPLIT_filename.txt (source precomp)
        shards: folder, pattern or URL of tars: RS5M's published shards, img2dataset's output (source webdataset)
        parquet: file, folder or pattern of Parquet files with the images or their paths (source parquet);
            metadata.parquet of BigEarthNet v2, if it is not in --images (source bigearthnet)
        labels: CSV of file names and scenes, or "none". null, or an empty piece between commas, takes the label of the
            annotation or the stem of the file name (sources karpathy, precomp)
        caption_field: columns with captions, comma-separated or a list; all captions that are not blank count. null
            takes the first existing one of caption, captions, raw, text, title, sentence (sources csv, rs5m, parquet;
            skyscript takes title and title_multi_objects; webdataset: lists in KEY.json; raster: fields of --vector)
        image_field: column of the images; null searches it (source parquet)
        label_field: column of the scene, or field of --vector; null searches it (sources parquet, raster)
        keep_columns: columns that KEY.json keeps, comma-separated or a list; NAME=COLUMN keeps one under another name.
            lat and lon, or box (west, south, east, north), become the place of the image, time becomes when it was
            acquired, and gsd its metres a pixel, so that a search can be limited to a place and a time. An image with
            a bad value is left out (sources csv, rs5m, skyscript, parquet; webdataset: fields of KEY.json)
        fmow_kind: rgb, msrgb or both (source fmow)
        crop_margin: crop each bounding box with this share of its longer side around it; null keeps the whole picture
            (source fmow)
        reflectance_max: reflectance that becomes white; 4095 keeps 12 bits (source bigearthnet)
        split: keep the records of this split; null keeps all
        count: number of scenes to draw (source synthetic)
        size: side of a drawn scene in pixels (source synthetic)
        captions: fine, coarse, or both: fine in `captions`, coarse in `coarse_captions` (source synthetic)
        first_index: index of the first scene, so that sets with the same seed need not overlap (source synthetic)
        masks: also write KEY.mask.png, the pixels of what the captions name first, and KEY.boxes.json, a box around
            each piece of it (source synthetic)
        artificial_plants: share of the drawn scenes whose plants are artificial. They have the colours of living ones
            and are dark in near infrared, and the captions say which they are; 0: all live, and no caption says it
            (source synthetic)
        seed: seed of drawing, shuffling and template captions
        caption_from: template makes captions for images that have only a label; none leaves them without captions;
            relabel makes captions for all labelled images, also for those with captions
        captions_per_image: template captions per image
        classes: keep the records of these scene classes, a multi-label record if one label matches; null keeps all
        max_side: shrink images whose longer side exceeds this many pixels
        quality: re-encode each image as JPEG of this quality; null keeps the bytes of jpg, png and webp
        max_pixels: leave out larger images
        value_range: measured values (16 bits, floats) that become black and white: "0,3000", or "0,3000;0,2500;0,2000"
            for each band, or a sensor: sentinel2-l2a, landsat-c2-l2, naip, planetscope; null takes --percentiles.
            Data of 8 bits stays as it is
        percentiles: percentiles of an image's valid pixels that become black and white, for each band
        bands: bands that become red, green and blue, by name or number: "red,green,blue", "4,3,2", or a combination:
            natural-colour, false-colour, agriculture, urban, shortwave-infrared; null takes the file's colours, or the
            first three bands. With --image-format tiff any number of bands, which keep their names and values; null
            takes all
        image_format: jpeg, or tiff, which keeps the measured values of all --bands, for models of several bands
            (sources raster, synthetic)
        fill: grey level of pixels without data, 0 to 255
        min_valid: leave out a raster image with a smaller share of valid pixels; null takes 0.5 for tiles of scenes,
            and leaves out other images only if they have no valid pixel
        vector: GeoJSON, GeoPackage or Shapefile with polygons or points that have a class or a text, which become
            those of the tiles that they cover; --label-field and --caption-field name the fields (source raster)
        layer: layer of --vector, if it has several (source raster)
        min_share: share of a tile that a polygon must cover, or share of the polygon that must lie in the tile, so that
            its class or text is the tile's (source raster)
        keep_unlabelled: with --vector or --csv, also pack tiles without class and text, for an index; without these
            two all tiles are packed (source raster)
        max_bad_share: give up if a larger share of the scenes cannot be read (source raster)
        tile: side in pixels of the tiles that scenes are cut into (source raster)
        stride: pixels from a tile to the next; null takes --tile (source raster)
        shard_size: samples per shard
        prefix: shards are named PREFIX-000000.tar; null takes the split or "shard"
        shuffle: pack in random order, so that each shard mixes the classes; Parquet's row groups stay together
        limit: pack at most this many records of the shuffled order
        scenes: keep this number of scenes, drawn by --seed; with --limit each has the same number of images
        zipf: give the scenes sizes that fall with their rank to the power of this exponent, --limit images in all; 0
            gives all the same size
        captions_kept: keep at most this many captions of each image, drawn by --seed
        duplicates: for records with the same image: keep all, drop all except the first, or merge their captions into
            the first; duplicates.jsonl lists them
        near_duplicates: images are duplicates too if at most this many of 64 bits of their perceptual hashes differ
            (0 to 16; 6 finds re-encoded and resized copies, 10 slightly cropped ones); null compares bytes only
        exclude: evaluation sets whose images to leave out, also near, turned or mirrored copies: Karpathy JSON or CSV
            files, folders of images, packed shards; comma-separated or a list. excluded.jsonl lists the images
        exclude_images: image folder of the JSON and CSV files of --exclude: one for all or one each, as a list too
        exclude_split: splits to take from these files if they have splits, comma-separated; all takes all
        exclude_distance: largest number of different hash bits (of 64) of an evaluation image; null compares bytes only
        workers: number of processes; null takes one per core; mpirun's ranks replace them
        array: in a SLURM array task, or a step of several tasks without MPI, pack this task's share of the shards into
            one folder for all tasks; false packs all shards into a folder of this task
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
    keep_columns: str | list[str] | None = None
    fmow_kind: str = "rgb"
    crop_margin: float | None = None
    reflectance_max: int = 2000
    split: str | None = None
    count: int = 1000
    size: int = 128
    captions: str = "both"
    first_index: int = 0
    masks: bool = False
    artificial_plants: float = 0.0
    seed: int = 0
    caption_from: str = "template"
    captions_per_image: int = 1
    classes: list[str] | None = None
    max_side: int | None = None
    quality: int | None = None
    max_pixels: int = 100_000_000
    value_range: str | None = None
    percentiles: str = "2,98"
    bands: str | None = None
    image_format: str = "jpeg"
    fill: int = 0
    min_valid: float | None = None
    vector: str | None = None
    layer: str | None = None
    min_share: float = 0.5
    keep_unlabelled: bool = False
    max_bad_share: float = 0.5
    tile: int = 256
    stride: int | None = None
    shard_size: int = 1000
    prefix: str | None = None
    shuffle: bool = True
    limit: int | None = None
    scenes: int | None = None
    zipf: float | None = None
    captions_kept: int | None = None
    duplicates: str = "keep"
    near_duplicates: int | None = None
    exclude: str | list[str] | None = None
    exclude_images: str | list[str] | None = None
    exclude_split: str | list[str] = "test"
    exclude_distance: int | None = 8
    workers: int | None = None
    array: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.zipf is not None and not 0 <= self.zipf <= 10:
            raise ValueError(f"--zipf must be between 0 and 10, not {self.zipf}")


@dataclass
class SyntheticConfig:
    """Draws large scenes as GeoTIFFs with coordinates, and a GeoJSON of what is where. It needs rasterio.

    Args:
        output: folder to write: scene-000.tif, ... and places.geojson
        count: number of scenes
        size: side of a scene in pixels, a multiple of cell
        cell: side in pixels of the drawn scenes that a large one is made of
        bands: rgb, or rgbn with near infrared, in which plants are bright and water is dark
        type: uint8, or uint16 with reflectance x 10,000
        crs: projected coordinates in metres; scenes stand side by side from left and top
        left: x of the upper left corner of the first scene
        top: y of the upper edge of all scenes
        gsd: metres a pixel
        seed: seed of drawing
        first_index: index of the first drawn scene, so that sets with the same seed need not overlap
    """

    output: str
    count: int = 3
    size: int = 4000
    cell: int = 250
    bands: Literal["rgb", "rgbn"] = "rgbn"
    type: Literal["uint8", "uint16"] = "uint16"
    crs: str = "EPSG:32632"
    left: float = 500_000
    top: float = 5_400_000
    gsd: float = 1.0
    seed: int = 0
    first_index: int = 0


@dataclass
class LeakageConfig:
    """Searches packed shards for evaluation images and lists them; exit code 1 if there are any. It changes nothing.

    Args:
        shards: folder or pattern
        exclude: evaluation sets, as in `pack`: Karpathy JSON or CSV files, folders of images, packed shards;
            comma-separated or a list
        exclude_images: image folder of the JSON and CSV files: one for all or one each, as a list too
        exclude_split: splits to take from these files if they have splits, comma-separated; all takes all
        exclude_distance: largest number of different bits (of 64) of the perceptual hashes of two equal images, which
            may be turned or mirrored; null compares bytes only
        output: JSON-lines file for the result; null prints it
        max_pixels: larger images are counted and not compared
        workers: number of processes; null takes one per core
    """

    shards: str | list[str]
    exclude: str | list[str]
    exclude_images: str | list[str] | None = None
    exclude_split: str | list[str] = "test"
    exclude_distance: int | None = 8
    output: str | None = None
    max_pixels: int = 100_000_000
    workers: int | None = None


@dataclass
class IndexConfig:
    """Writes manifest.json and .idx files beside existing tars.

    Args:
        shards: folder, tar or pattern of local tars
        workers: number of processes; null takes one per core
        overwrite: replace an existing manifest
    """

    shards: str | list[str]
    workers: int | None = None
    overwrite: bool = False


@dataclass
class VerifyConfig:
    """Checks each hash, offset and count of packed shards. Lists bad shards and members; exit code 1 if there are any.

    Args:
        shards: folder with a manifest; with --sizes any shards, also remote ones
        workers: number of processes; null takes one per core
        decode: also decode each image, as streaming does, which finds damaged pixels
        sizes: check only that each shard exists, has the manifest's size and can be read at both ends
        json: print the result of --sizes as JSON
    """

    shards: str
    workers: int | None = None
    decode: bool = False
    sizes: bool = False
    json: bool = False


@dataclass
class StatsConfig:
    """Prints counts, caption lengths, words, class balance, image sizes, duplicates; draws plots and a contact sheet.

    Args:
        shards: folder, pattern, or a mix of them, in which each sample counts once
        output: folder for stats.txt, stats.json, stats.png and contact_sheet.png, and for tiles of scenes rasters.png,
            a map of their footprints with the values of each band; null takes the current folder
        caption_field: captions or coarse_captions
        tokenizer: name or folder of a tokenizer, to count tokens of captions too
        limit: count this many random samples; null counts all
        workers: number of processes; null takes one per core
        images: number of images on the contact sheet
        seed: seed of the samples of --limit and of the contact sheet
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
    """Trains a tokenizer on the captions of shards.

    Args:
        shards: folder, pattern, or a mix of them, in which each sample counts once
        output: folder to write; transformers' AutoTokenizer reads it
        vocab_size: number of tokens, with 256 bytes and 4 special tokens
        context_length: number of tokens to which a caption is padded or cut
        caption_field: one or several of captions and coarse_captions, comma-separated
    """

    shards: Shards
    output: str
    vocab_size: int = 8000
    context_length: int = 77
    caption_field: str = "captions"


@dataclass
class BenchConfig:
    """Measures images per second and core of the whole pipeline, compared with open_clip on the same tars.

    Args:
        output: JSON file to write
        images: folder of photographs for the test JPEGs; null draws scenes
        sizes: sides of the test JPEGs in pixels
        quality: JPEG quality, 1 to 100; null takes the quality of the photographs, or 90 for drawn scenes
        scales: smallest share of the area that a random crop keeps: 0.9 is open_clip's default, 0.5 ours
        count: JPEGs per size
        image_size: side of the cropped image in pixels
        batch: images per batch
        rounds: measurements of each; the result is their median
        workers: also compare 1 and 2 decoding workers
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
            raise ValueError(f"--sizes must be sides in pixels, 16 or more, not {self.sizes}")
        if not self.scales or not all(0 < scale <= 1 for scale in self.scales):
            raise ValueError(f"--scales must be shares of the area, 0 < scale <= 1, not {self.scales}")
