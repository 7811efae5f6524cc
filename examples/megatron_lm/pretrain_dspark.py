"""Train a DSpark drafter in Megatron-LM's loop, in the place of `pretrain_gpt.py`.

The arguments are Megatron's and a group of `--dspark-*`; docs/megatron_lm.md has a launch script.
Needs a GPU, as `pretrain()` does; not run on one yet.
"""

from dspark_megatron.megatron_lm import (
    add_dspark_args,
    datasets_provider,
    forward_step,
    launch_pretrain,
    model_provider,
)

if __name__ == "__main__":
    launch_pretrain(
        datasets_provider=datasets_provider,
        model_provider=model_provider,
        forward_step=forward_step,
        extra_args_provider=add_dspark_args,
    )
