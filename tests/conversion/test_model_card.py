"""What the README of an export says of the draft's mathematics."""

from dataclasses import replace

from dspark_megatron.conversion.layouts.hf_config import DraftDescription
from dspark_megatron.conversion.model_card import model_card
from support.shapes import VANILLA


def card(**changes):
    rest = dict(layout="hf", target="org/t", folder="d", engines=set(), history={})
    description = DraftDescription(shape=replace(VANILLA, **changes))
    return model_card(description, **rest, with_temperatures=False)


def test_the_card_says_what_is_done_to_the_base_logits():
    said = "Its base logits are `30 * tanh(0.5 * lm_head(x) / 30)`, before the Markov bias is added"
    assert said in card(logit_scale=0.5, logit_softcapping=30.0)
    assert "base logits" not in card()
