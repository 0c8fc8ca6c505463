"""Columns of CSV, Parquet and KEY.json that `pack --keep-columns` keeps: place, time, and all others as they are."""

from __future__ import annotations

import csv
import json
import shutil
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shapely.geometry import Point, shape
from shapely.geometry import box as rectangle
from small_data import write_tar
from source_packs import jpeg, packed, reasons, refusal, samples

from priorclip.data_shards.__main__ import main
from priorclip.data_shards.format.place import bounds, check_footprint, check_place, columns_of_info, place_of_info
from priorclip.data_shards.format.sample import BadSample
from priorclip.data_shards.sources.kept_columns import box, kept_columns, moment

PLACES = [
    {"lat": "46.95", "lon": "7.45", "time": "2019-07-01", "gsd": "0.1", "sensor": "SWISSIMAGE"},
    {"lat": "-17.7", "lon": "178.1", "time": "2019-07-01 12:30:15.9+02:00", "gsd": "10", "sensor": " Sentinel-2 "},
    {"lat": "", "lon": "", "time": "", "gsd": "", "sensor": ""},
    {"lat": "95", "lon": "7", "time": "", "gsd": "", "sensor": "a"},
    {"lat": "NaN", "lon": "7", "time": "", "gsd": "", "sensor": "b"},
    {"lat": "north", "lon": "7", "time": "", "gsd": "", "sensor": "c"},
    {"lat": "46", "lon": "", "time": "", "gsd": "", "sensor": "d"},
    {"lat": "46", "lon": "7", "time": "last June", "gsd": "", "sensor": "e"},
    {"lat": "46", "lon": "7", "time": "", "gsd": "-1", "sensor": "f"},
]
BAD = {
    "3": "column 'lat': a latitude of -90 to 90 degrees was expected, not 95",
    "4": "column 'lat': a finite number was expected, not 'NaN'",
    "5": "column 'lat': a finite number was expected, not 'north'",
    "6": "one of latitude and longitude is blank",
    "7": "column 'time': a time as 2019-07-01 or",
    "8": "column 'gsd': metres above 0 were expected, not -1",
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    with open(tmp_path / "table.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["filename", "caption", *PLACES[0]])
        writer.writeheader()
        for number, place in enumerate(PLACES):
            (tmp_path / f"images/{number}.jpg").write_bytes(jpeg(number))
            writer.writerow({"filename": f"{number}.jpg", "caption": f"field {number}", **place})
    return tmp_path / "table.csv"


def test_a_csv(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--csv", table, "--images", tmp_path / "images", "--keep-columns"]
    found = {
        key: sample.info for key, sample in samples(packed(tmp_path, "csv", *words, "lat,lon,time,gsd,sensor")).items()
    }
    assert list(found) == ["0", "1", "2"]
    place = {"footprint": {"type": "Point", "coordinates": [7.45, 46.95]}, "acquired": "2019-07-01", "gsd": 0.1}
    assert place_of_info(found["0"]) == place
    assert columns_of_info(found["0"]) == {"sensor": "SWISSIMAGE"}
    assert found["1"]["acquired"] == "2019-07-01T10:30:15"  # UTC
    assert found["1"]["kept_columns"] == {"sensor": "Sentinel-2"}
    assert (place_of_info(found["2"]), columns_of_info(found["2"])) == ({}, {})
    assert reasons(tmp_path) == dict.fromkeys(BAD, "bad column value")
    lines = [json.loads(line) for line in (tmp_path / "shards/quarantine.jsonl").read_text().splitlines()]
    for line in lines:
        assert BAD[line["key"]] in line["detail"]
        assert "table.csv" in line["detail"]
    assert "left out: 6 x bad column value" in capsys.readouterr().out
    assert main(["verify", str(tmp_path / "shards")]) == 0

    for columns, said in (
        ("sensor,height", "table.csv has no column height (--keep-columns); it has: caption, filename, gsd, lat, lon"),
        ("lat,gsd", "--keep-columns has one of lat and lon"),
        ("lat,lon,box=sensor", "a box, and lat and lon"),
        ("latitude=lat,lat,lon", "two columns for lat"),
        ("caption", "results have a 'caption' already; keep it as OTHER_NAME=caption"),
        ("gsd,,lat", "takes COLUMN or NAME=COLUMN"),
        ("gsd=", "takes COLUMN or NAME=COLUMN"),
    ):
        assert said in refusal(capsys, tmp_path, "csv", *words, columns)
    assert "does not take --keep-columns" in refusal(
        capsys, tmp_path, "imagefolder", "--images", tmp_path, "--keep-columns", "gsd"
    )


def test_other_names_and_rs5m(table: Path, tmp_path: Path) -> None:
    words = ["--csv", table, "--images", tmp_path / "images", "--keep-columns", "y=lat,shot=time,text=caption"]
    info = samples(packed(tmp_path, "csv", *words))["3"].info  # 95 is no latitude here
    assert columns_of_info(info) == {"y": "95", "text": "field 3"}
    table.write_text('img_name,text,country,box\n0.jpg,a port,spain,"(-3.8, 40.3, -3.7, 40.4)"\n')
    shutil.rmtree(tmp_path / "shards")
    words = ["--csv", table, "--images", tmp_path / "images", "--keep-columns", "box"]
    info = samples(packed(tmp_path, "rs5m", *words))["0"].info
    assert info["country"] == "spain"
    assert bounds(place_of_info(info)["footprint"]) == (-3.8, 40.3, -3.7, 40.4)


def test_parquet_keeps_kinds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers, times and lists of Parquet stay what they are; GeoParquet's bbox is a struct."""
    corners = [
        {"xmin": 178.0, "ymin": -18.0, "xmax": -179.0, "ymax": -17.0},
        {**dict.fromkeys(("xmin", "ymin"), 1.0), "xmax": 0.5, "ymax": float("nan")},
    ]
    content = {
        "image": [jpeg(0), jpeg(1)],
        "caption": ["reef", "sea"],
        "bbox": corners,
        "datetime": [datetime(2024, 2, 29, 23, 59, 59, 999999, timezone(timedelta(hours=-1))), None],
        "gsd": [Decimal("0.50"), None],
        "clouds": [0.25, 1.0],
        "tags": [["reef", "water"], []],
        "seen": [date(2024, 3, 1), None],
        "sent": pyarrow.array([1_709_251_199_123_456_789, None], pyarrow.timestamp("ns")),  # as pandas writes it
    }
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "a.parquet")
    words = ["parquet", "--parquet", tmp_path / "a.parquet", "--keep-columns"]
    found = samples(packed(tmp_path, *words, "bbox,datetime,gsd,clouds,tags,seen,sent"))
    info = found["a/00000000"].info
    assert reasons(tmp_path) == {"a/00000001": "bad column value"}
    assert (info["acquired"], info["gsd"]) == ("2024-03-01T00:59:59", 0.5)
    sent = {"sent": "2024-02-29T23:59:59.123456"}
    assert info["kept_columns"] == {"clouds": 0.25, "tags": ["reef", "water"], "seen": "2024-03-01", **sent}
    assert bounds(info["footprint"]) == (178.0, -18.0, -179.0, -17.0)
    assert shape(info["footprint"]).equals(rectangle(178, -18, 180, -17) | rectangle(-180, -18, -179, -17))
    assert "has no column image" in refusal(capsys, tmp_path, *words, "picture=image")
    assert "has no column depth" in refusal(capsys, tmp_path, *words, "depth")


def test_shards_of_img2dataset_and_our_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """img2dataset writes the further columns of its input table into KEY.json."""
    members = {}
    for key, facts in (
        ("000", {"latitude": 46.9, "longitude": 7.4, "sensor": "CH"}),
        ("001", {"latitude": 91, "longitude": 7.4}),
        ("002", {}),
    ):
        info = {"url": f"https://h/{key}.jpg", "caption": "a field", "status": "success", **facts}
        members |= {f"{key}.jpg": jpeg(int(key)), f"{key}.json": json.dumps(info).encode()}
    write_tar(tmp_path / "00000.tar", members)
    words = ["webdataset", "--shards", tmp_path / "00000.tar", "--keep-columns"]
    found = samples(packed(tmp_path, *words, "latitude,longitude,sensor"))
    assert list(found) == ["000", "002"]
    assert reasons(tmp_path) == {"001": "bad column value"}
    assert found["000"].info["footprint"] == {"type": "Point", "coordinates": [7.4, 46.9]}
    assert found["000"].info["kept_columns"] == {"sensor": "CH"}
    assert "KEY.json of" in (said := refusal(capsys, tmp_path, *words, "height"))
    assert "has no column height" in said
    (tmp_path / "shards").rename(tmp_path / "once")
    again = samples(packed(tmp_path, "webdataset", "--shards", tmp_path / "once", "--keep-columns", "address=url"))
    assert again["000"].info["footprint"] == found["000"].info["footprint"]
    assert again["000"].info["kept_columns"] == {"sensor": "CH", "address": "https://h/000.jpg"}


LON, LAT = (st.integers(-side * 1000, side * 1000).map(lambda value: value / 1000) for side in (180, 90))


@given(LON, LAT, LON, LAT, st.sampled_from(["{}", "[{}]", "({})"]))
def test_boxes(west: float, south: float, east: float, north: float, form: str) -> None:
    text = form.format(", ".join(map(repr, (west, south, east, north))))
    if south >= north or west == east:
        with pytest.raises(ValueError, match="with an area"):
            box(text)
        return
    made = box(text)
    check_footprint(made)
    if (west, east) not in ((180, -180), (-180, 180)) and west > -180 and east > -180 and west < 180:
        assert bounds(made) == (west, south, east, north)
    outline = shape(made)
    middle = (west + east) / 2 if west < east else (west + east + 360) / 2
    middle = middle - 360 if middle > 180 else middle
    assert outline.covers(Point(middle, (south + north) / 2))
    assert all(part.exterior.is_ccw for part in getattr(outline, "geoms", [outline]))


@given(st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=5, minutes=30))])))
def test_times_are_seconds_of_utc(when: datetime) -> None:
    if when.year in (1, 9999):
        return
    expected = (when.astimezone(UTC) if when.tzinfo else when).replace(microsecond=0, tzinfo=None)
    for cell in (when, when.isoformat(), when.isoformat(" ")):
        assert datetime.fromisoformat(moment(cell)) == expected
        check_place({"acquired": moment(cell)})


