"""Captions for images that have only a scene label, made as those of RS5M's label-only half (RS3).

    captions("denseresidential", 5, seed=17) ->
        ["an aerial photograph of a dense residential area", "many closely packed houses seen from above", ...]

A caption is a template filled with a phrase of the scene; the seed draws both. SCENES has phrases for the classes of
the usual benchmarks (UC Merced, AID, NWPU-RESISC45, RSICD, RSITMD, Million-AID, fMoW, BigEarthNet, EuroSAT). The phrase
of another class is made from its name. The caption of an image with several classes names all of them:

    captions(["Mixed forest", "Inland waters"], 1, seed=3) -> ["a satellite image of a mixed forest and inland waters"]
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence

# {scene} is a noun phrase with its article: "an airport", "storage tanks", "farmland".
TEMPLATES = (
    "an aerial photograph of {scene}",
    "an aerial image of {scene}",
    "an aerial view of {scene}",
    "a satellite image of {scene}",
    "a satellite photo of {scene}",
    "a remote sensing image of {scene}",
    "an overhead view of {scene}",
    "an overhead photograph showing {scene}",
    "a bird's eye view of {scene}",
    "a top-down view of {scene}",
    "{scene} seen from above",
    "{scene} seen from the air",
    "{scene} in a satellite image",
    "{scene} in an aerial photograph",
    "{scene} in a high resolution remote sensing image",
    "{scene} photographed from an aircraft",
    "{scene} as it looks from space",
    "a high resolution aerial image with {scene}",
    "a satellite picture that shows {scene}",
    "an orthophoto of {scene}",
    "a drone image of {scene}",
    "this is {scene}",
    "it is {scene}",
    "here is {scene}",
    "this aerial image shows {scene}",
    "this satellite image shows {scene}",
    "the picture shows {scene} from above",
    "a scene of {scene}",
    "earth observation image of {scene}",
    "a view from above of {scene}",
    "a vertical photograph of {scene}",
    "a cropped satellite image of {scene}",
    "a clear aerial shot of {scene}",
    "a typical view of {scene} from above",
    "a piece of land with {scene}",
)

SCENES: dict[str, tuple[str, ...]] = {
    "agricultural": ("farmland", "a piece of farmland", "cropland", "agricultural land", "crop fields"),
    "airfield": ("an airfield", "an airfield with a runway"),
    "airplane": ("airplanes", "several airplanes at the airport", "planes parked on the apron", "an airplane"),
    "airport": ("an airport", "an airport with terminals and runways", "an airport with planes"),
    "apartment": ("apartment blocks", "apartment buildings"),
    "aquafarm": ("an aquaculture farm", "fish ponds"),
    "bareland": ("bare land", "bare ground", "a piece of bare land"),
    "barren land": ("barren land", "bare ground"),
    "baseballdiamond": ("a baseball diamond", "a baseball field", "a baseball diamond with sand and grass"),
    "baseballfield": ("a baseball field", "a baseball diamond", "baseball fields with grass"),
    "basketballcourt": ("a basketball court", "basketball courts"),
    "beach": ("a beach", "a beach beside the sea", "white sand and waves", "a sandy beach"),
    "boat": ("boats on the water", "a boat", "moored boats"),
    "bridge": ("a bridge", "a bridge over a river", "a bridge over the water"),
    "buildings": ("buildings", "some buildings", "large buildings beside roads"),
    "cemetery": ("a cemetery", "rows of graves"),
    "center": ("a large central building", "a convention centre"),
    "chaparral": ("chaparral", "bushes on dry ground", "sparse plants on sandy ground", "desert shrubs"),
    "church": ("a church", "a church among houses"),
    "circularfarmland": ("circular farmland", "round irrigated fields"),
    "cloud": ("clouds", "thick clouds"),
    "commercial": ("a commercial area", "shops and office buildings", "a dense commercial district"),
    "denseresidential": (
        "a dense residential area",
        "dense houses",
        "many houses closely packed together",
        "lots of houses arranged in lines",
        "a crowded residential district with roads",
    ),
    "desert": ("a desert", "sand dunes", "a piece of yellow desert"),
    "farmland": ("farmland", "a piece of farmland", "fields of crops", "cropland"),
    "ferry terminal": ("a ferry terminal", "a ferry at its pier"),
    "footballfield": ("a football field", "football pitches", "a green football field"),
    "forest": ("a forest", "a dense forest", "many green trees", "green woodland"),
    "freeway": ("a freeway", "a straight freeway with cars", "parallel freeways", "a motorway"),
    "golfcourse": ("a golf course", "a golf course with bunkers and green turf", "golf greens and bunkers"),
    "greenhouse": ("greenhouses", "rows of greenhouses"),
    "harbor": ("a harbour", "a harbor with many boats", "boats docked at the harbor", "boats in lines at the piers"),
    "herbaceousvegetation": ("grassland", "herbaceous vegetation"),
    "highway": ("a highway", "a highway through open land"),
    "industrial": ("an industrial area", "factories and warehouses", "industrial buildings with large roofs"),
    "intersection": ("an intersection", "a crossroads with cars", "a road intersection with buildings beside it"),
    "island": ("an island", "an island in the sea"),
    "lake": ("a lake", "a lake among trees", "a body of still water"),
    "meadow": ("a meadow", "green grassland", "a piece of meadow"),
    "mediumresidential": (
        "a medium residential area",
        "houses with trees around them",
        "houses beside a road with lawns",
        "a residential area of medium density",
    ),
    "mobilehomepark": ("a mobile home park", "many mobile homes", "mobile homes arranged along the roads"),
    "mountain": ("mountains", "a mountain ridge", "rugged mountains"),
    "overpass": ("an overpass", "an overpass crossing a road", "roads that go over one another"),
    "palace": ("a palace", "a palace with courtyards"),
    "park": ("a park", "a park with trees and a pond", "a public garden"),
    "parking": ("a parking lot", "many parked cars"),
    "parkinglot": ("a parking lot", "a parking lot with many cars", "lots of cars parked in rows"),
    "permanentcrop": ("orchards", "permanent crops"),
    "annualcrop": ("annual crops", "crop fields"),
    "pasture": ("a pasture", "grazing land"),
    "plane": ("planes", "parked planes"),
    "playground": ("a playground", "a sports ground with a running track", "a running track around a field"),
    "pond": ("a pond", "a pond with green water", "a small body of water"),
    "port": ("a port", "a port with ships", "ships at the docks"),
    "railway": ("a railway", "railway tracks", "several railway lines"),
    "railwaystation": ("a railway station", "a train station with tracks", "platforms beside railway tracks"),
    "rectangularfarmland": ("rectangular fields", "rectangular farmland"),
    "residential": ("a residential area", "houses along streets"),
    "resort": ("a resort", "a holiday resort with pools"),
    "river": ("a river", "a river with trees on both banks", "a winding river", "a river through green land"),
    "roundabout": ("a roundabout", "a circular road junction"),
    "runway": ("a runway", "a straight runway with white marks", "an airport runway"),
    "school": ("a school", "a school with a playground"),
    "seaice": ("sea ice", "floating ice"),
    "sealake": ("open water", "a sea or lake"),
    "ship": ("a ship", "ships on the sea"),
    "snowberg": ("snow-covered mountains", "a snowy mountain"),
    "solarpanel": ("solar panels", "a solar farm"),
    "sparseresidential": (
        "a sparse residential area",
        "a house surrounded by trees",
        "a few scattered houses with bushes",
        "single houses among plants",
    ),
    "square": ("a square", "a public square with people"),
    "stadium": ("a stadium", "a large stadium with stands"),
    "storagetank": ("storage tanks", "a storage tank", "round white tanks"),
    "storagetanks": ("storage tanks", "white storage tanks", "round tanks on the ground", "a large storage tank"),
    "swimmingpool": ("a swimming pool", "swimming pools beside houses"),
    "tenniscourt": ("a tennis court", "tennis courts", "tennis courts surrounded by trees"),
    "terrace": ("terraced fields", "terraces on a slope"),
    "thermalpowerstation": ("a thermal power station", "a power station with cooling towers"),
    "viaduct": ("a viaduct", "an elevated road", "a road interchange with many ramps"),
    "wetland": ("a wetland", "marshland"),
    "windmill": ("wind turbines", "a wind turbine"),
    "works": ("a factory", "industrial works"),
    # Functional Map of the World
    "aquaculture": ("an aquaculture farm", "fish ponds"),
    "burialsite": ("a burial site", "a cemetery"),
    "debrisorrubble": ("debris and rubble", "rubble of destroyed buildings"),
    "educationalinstitution": ("a school or university", "buildings of an educational institution"),
    "factoryorpowerplant": ("a factory or power plant", "a large industrial plant"),
    "groundtransportationstation": ("a station for buses or trains", "a transport station"),
    "impoverishedsettlement": ("a poor settlement with many small huts", "closely packed makeshift houses"),
    "lakeorpond": ("a lake or pond", "a body of still water"),
    "multiunitresidential": ("apartment buildings", "a residential block with many flats"),
    "nuclearpowerplant": ("a nuclear power plant", "a nuclear power station with its cooling towers"),
    "oilorgasfacility": ("an oil or gas facility", "an oil and gas plant"),
    "parkinglotorgarage": ("a parking lot or garage", "a parking area with cars"),
    "placeofworship": ("a place of worship", "a religious building"),
    "singleunitresidential": ("detached houses", "a single family house"),
    "surfacemine": ("a surface mine", "an open pit mine"),
    "wastedisposal": ("a waste disposal site", "a landfill"),
    # Million-AID
    "dryfield": ("dry fields", "dry farmland"),
    "mine": ("a mine", "an open pit mine"),
    "oilfield": ("an oil field", "oil wells on open ground"),
    "paddyfield": ("paddy fields", "flooded rice fields"),
    "terracedfield": ("terraced fields", "terraces on a slope"),
    "woodland": ("woodland", "trees"),
    # BigEarthNet, 19 and 43 classes
    "airports": ("an airport",),
    "agroforestryareas": ("agroforestry areas", "fields with scattered trees"),
    "beachesdunessands": ("beaches and dunes", "sand"),
    "continuousurbanfabric": ("a dense city", "dense urban fabric"),
    "discontinuousurbanfabric": ("scattered settlements", "a town with gardens"),
    "greenurbanareas": ("green urban areas", "parks in a town"),
    "industrialorcommercialunits": ("industrial or commercial buildings", "an industrial area"),
    "moorsandheathland": ("moors and heathland",),
    "moorsheathlandandsclerophyllousvegetation": ("moors and heathland", "shrubs"),
    "naturalgrassland": ("natural grassland",),
    "naturalgrasslandandsparselyvegetatedareas": ("natural grassland", "sparse vegetation"),
    "nonirrigatedarableland": ("arable land", "crop fields without irrigation"),
    "portareas": ("a port",),
    "ricefields": ("rice fields",),
    "seaandocean": ("the sea", "open sea"),
    "sportandleisurefacilities": ("sports and leisure grounds",),
    "transitionalwoodlandshrub": ("transitional woodland", "shrubs and young trees"),
    "urbanfabric": ("a town", "houses and streets", "urban fabric"),
}

NAMED_TOGETHER = 4
UNCOUNTED = ("land", "water", "vegetation", "farmland", "forestry", "ice", "snow", "sand", "housing", "grass")


def captions(label: str | Sequence[str], count: int, seed: int) -> list[str]:
    """Returns ``count`` different captions of one scene class, or of several that an image shows. The seed draws them.

    If there are more than NAMED_TOGETHER classes, it draws NAMED_TOGETHER of them, so that a caption stays short.

    Raises:
        ValueError: there are fewer different captions than ``count``
    """
    labels = [label] if isinstance(label, str) else list(label)
    if len(labels) > NAMED_TOGETHER:
        chosen = random.Random(seed).sample(range(len(labels)), NAMED_TOGETHER)
        labels = [labels[i] for i in sorted(chosen)]
    phrases = [scene_phrases(name) for name in labels]
    possible = math.prod(map(len, phrases)) * len(TEMPLATES)
    if not 0 < count <= possible:
        raise ValueError(f"--captions-per-image {count}: class {label!r} has only {possible} different captions")
    texts = []
    for number in random.Random(seed).sample(range(possible), count):
        parts = []
        for choices in phrases:
            number, place = divmod(number, len(choices))
            parts.append(choices[place])
        scene = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
        texts.append(TEMPLATES[number].format(scene=scene))
    return texts


def scene_phrases(label: str) -> tuple[str, ...]:
    """Returns noun phrases for a class, from SCENES or its name: "a solar farm" for ``SolarFarm`` or ``solar_farm``."""
    key = re.sub(r"[^a-z0-9]", "", label.lower())
    if key in KNOWN:
        return KNOWN[key]
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", label)
    name = " ".join(re.sub(r"[^\w]|_", " ", words).lower().split()) or label
    last = name.split()[-1]
    if last in UNCOUNTED or (last.endswith("s") and not last.endswith("ss")):
        return (name,)
    return (f"{'an' if name[0] in 'aeiou' else 'a'} {name}",)


KNOWN = {re.sub(r"[^a-z0-9]", "", name): phrases for name, phrases in SCENES.items()}
