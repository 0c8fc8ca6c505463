"""The words of captions: all synonyms of a fact, so that tests can search for them.

Add the words of a new noun, layout or scene class here; `wording` makes the sentences.
"""

from __future__ import annotations

NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
ONE = ("a", "one", "a single")
PLENTY = ("many", "dozens of", "lots of")

# {n} is the count or article, {c} the colour, {k} the kind. One pair (singular, plural) per synonym.
NOUNS: dict[str, tuple[tuple[str, str], ...]] = {
    "tank": (
        ("{n} {c} storage tank", "{n} {c} storage tanks"),
        ("{n} {c} oil tank", "{n} {c} oil tanks"),
        ("{n} round {c} tank", "{n} round {c} tanks"),
    ),
    "plane": (
        ("{n} {c} airplane", "{n} {c} airplanes"),
        ("{n} {c} plane", "{n} {c} planes"),
        ("{n} {c} aircraft", "{n} {c} aircraft"),
    ),
    "ship": (("{n} {c} ship", "{n} {c} ships"), ("{n} {c} vessel", "{n} {c} vessels")),
    "boat": (("{n} {c} boat", "{n} {c} boats"), ("{n} boat in {c}", "{n} boats in {c}")),
    "car": (("{n} {c} car", "{n} {c} cars"), ("{n} {c} vehicle", "{n} {c} vehicles")),
    "truck": (("{n} {c} truck", "{n} {c} trucks"), ("{n} {c} lorry", "{n} {c} lorries")),
    "train": (("{n} {c} train", "{n} {c} trains"), ("{n} train in {c}", "{n} trains in {c}")),
    "house": (
        ("{n} house with {c} roof", "{n} houses with {c} roofs"),
        ("{n} {c} roofed house", "{n} {c} roofed houses"),
        ("{n} {c} house", "{n} {c} houses"),
    ),
    "farmhouse": (
        ("{n} farm building with {c} roof", "{n} farm buildings with {c} roofs"),
        ("{n} {c} barn", "{n} {c} barns"),
    ),
    "cabin": (("{n} {c} cabin", "{n} {c} cabins"), ("{n} {c} hut", "{n} {c} huts")),
    "warehouse": (
        ("{n} {c} warehouse", "{n} {c} warehouses"),
        ("{n} warehouse with {c} roof", "{n} warehouses with {c} roofs"),
    ),
    "factory": (
        ("{n} factory hall with {c} roof", "{n} factory halls with {c} roofs"),
        ("{n} {c} roofed factory building", "{n} {c} roofed factory buildings"),
        ("{n} {c} industrial building", "{n} {c} industrial buildings"),
    ),
    "terminal": (
        ("{n} {c} terminal", "{n} {c} terminals"),
        ("{n} {c} airport building", "{n} {c} airport buildings"),
    ),
    "station": (
        ("{n} station with {c} roof", "{n} stations with {c} roofs"),
        ("{n} {c} station building", "{n} {c} station buildings"),
    ),
    "clubhouse": (
        ("{n} clubhouse with {c} roof", "{n} clubhouses with {c} roofs"),
        ("{n} {c} building", "{n} {c} buildings"),
    ),
    "chimney": (("{n} chimney", "{n} chimneys"), ("{n} smokestack", "{n} smokestacks")),
    "tree": (("{n} tree", "{n} trees"),),
    "pool": (("{n} swimming pool", "{n} swimming pools"), ("{n} pool", "{n} pools")),
    "pier": (("{n} pier", "{n} piers"), ("{n} jetty", "{n} jetties")),
    "road": (("{n} road", "{n} roads"),),
    "street": (("{n} street", "{n} streets"), ("{n} residential road", "{n} residential roads")),
    "runway": (("{n} runway", "{n} runways"),),
    "railway": (("{n} railway", "{n} railways"), ("{n} railroad line", "{n} railroad lines")),
    "track": (("{n} track", "{n} tracks"), ("{n} railway track", "{n} railway tracks")),
    "river": (("{n} {k} river", "{n} {k} rivers"), ("{n} {k} waterway", "{n} {k} waterways")),
    "pond": (("{n} pond", "{n} ponds"), ("{n} pool of water", "{n} pools of water")),
    "lake": (("{n} {k} lake", "{n} {k} lakes"), ("{n} {k} body of water", "{n} {k} bodies of water")),
    "tarn": (("{n} small lake", "{n} small lakes"), ("{n} mountain lake", "{n} mountain lakes")),
    "sea": (("the sea", "the sea"), ("the ocean", "the ocean")),
    "island": (("{n} {k} island", "{n} {k} islands"), ("{n} {k} islet", "{n} {k} islets")),
    "woods": (("{n} wood", "{n} woods"), ("{n} patch of dense trees", "{n} patches of dense trees")),
    "field": (
        ("{n} {c} field", "{n} {c} fields"),
        ("{n} {c} crop field", "{n} {c} crop fields"),
        ("{n} {c} farm field", "{n} {c} farm fields"),
    ),
    "circle": (
        ("{n} circular {c} field", "{n} circular {c} fields"),
        ("{n} round {c} irrigated field", "{n} round {c} irrigated fields"),
    ),
    "panel row": (
        ("{n} row of solar panels", "{n} rows of solar panels"),
        ("{n} line of photovoltaic panels", "{n} lines of photovoltaic panels"),
    ),
    "block": (("{n} block", "{n} blocks"), ("{n} group", "{n} groups")),
    "turbine": (("{n} wind turbine", "{n} wind turbines"), ("{n} white windmill", "{n} white windmills")),
    "court": (
        ("{n} {c} tennis court", "{n} {c} tennis courts"),
        ("{n} tennis court in {c}", "{n} tennis courts in {c}"),
    ),
    "surround": (("{n} {c} surround", "{n} {c} surrounds"), ("{n} {c} border", "{n} {c} borders")),
    "diamond": (
        ("{n} baseball field", "{n} baseball fields"),
        ("{n} baseball diamond", "{n} baseball diamonds"),
    ),
    "stand": (
        ("{n} {k} stadium with {c} seats", "{n} {k} stadiums with {c} seats"),
        ("{n} {k} arena with {c} stands", "{n} {k} arenas with {c} stands"),
    ),
    "pitch": (
        ("{n} green pitch {k}", "{n} green pitches {k}"),
        ("{n} football field {k}", "{n} football fields {k}"),
    ),
    "bridge": (("{n} bridge", "{n} bridges"), ("{n} road bridge", "{n} road bridges")),
    "highway": (("{n} highway {k}", "{n} highways {k}"), ("{n} motorway {k}", "{n} motorways {k}")),
    "roundabout": (("{n} roundabout", "{n} roundabouts"), ("{n} traffic circle", "{n} traffic circles")),
    "umbrella": (("{n} {c} umbrella", "{n} {c} umbrellas"), ("{n} {c} parasol", "{n} {c} parasols")),
    "forest": (
        ("{n} dense {c} forest", "{n} dense {c} forests"),
        ("{n} forest of {c} trees", "{n} forests of {c} trees"),
    ),
    "clearing": (("{n} {k} clearing", "{n} {k} clearings"), ("{n} {k} glade", "{n} {k} glades")),
    "dirt track": (("{n} dirt track", "{n} dirt tracks"), ("{n} brown footpath", "{n} brown footpaths")),
    "stream": (("{n} stream", "{n} streams"), ("{n} creek", "{n} creeks")),
    "desert": (
        ("{n} {c} desert", "{n} {c} deserts"),
        ("{n} desert of {c} sand dunes", "{n} deserts of {c} sand dunes"),
    ),
    "rock": (("{n} rock", "{n} rocks"), ("{n} boulder", "{n} boulders")),
    "oasis": (("{n} oasis", "{n} oases"), ("{n} green oasis", "{n} green oases")),
    "bunker": (("{n} sand bunker", "{n} sand bunkers"), ("{n} sand trap", "{n} sand traps")),
    "green": (("{n} golf green", "{n} golf greens"), ("{n} putting green", "{n} putting greens")),
    "peak": (("{n} {k} peak", "{n} {k} peaks"), ("{n} {k} summit", "{n} {k} summits")),
    "backdrop": (("{k}", "{k}"),),
}

