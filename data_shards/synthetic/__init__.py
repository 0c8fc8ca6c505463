"""Sample data that the product ships: seeded aerial scenes with captions that state what they show.

>>> from data_shards.synthetic import SCENES, draw_scene
>>> draw_scene(seed=1, index=0).fine[0]
'four white storage tanks in a ring on bare soil, beside a river with two red ships.'
"""

from .scene import Scene, draw_scene, label_of, sketch_scene
from .scenes import SCENES

__all__ = ["SCENES", "Scene", "draw_scene", "label_of", "sketch_scene"]
