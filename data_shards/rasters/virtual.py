"""Virtual rasters (VRT, as gdalbuildvrt writes them) of files that lie below the VRT's own folder, and of nothing else.

    text, files = checked_vrt(Path("scenes/mosaic.vrt"), check_plain)    # its XML with full paths, and these paths

A VRT can name any file, URL, database, or code to run. So its XML is read here, by a list of known elements, and GDAL
gets what is left. Each source must be a regular file below the folder that the drivers of gdal.py open. Derived, warped
and raw bands, pixel functions, options and further VRTs are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from priorclip.common.safe_paths import UnsafePath, join_under
from priorclip.data_shards.format.sample import BadSample

Check = Callable[[Path], None]
LARGEST = 16 << 20  # bytes of a VRT
SOURCES = ("SimpleSource", "ComplexSource")
KNOWN: dict[str, tuple[str, ...]] = {  # element -> what it may hold
    "VRTDataset": ("SRS", "GeoTransform", "GCPList", "Metadata", "VRTRasterBand", "BlockXSize", "BlockYSize",
                   "OverviewList"),
    "GCPList": ("GCP",),
    "VRTRasterBand": ("Description", "NoDataValue", "ColorInterp", "ColorTable", "Metadata", "HideNoDataValue",
                      "UnitType", "Offset", "Scale", *SOURCES),
    "ColorTable": ("Entry",),
    "Metadata": ("MDI",),
    **dict.fromkeys(SOURCES, ("SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA",
                              "ScaleOffset", "ScaleRatio", "UseMaskBand")),
}  # fmt: skip
REFUSED = "refused virtual raster"


def checked_vrt(path: Path, check: Check) -> tuple[str, list[Path]]:
    """Returns the XML of a VRT, in which each source is a full path, and these paths.

    Args:
        path: the VRT
        check: raises BadSample or OSError for a source that is no raster of a format that names no other file

    Raises BadSample for a file that is no such VRT, or that names what it must not.
    """
    try:
        data = path.read_bytes() if path.stat().st_size <= LARGEST else b""
        if not data or b"<!" in data:  # no entities, which can grow without end
            raise BadSample(REFUSED, f"{path.name}: it is empty, has more than {LARGEST >> 20} MB, or a DOCTYPE")
        root = ElementTree.fromstring(data)
        if root.tag != "VRTDataset":
            raise BadSample(REFUSED, f"{path.name}: <{root.tag[:40]}> is no VRTDataset")
        check_element(root, path)
    except (OSError, ElementTree.ParseError, LookupError, ValueError, RecursionError) as error:
        if isinstance(error, BadSample):
            raise
        raise BadSample(REFUSED, f"{path.name}: {error}") from error
    files: dict[str, Path] = {}
    for source in [each for band in root.iter("VRTRasterBand") for each in band if each.tag in SOURCES]:
        names = source.findall("SourceFilename")
        if len(names) != 1:
            raise BadSample(REFUSED, f"{path.name}: a source needs one SourceFilename")
        name = (names[0].text or "").strip()
        files[name] = files.get(name) or source_file(path, name, check)
        names[0].text, names[0].attrib = str(files[name]), {"relativeToVRT": "0"}
    return ElementTree.tostring(root, encoding="unicode"), list(files.values())


def check_element(element: Element, path: Path) -> None:
    """Raises BadSample for an element or a class of bands that is not known to be harmless."""
    if "subClass" in element.attrib:
        raise BadSample(
            REFUSED, f"{path.name}: the class {element.attrib['subClass'][:40]!r} can do more than join files"
        )
    for child in element:
        if child.tag not in KNOWN.get(element.tag, ()):
            raise BadSample(REFUSED, f"{path.name}: <{child.tag[:40]}> in <{element.tag}> is not read")
        check_element(child, path)


def source_file(path: Path, name: str, check: Check) -> Path:
    """Returns the file of a source. Raises BadSample if it is not one below the VRT's folder that may be opened."""
    folder = path.parent.absolute()
    try:
        inside = str(Path(name).relative_to(folder)) if Path(name).is_relative_to(folder) else name
        found = join_under(folder, inside, path.name)
        check(found)
        return found
    except (BadSample, UnsafePath, ValueError, OSError) as error:
        raise BadSample(REFUSED, f"{path.name} names {name[:80]!r}: {error}") from error