KINDS: dict[str, tuple[str, ...]] = {
    "straight": ("straight",),
    "winding": ("winding", "curved"),
    "round": ("round", "circular"),
    "oval": ("oval",),
    "rectangular": ("rectangular",),
    "long": ("long", "elongated"),
    "snow": ("snow-capped", "snow covered"),
    "bare": ("bare", "rocky"),
    "grassy": ("grassy", "green"),
    "green": ("green central", "grassy central"),
    "sandy": ("sandy central", "bare sandy"),
    "fountain": ("water filled central", "fountain"),
    "track": ("with a running track", "inside a running track"),
    "looped": ("joined by loop ramps", "with curved ramps"),
    "grass": ("green grass", "grass"),
    "forest": ("trees", "forest"),
    "asphalt": ("a paved promenade", "asphalt"),
    "soil": ("bare soil", "brown earth"),
}

GROUNDS: dict[str, tuple[str, ...]] = {
    "grass": ("green grass", "a green meadow", "grass"),
    "dry grass": ("dry yellow grass", "dry grass"),
    "soil": ("bare brown soil", "bare soil", "brown earth"),
    "sand": ("pale sand", "sand", "sandy ground"),
    "concrete": ("light grey concrete", "concrete", "pale concrete"),
    "asphalt": ("dark asphalt", "asphalt", "dark tarmac"),
    "forest": ("dense forest", "thick forest", "forest"),
    "desert": ("orange desert", "desert sand", "desert"),
    "rock": ("bare rock", "grey rock", "rock"),
}
SETTING = ("on {g}", "with {g} around", "set in {g}")
SETTINGS: dict[str, tuple[str, ...]] = {
    "river": ("between banks of {g}", "with {g} on both banks"),
    "bridge": ("between banks of {g}", "with {g} on both banks"),
    "lake": ("with a shore of {g}", "surrounded by {g}"),
    "peak": ("above {g}", "rising from {g}"),
    "plane": ("parked on {g}", "on {g}"),
    "car": ("parked on {g}", "on {g}"),
}

