"""A tiny run as Megatron's command line, and what our loop's config must say for the same steps."""

import json
from pathlib import Path

OPTIMIZER = {"adam_eps": 1e-3, "warmup_ratio": 0.0, "min_lr_ratio": 1.0}
"""Of our config. Constant, since Megatron's schedule of the learning rate is one step behind ours;
and Adam would make a whole step of the rounding of a gradient that is nearly 0."""
TRAIN = {"micro_batch_size": 2, "global_batch_size": 8}


def command_line(settings, save, *more, iterations, save_interval=2, tp=1):
    """Of a launch script: Megatron's arguments and the draft's. settings: `tiny_settings()`."""
    model, target = settings["model"], Path(settings["target"]["path"])
    of_target = json.loads((target / "config.json").read_text(encoding="utf-8"))
    architecture = {
        "--num-layers": of_target["num_hidden_layers"],
        "--hidden-size": of_target["hidden_size"],
        "--num-attention-heads": of_target["num_attention_heads"],
        "--max-position-embeddings": of_target["max_position_embeddings"],
    }
    return [
        *("--tokenizer-model", str(target)),
        *("--data-path", *settings["data"]["train_files"]),
        *(str(part) for pair in architecture.items() for part in pair),
        *("--seq-length", str(settings["data"]["max_length"])),
        *("--micro-batch-size", str(TRAIN["micro_batch_size"])),
        *("--global-batch-size", str(TRAIN["global_batch_size"])),
        *("--train-iters", str(iterations), "--lr", str(settings["optimizer"]["lr"])),
        *("--lr-decay-style", "constant"),
        *("--adam-eps", "1e-3", "--weight-decay", "0", "--eval-iters", "0"),
        *("--eval-interval", "1000"),
        *("--adam-beta2", "0.999", "--clip-grad", "1.0", "--seed", "1234"),
        *("--transformer-impl", "local", "--disable-gloo-process-groups"),
        *("--no-gradient-accumulation-fusion", "--use-distributed-optimizer"),
        *("--tensor-model-parallel-size", str(tp), "--calculate-per-token-loss"),
        *("--save", str(save), "--save-interval", str(save_interval), "--log-interval", "1"),
        *("--dspark-num-layers", str(model["num_layers"])),
        *("--dspark-block-size", str(model["block_size"])),
        *("--dspark-num-anchors", str(model["num_anchors"])),
        *("--dspark-target-layer-ids", *map(str, model["target_layer_ids"])),
        *("--dspark-mask-token-id", str(model["mask_token_id"])),
        *("--dspark-markov-rank", str(model["markov_rank"])),
        *("--dspark-loss-chunk-rows", str(settings["loss"]["chunk_rows"])),
        "--no-dspark-data-show-sample",
        *more,
    ]
