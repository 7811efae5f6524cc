"""Every preset of the loss trains, and so do the recipes, scaled down to a tiny target."""

import math

import pytest

from dspark_megatron.config.loading import config_from_dict, load_config, merged_sections
from dspark_megatron.config.objective.presets import LOSS_PRESETS
from support.paths import ROOT
from support.tiny_target import tiny_config
from support.training_runs import curve, run_training

STEPS = {"iterations": 6, "global_batch_size": 4, "micro_batch_size": 2}


def falling_losses(pool, config, folder):
    pool.run(run_training, world=1, tp=1, config=config)
    losses = [line["loss"] for line in curve(folder)]
    assert len(losses) == STEPS["iterations"] and all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    return losses


@pytest.mark.parametrize("name", LOSS_PRESETS)
def test_a_preset_trains(pool, tiny_run, tmp_path, name):
    train = {"output_dir": str(tmp_path), **STEPS}
    config = tiny_config(tiny_run, train=train, loss={"preset": name})
    falling_losses(pool, config, tmp_path)


@pytest.mark.parametrize("name", ["backbone", "dpace", "fine_tune"])
def test_a_recipe_trains_scaled_down(pool, tiny_run, unbroken, tmp_path, name):
    """What the tiny run sets lies over the recipe; the rest is the recipe's own."""
    recipe = load_config(ROOT / f"examples/recipes/{name}.yaml").to_dict()
    start = str(unbroken) if name == "fine_tune" else ""
    changes = {
        **tiny_run,
        "model": {**tiny_run["model"], "ffn_hidden_size": None},
        "optimizer": {"lr": 1e-3},
        "train": {
            **tiny_run["train"],
            **STEPS,
            "epochs": None,
            "initial_checkpoint": start,
            "output_dir": str(tmp_path),
        },
        "evaluate": {"every": None, "heldout_files": [], "prompt_files": []},
    }
    changes["data"] = {**tiny_run["data"], "weights": []}
    config = config_from_dict(merged_sections(recipe, changes))
    config.validate()
    falling_losses(pool, config, tmp_path)
