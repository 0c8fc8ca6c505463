"""The configurations of finetune parse, and closed-paper.yaml holds the values of the authors' files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "finetune/configs"
COMMANDS = {"closed": "closed", "closed-paper": "closed", "prior": "prior", "prior-ucmerced": "prior"}


def resolved(name: str, command: str, *options: str) -> dict:
    """Returns what ``--print_config`` prints for a configuration."""
    line = [sys.executable, "-m", "finetune", command, "--config", str(CONFIGS / f"{name}.yaml"), *options]
    printed = subprocess.run([*line, "--print_config"], cwd=ROOT, capture_output=True, text=True, check=True)
    return yaml.safe_load(printed.stdout)


@pytest.mark.parametrize(("name", "command"), COMMANDS.items())
def test_a_configuration_parses_to_what_it_says(name: str, command: str) -> None:
    def assert_contains(found: object, said: object, key: str) -> None:
        if isinstance(said, dict):
            assert isinstance(found, dict), key
            for part, value in said.items():
                assert_contains(found[part], value, f"{key}.{part}")
        else:
            assert found == said, key

    assert_contains(resolved(name, command), yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()), name)


def test_the_papers_recipe_has_the_authors_values() -> None:
    """Retrieval_rsicd.yaml, Retrieval_rsitmd.yaml, optim.py and Retrieval.py of github.com/jaychempan/PIR."""
    config = resolved("closed-paper", "closed")
    optimizer, data, model = config["run"]["optimizer"], config["data"], config["model"]
    assert optimizer == {
        "lr": 6e-5, "betas": [0.9, 0.98], "eps": 1e-8, "weight_decay": 0.01, "layer_decay": 1.0,
        "schedule": "linear", "warmup": 0.1, "min_lr_share": 0.0, "clip_grad_norm": 0.0,
    }  # fmt: skip
    assert (config["run"]["epochs"], config["run"]["engine"]["global_batch"]) == (50, 2 * 128)
    assert config["run"]["engine"]["precision"] == "fp32"
    assert (data["captions"], data["scale"]) == ("all", 1.0)
    assert (data["hflip"], data["vflip"], data["rot90"]) == (True, False, False)
    assert data["randaugment"] == {"layers": 2, "magnitude": 7.0, "probability": 0.5}
    assert (model["belief"]["mode"], model["belief"]["k"], model["pae"]["spatial_layers"]) == ("hard", 40, 2)
    assert (model["pae"]["temporal_cycles"], model["text"]["context_length"], model["embed_dim"]) == (3, 47, 512)
    assert config["loss"]["lambda_cs"] == 1.0
    assert config["loss"]["shared_captions"] is True


def test_the_papers_recipe_selects_on_validation_and_not_on_the_test_set() -> None:
    config = resolved("closed-paper", "closed")
    assert (config["run"]["export"], config["run"]["checkpoint"]["best"]) == ("best", "mean_recall")
    assert config["evaluation"]["shards"] == "data/rsicd-val"
    assert config["test"]["shards"] == "data/rsicd-test"
