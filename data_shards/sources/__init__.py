"""Reads the layouts of remote sensing data sets into records: images with captions, scene labels and their place.

read_source(config)          the records of `data_shards pack --source NAME` (catalogue.py)
Record, RecordSet, load      the records of a source (record.py); RecordSet evaluates and trains without packing

csv rs5m                     table.py        imagefolder millionaid    folder.py
skyscript                    skyscript.py    fmow                      fmow.py
karpathy precomp             benchmark.py
webdataset                   tars.py         bigearthnet               bigearthnet.py
parquet                      parquet.py      synthetic                 drawing.py
raster                       scenes.py
"""

from priorclip.data_shards.sources.benchmark import karpathy as karpathy
from priorclip.data_shards.sources.benchmark import precomp as precomp
from priorclip.data_shards.sources.drawing import Drawing as Drawing
from priorclip.data_shards.sources.drawing import synthetic as synthetic
from priorclip.data_shards.sources.folder import imagefolder as imagefolder
from priorclip.data_shards.sources.folder import millionaid as millionaid
from priorclip.data_shards.sources.names import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from priorclip.data_shards.sources.names import find_image as find_image
from priorclip.data_shards.sources.names import sample_key as sample_key
from priorclip.data_shards.sources.names import stem_label as stem_label
from priorclip.data_shards.sources.record import ImageFile as ImageFile
from priorclip.data_shards.sources.record import Place as Place
from priorclip.data_shards.sources.record import Record as Record
from priorclip.data_shards.sources.record import RecordSet as RecordSet
from priorclip.data_shards.sources.record import keep_split as keep_split
from priorclip.data_shards.sources.record import load as load
from priorclip.data_shards.sources.table import csv as csv
from priorclip.data_shards.sources.table import label_table as label_table
from priorclip.data_shards.sources.table import rs5m as rs5m
from priorclip.data_shards.sources.tars import webdataset as webdataset