def test_times_that_are_none() -> None:
    for cell in ("2024-02-30", "June", "2019", 2019, 1561939200.0, True):
        with pytest.raises(ValueError, match="a time as 2019-07-01"):
            moment(cell)
    with pytest.raises(ValueError, match="'acquired' must be a date"):
        check_place({"acquired": "2024-02-30"})


def test_columns_that_are_too_long_or_no_json() -> None:
    rule = kept_columns(["note", "blob"])
    assert rule is not None
    for row, said in (
        ({"note": "x" * 10_001}, "limit 10000"),
        ({"blob": b"\x00"}, "not bytes"),
        ({"note": float("inf")}, "finite number"),
    ):
        with pytest.raises(BadSample, match=said):
            rule.facts(row)
    for info in ({"kept_columns": [1]}, {"kept_columns": {"a": float("nan")}}, {"kept_columns": {"a": "x" * 10_001}}):
        with pytest.raises(ValueError, match="'kept_columns'"):
            columns_of_info(info)
    for shape_, said in (
        ({"type": "Point", "coordinates": [0, 91]}, "latitude"),
        ({"type": "Point", "coordinates": [1]}, "point of two numbers"),
        ({"type": "Point"}, "coordinates as GeoJSON"),
    ):
        with pytest.raises(ValueError, match=said):
            check_footprint(shape_)


def test_stats_draws_points(table: Path, tmp_path: Path) -> None:
    words = ["--csv", table, "--images", tmp_path / "images", "--keep-columns", "lat,lon,time,gsd"]
    packed(tmp_path, "csv", *words)
    assert main(["stats", str(tmp_path / "shards"), "--output", str(tmp_path / "stats"), "--workers", "1"]) == 0
    found = json.loads((tmp_path / "stats/stats.json").read_text())["rasters"]
    assert (found["places"], found["tiles"], found["footprints"], found["scenes"]) == (2, 0, 2, {})
    assert found["acquired"] == ["2019-07-01", "2019-07-01T10:30:15"]
    assert found["gsd"] == [0.1, 10.0]
    assert (tmp_path / "stats/rasters.png").stat().st_size > 5000
    assert (
        "places           2 of 3 samples, 2 with a footprint; 0 tiles of 0 scenes"
        in (tmp_path / "stats/stats.txt").read_text()
    )
