"""The product's own sample data: seeded aerial scenes with captions that describe them.

>>> from priorclip.data_shards.synthetic import SCENES, draw_scene
>>> draw_scene(seed=1, index=10).fine[0]
'five blue umbrellas scattered around set in sand, next to the ocean and with trees behind the sand.'
>>> "beach" in SCENES
True
"""

from priorclip.data_shards.synthetic.scene import Scene, draw_scene, label_of, sketch_scene
from priorclip.data_shards.synthetic.scenes import SCENES

__all__ = ["SCENES", "Scene", "draw_scene", "label_of", "sketch_scene"]