LAYOUTS: dict[str, tuple[str, ...]] = {
    "row": ("in a row", "in one line", "lined up in a row"),
    "two rows": ("in two rows", "in two parallel rows"),
    "grid": ("in a grid", "in a square grid"),
    "ring": ("in a ring", "arranged in a circle", "in a circle"),
    "scattered": ("scattered around", "scattered at random", "spread out"),
    "rows": ("in rows", "in dense rows"),
    "strips": ("in parallel strips", "in strips side by side"),
}

RELATIONS: dict[str, tuple[str, ...]] = {
    "beside": ("beside {t}", "next to {t}", "by {t}"),
    "near": ("near {t}", "close to {t}"),
    "with": ("with {t}", "together with {t}"),
    "along": ("along {t}", "lining {t}"),
    "around": ("around {t}", "surrounding {t}"),
    "among": ("among {t}", "on a yard of {t}"),
    "moored": ("moored at {t}", "docked at {t}"),
    "carrying": ("carrying {t}", "with {t} driving on it", "with {t} on it"),
    "over": ("over {t}", "across {t}", "crossing {t}"),
    "joining": ("joining {t}", "where {t} meet"),
    "crossed": ("crossed by {t}", "with {t} through it"),
    "rimmed": ("with {t}", "inside {t}"),
    "in": ("in {t}", "laid out in {t}"),
    "backed": ("with {t} behind the sand", "backed by {t}"),
}
CARRYING = ("with {t}", "with {t} on it", "carrying {t}")

SCENE_WORDS: dict[str, tuple[str, ...]] = {
    "airport": ("airport", "airfield", "aircraft parking"),
    "baseball field": ("baseball field", "ballpark", "baseball"),
    "beach": ("beach", "seaside", "sandy coast"),
    "bridge": ("bridge", "river crossing", "road bridge"),
    "dense residential": ("dense residential area", "housing estate", "neighborhood"),
    "desert": ("desert", "sand dunes", "arid land"),
    "farmland": ("farmland", "agriculture", "crop fields"),
    "forest": ("forest", "woodland", "trees"),
    "golf course": ("golf course", "golf club", "fairway"),
    "harbour": ("harbour", "port", "marina"),
    "industrial": ("industrial area", "factory", "industrial estate"),
    "lake": ("lake", "pond", "inland water"),
    "mountain": ("mountain", "mountains", "alpine terrain"),
    "overpass": ("overpass", "highway interchange", "motorway junction"),
    "parking lot": ("parking lot", "car park", "parking"),
    "railway station": ("railway station", "train station", "rail yard"),
    "river": ("river", "riverbank", "waterway"),
    "roundabout": ("roundabout", "traffic circle", "road junction"),
    "solar farm": ("solar farm", "photovoltaic plant", "solar power station"),
    "sparse residential": ("sparse residential area", "country houses", "suburb"),
    "stadium": ("stadium", "sports arena", "football ground"),
    "storage tanks": ("storage tanks", "oil storage", "tank farm"),
    "tennis court": ("tennis court", "tennis club", "sports courts"),
    "wind farm": ("wind farm", "wind turbines", "wind power plant"),
}

# The wrong class that a careless uploader gives a scene.
MISTAKEN: dict[str, str] = {
    "airport": "parking lot",
    "baseball field": "stadium",
    "beach": "desert",
    "bridge": "overpass",
    "dense residential": "sparse residential",
    "desert": "beach",
    "farmland": "golf course",
    "forest": "mountain",
    "golf course": "farmland",
    "harbour": "river",
    "industrial": "storage tanks",
    "lake": "river",
    "mountain": "desert",
    "overpass": "bridge",
    "parking lot": "industrial",
    "railway station": "industrial",
    "river": "lake",
    "roundabout": "overpass",
    "solar farm": "farmland",
    "sparse residential": "dense residential",
    "stadium": "baseball field",
    "storage tanks": "industrial",
    "tennis court": "baseball field",
    "wind farm": "farmland",
}

COARSE = (
    "aerial view of {s}",
    "{s} from above",
    "satellite image of {s}",
    "{s} | satellite photo #{i}",
    "drone shot: {s}",
    "{s}, top view",
    "{s} aerial photography stock photo",
    "overhead picture of a {s}",
    "IMG_{i} {s}",
    "{s} seen from the air",
    "bird's eye view of {s}, free download",
    "high resolution satellite imagery, {s}",
    "remote sensing image: {s}",
    "photo of {s} taken from a plane",
    "{s} in {y}",
    "map tile with {s}",
)
VAGUE = (
    "satellite photo #{i}",
    "aerial photograph, {y}",
    "view from above",
    "drone footage still {i}",
    "earth from space",
    "image {i} of {j}",
)
