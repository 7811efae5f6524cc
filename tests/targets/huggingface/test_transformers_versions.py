"""An older Transformers is refused only for what it cannot do, before any weights are read."""

import pytest
import transformers

from dspark_megatron.errors import ConfigError
from dspark_megatron.targets.huggingface.split import TargetSplit, check_target_split

FAMILY = transformers.Qwen3Config(hidden_size=32, num_hidden_layers=1, vocab_size=64)
EXPERTS = transformers.Qwen3MoeConfig(
    hidden_size=32, num_hidden_layers=1, vocab_size=64, num_experts=4
)
TWO_WAYS = "can split a target in one way only, .*; install transformers>=5.20"
COPIES = "cannot load several copies of a split target, .*; install transformers>=5.23"


@pytest.mark.parametrize("version", ["5.17.0", "5.20.2", "5.23.0", "6.0.0.dev0"])
@pytest.mark.parametrize("split", [(1, 4), (4, 1), (1, 4, 4)])
def test_whole_targets_and_one_way_to_split_work_with_all(monkeypatch, version, split):
    monkeypatch.setattr(transformers, "__version__", version)
    check_target_split(FAMILY, TargetSplit(*split))


@pytest.mark.parametrize(
    "split, too_old, enough, message",
    [
        ((2, 2, 2), "5.19.0", "5.20.2", TWO_WAYS),
        ((1, 2, 2, 2), "5.19.0", "5.20.2", TWO_WAYS),
        ((2, 1, 1, 2), "5.19.0", "5.20.2", TWO_WAYS),
        ((2, 2), "5.22.2", "5.23.0", COPIES + r".* over all 4 ranks"),
        ((1, 4, 2), "5.22.2", "5.23.0", "here 2 of 2 ranks each .*; install transformers>=5.23"),
    ],
)
def test_the_refusal_says_which_version_to_install(monkeypatch, split, too_old, enough, message):
    monkeypatch.setattr(transformers, "__version__", too_old)
    with pytest.raises(ConfigError, match=message):
        check_target_split(EXPERTS, TargetSplit(*split))
    monkeypatch.setattr(transformers, "__version__", enough)
    check_target_split(EXPERTS, TargetSplit(*split))


def test_only_sizes_that_split_are_asked_for(monkeypatch):
    """Others are not known to every version."""
    asked = []
    monkeypatch.setattr(
        "dspark_megatron.targets.huggingface.split.DistributedConfig",
        lambda **sizes: asked.append(sizes),
    )
    TargetSplit(tp_size=2).distributed_config()
    TargetSplit(dp_size=4, shards=2).distributed_config()
    TargetSplit(2, 2, 2, 4).distributed_config()
    assert asked == [
        {"tp_size": 2},
        {"fsdp_size": 2, "dp_replicate_size": 2},
        {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    ]
    assert TargetSplit(dp_size=4).distributed_config() is None
