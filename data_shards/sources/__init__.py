"""Every layout that remote sensing data comes in -> records: images with captions, scene labels, and where they lie.

read_source(config)          what `data_shards pack --source NAME` reads (catalogue.py)
Record, RecordSet, load      what a source gives (record.py); a list of records evaluates and trains unpacked

csv rs5m                     table.py        imagefolder millionaid    folder.py
karpathy precomp             benchmark.py    fmow                      fmow.py
webdataset                   tars.py         bigearthnet               bigearthnet.py
parquet                      parquet.py      synthetic                 drawing.py
"""

from data_shards.sources.benchmark import karpathy as karpathy
from data_shards.sources.benchmark import precomp as precomp
from data_shards.sources.drawing import Drawing as Drawing
from data_shards.sources.drawing import synthetic as synthetic
from data_shards.sources.folder import imagefolder as imagefolder
from data_shards.sources.folder import millionaid as millionaid
from data_shards.sources.names import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from data_shards.sources.names import find_image as find_image
from data_shards.sources.names import keep_split as keep_split
from data_shards.sources.names import sample_key as sample_key
from data_shards.sources.names import stem_label as stem_label
from data_shards.sources.record import ImageFile as ImageFile
from data_shards.sources.record import Place as Place
from data_shards.sources.record import Record as Record
from data_shards.sources.record import RecordSet as RecordSet
from data_shards.sources.record import load as load
from data_shards.sources.table import csv as csv
from data_shards.sources.table import label_table as label_table
from data_shards.sources.table import rs5m as rs5m
from data_shards.sources.tars import webdataset as webdataset
