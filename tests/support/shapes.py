"""The shapes of tiny drafts."""

from dataclasses import replace

from dspark_megatron.shape import DraftShape

SHAPE = DraftShape(
    hidden_size=32,
    ffn_hidden_size=48,
    num_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    vocab_size=61,  # no multiple of 2 or 4: padded at TP 2 and 4
    rms_norm_eps=1e-6,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    max_position_embeddings=128,
    num_target_layers=4,
    target_layer_ids=(0, 2),
    mask_token_id=60,
    block_size=3,
    markov_rank=8,
    markov_head_type="vanilla",
    enable_confidence_head=True,
    confidence_head_with_markov=True,
)
"""Of drafts that are trained."""

GEMMA4 = replace(
    SHAPE,
    num_key_value_heads=1,
    head_dim=16,
    rope_parameters={
        "rope_type": "proportional",
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.25,
    },
    architecture="gemma4",
    shared_key_value=True,
    logit_softcapping=3.0,
)
"""As of a large Gemma-4 target: one key/value head, whose keys are the values."""

VANILLA = replace(
    SHAPE,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    vocab_size=33,
    max_position_embeddings=256,
    num_target_layers=6,
    target_layer_ids=(0, 2, 4),
    mask_token_id=32,
    markov_rank=5,
)
"""Of drafts that are written to folders."""


def with_every_head(shape: DraftShape) -> dict[str, DraftShape]:
    """A shape with each kind of Markov and confidence head."""
    plain_confidence = replace(shape, confidence_head_with_markov=False)
    return {
        "vanilla": shape,
        "gated": replace(shape, markov_head_type="gated"),
        "rnn": replace(shape, markov_head_type="rnn"),
        "confidence without Markov": plain_confidence,
        "no Markov head": replace(plain_confidence, markov_rank=0),
        "no confidence head": replace(plain_confidence, enable_confidence_head=False),
    }


SHAPES = with_every_head(SHAPE)
BEHIND_ANCHOR = with_every_head(replace(SHAPE, block_size=4, sample_from_anchor=False))
"""Of drafts whose slot 0 drafts nothing."""
FOLDER_SHAPES = with_every_head(VANILLA) | {"mha": replace(VANILLA, num_key_value_heads=4)}


def meta_of(shape):
    """What the `dspark.json` of a checkpoint says of such a draft, beside where the run stands."""
    known = {"format": 1, "shape": shape.to_dict(), "target_fingerprint": "", "num_anchors": 16}
    return known | {"initializer_range": 0.02, "confidence_head_alpha": 1.0}
