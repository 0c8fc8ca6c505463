"""Makes ``v0.1`` and ``expected.json`` with the code of version 0.1, commit d16022c.

    git worktree add ../old d16022c
    python tests/stored/make.py ../old

``make`` lists the commands. They run in the folder ``v0.1``, so each configuration names its files by relative paths.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

from trials import WRITTEN_STEPS, Place, resumed, used

HERE = Path(__file__).resolve().parent
STORED, ELSEWHERE = HERE / "v0.1", "/elsewhere"

PACK = ["data_shards", "pack", "--source", "synthetic", "--size", 64, "--workers", 1, "--shard-size", 12]
SMALL_RESNET = json.dumps({"channels": [8, 16, 16, 16], "stem_width": 8})
SMALL_VIT = json.dumps({"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3})
SMALL_BERT = json.dumps({
    "model_type": "bert", "vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 24, "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.0,
})  # fmt: skip
RUN = ["--data.shards", "shards/train", "--evaluation.shards", "shards/held-out", "--data.workers", 0,
       "--data.image_size", 32, "--data.scale", 0.9, "--run.log_every", 20, "--run.evaluate_every", 20,
       "--run.progress", "false", "--run.deterministic", "true", "--run.engine.global_batch", 8,
       "--run.engine.threads", 1, "--run.engine.timeout_minutes", 3, "--run.checkpoint.keep", 1,
       "--run.checkpoint.best", "null", "--run.optimizer.lr", "3e-3",
       "--run.optimizer.min_lr_share", 0.2]  # fmt: skip
TOWERS = ["--model.embed_dim", 32, "--model.vision.image_size", 32, "--model.prior.image_size", 32,
          "--model.prior.weights", "prior/export", "--model.prior.kwargs", SMALL_RESNET, "--tokenizer", "tokenizer",
          "--model.text.context_length", 20, "--model.text.config", SMALL_BERT]  # fmt: skip


def make(place: Place) -> None:
    """The files of version 0.1."""
    run, run_on_two_ranks = place.run, place.run_on_two_ranks
    run(*PACK, "--count", 24, "--output", "shards/train")
    run(*PACK, "--count", 12, "--first-index", 24, "--output", "shards/held-out")
    run("data_shards", "tokenizer", "--shards", "shards/train", "--output", "tokenizer", "--vocab-size", 320,
        "--context-length", 20)  # fmt: skip
    run("finetune", "prior", *RUN, "--run.dir", "prior", "--run.max_steps", 3, "--run.engine.zero", 0,
        "--backbone.name", "resnet10t", "--backbone.image_size", 32, "--backbone.kwargs", SMALL_RESNET)  # fmt: skip
    run_on_two_ranks("pretrain", *RUN, *TOWERS, "--run.dir", "run", "--preset", "priorclip-tiny", "--run.epochs", 60,
                     "--run.max_steps", WRITTEN_STEPS, "--run.engine.zero", 2, "--run.average.decay", 0.9,
                     "--loss.lambda_cs", 0.5, "--model.vision.kwargs", SMALL_RESNET,
                     "--model.fusion.width", 32)  # fmt: skip
    run("finetune", "instruct", *RUN, "--run.dir", "instruct", "--init_from", "run/export", "--run.max_steps", 1,
        "--lora.rank", 2)  # fmt: skip
    run("finetune", "closed", *RUN, *TOWERS, "--run.dir", "closed", "--preset", "prioritr-tiny", "--run.max_steps", 120,
        "--model.vision.name", "vit_tiny_patch16_224", "--model.vision.kwargs", SMALL_VIT)  # fmt: skip
    run("retrieval", "index", "--model", "run/export", "--data", "shards/train", "--output", "index")


def tidy(place: Place) -> None:
    """Removes files that no command reads again. Replaces the names of folders of this machine by ELSEWHERE."""
    for name in ("prior", "instruct", "closed"):
        shutil.rmtree(place.folder / name / "checkpoints")
        shutil.rmtree(place.folder / name / "tokenizer", ignore_errors=True)
    shutil.rmtree(place.folder / "instruct" / "export")
    for path in [*place.folder.rglob("tensorboard"), *place.folder.rglob("__pycache__")]:
        shutil.rmtree(path)
    for path in [*place.folder.rglob(".lock"), *(place.folder / "prior").glob("confusion.*")]:
        path.unlink()
    for path in [*place.folder.rglob("*.json"), *place.folder.rglob("*.jsonl"), *place.folder.rglob("*.yaml")]:
        if "checkpoints" not in path.parts and "shards" not in path.parts:
            text = path.read_text().replace(str(place.folder), ELSEWHERE).replace(str(place.code), ELSEWHERE)
            path.write_text(text)


def main(code: Path) -> None:
    """Makes the files, then asks the same code what tests/test_stored.py asks today's code."""
    shutil.rmtree(STORED, ignore_errors=True)
    STORED.mkdir()
    place = Place(code, STORED)
    make(place)
    tidy(place)
    with tempfile.TemporaryDirectory() as scratch:
        copies = {name: place.copy(Path(scratch) / name) for name in ("two", "one", "rest")}
        expected = {
            "two_ranks": resumed(copies["two"], 2),
            "one_rank": resumed(copies["one"], 1),
            **used(copies["rest"]),
        }
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
