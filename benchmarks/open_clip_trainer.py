"""open_clip's trainer as a program for ``python -c``, with a tiny model of its own: a peer in benchmarks and tests.

[sys.executable, "-c", TRAINER.format(model=str(path)), "--train-data", ...]      path: JSON of open_clip's model
"""

# open_clip wants webdataset up to 0.2.86, without the marks at the end of a shard that later versions send.
TRAINER = """
import functools, runpy, open_clip, webdataset.tariterators as tars
tars.tar_file_expander = functools.partial(tars.tar_file_expander, eof_value=None)
open_clip.add_model_config({model!r})
runpy.run_module("open_clip_train.main", run_name="__main__", alter_sys=True)
"""
