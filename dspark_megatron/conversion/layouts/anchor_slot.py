"""Whether slot 0 drafts, and what `block_size` counts, as keys of `config.json` and back.

A block of ours counts the anchor's slot. `hf` counts drafted tokens, as vLLM and SGLang do, and
where the anchor drafts nothing that is one fewer. NVIDIA's folders look the same and count the
anchor, so there a second number must say which it is.
"""

from typing import Any

from dspark_megatron.conversion.layouts.attention_config import lookup
from dspark_megatron.errors import require
from dspark_megatron.shape import DraftShape

Config = dict[str, Any]

TOKENS = ("num_speculative_tokens", "speculative_tokens")
PLACES = ("sample_from_anchor", "dflash_config.sample_from_anchor")
BONUS = ("dspark_bonus_anchor", "dflash_config.dspark_bonus_anchor")


def block_keys(shape: DraftShape) -> Config:
    keys = {"block_size": shape.num_draft_tokens, "sample_from_anchor": shape.sample_from_anchor}
    if not shape.sample_from_anchor:
        keys[TOKENS[0]] = shape.num_draft_tokens
    return keys


def block_of_config(config: Config) -> tuple[int, bool]:
    """Slots of a block, and whether slot 0 drafts. ConfigError where a key contradicts another or
    leaves it open."""
    samples, bonus = samples_from_anchor(config)
    size: int = config["block_size"]
    tokens = next((lookup(config, key) for key in TOKENS if config.get(key) is not None), None)
    if samples:
        said = any(lookup(config, key) is not None for key in (*PLACES, *BONUS))
        fits = type(tokens) is int and 0 < tokens <= size
        require(
            tokens is None or (fits if said else tokens == size),
            f"num_speculative_tokens ({tokens!r}) does not fit block_size ({size}) of a draft "
            f"whose slot 0 drafts{'' if said else ', as is meant without sample_from_anchor'}; "
            "add sample_from_anchor: true or false, as the draft was trained, or correct it",
        )
        return size, True
    require(
        tokens is not None or bonus is True,
        f"sample_from_anchor is false and block_size {size} can count drafted tokens (vLLM, "
        "SGLang) or the anchor's slot, too (NVIDIA, speculators); add num_speculative_tokens: "
        f"{size} or {size - 1}",
    )
    if tokens is None:
        tokens = size - 1
    require(
        type(tokens) is int and tokens > 0 and tokens in (size, size - 1),
        f"num_speculative_tokens ({tokens!r}) must be block_size ({size}) or one fewer where "
        "sample_from_anchor is false; correct one",
    )
    return tokens + 1, False


def samples_from_anchor(config: Config) -> tuple[bool, bool | None]:
    """With `dspark_bonus_anchor`, which says the opposite."""
    said = {key: lookup(config, key) for key in (*PLACES, *BONUS)}
    given = {key: value for key, value in said.items() if value is not None}
    for key, value in given.items():
        require(type(value) is bool, f"{key} must be true or false, is {value!r}")
    values = {value != (key in BONUS) for key, value in given.items()}
    words = ", ".join(f"{key} {value}".lower() for key, value in given.items())
    require(
        len(values) < 2,
        f"config.json says differently whether slot 0 drafts a token: {words} (the one is the "
        "opposite of the other); correct one",
    )
    bonus = next((given[key] for key in BONUS if key in given), None)
    return (values or {True}).pop(), bonus


def judged_by_tokens(block_size: Any, proposal: Any) -> bool:
    """`sample_from_anchor` of a speculators folder that does not say it, whose readers' defaults
    differ."""
    tokens = proposal.get("speculative_tokens") if isinstance(proposal, dict) else None
    add = "add sample_from_anchor: true or false, as the draft was trained"
    require(
        type(block_size) is int and type(tokens) is int and tokens in (block_size, block_size - 1),
        "config.json of this speculators draft has no sample_from_anchor, and it does not follow "
        f"from block_size ({block_size!r}) and speculators_config.proposal_methods[0]."
        f"speculative_tokens ({tokens!r}), which must be equal (true) or one fewer (false); {add}",
    )
    return tokens == block_size
