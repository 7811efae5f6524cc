"""The values of `loss.preset`: how the training code of other projects sets the loss section."""

from typing import Any

from dspark_megatron.config import LossConfig
from dspark_megatron.errors import require

LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "deepspec": {},
    "modelopt": {"anchor_rule": "token", "supervised_slots": "all", "normalization": "local"},
    "speculators": {
        "anchor_rule": "token",
        "supervised_slots": "all",
        "slot_mask": "input",
        "ce_labels": "target_argmax",
        "l1_loss_alpha": 0.0,
        "tvd_loss_alpha": 0.9,
        "normalization": "local_count",
    },
}
DISTANCES = ("l1_loss_alpha", "tvd_loss_alpha")
"""Two names of one term. If one of them is given, the other is 0."""


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config, with the preset's values for keys of the loss that are left out."""
    loss = raw.get("loss")
    if not isinstance(loss, dict):
        return raw
    defaults = _values(loss.get("preset"), raw)
    if any(name in loss for name in DISTANCES):
        defaults |= dict.fromkeys(DISTANCES, 0.0)
    return {**raw, "loss": {**defaults, **loss}}


def check_new_preset(
    raw: dict[str, Any], changes: dict[str, dict[str, Any]], merged: dict[str, Any]
) -> None:
    """ConfigError if an override of the preset would not change keys that the file gives. A saved
    config.yaml gives all keys, so it would change none."""
    new = changes.get("loss", {})
    if "preset" not in new:
        return
    preset = _values(new["preset"], merged)
    standing = {
        name: value
        for name, value in (raw.get("loss") or {}).items()
        if name not in new and value != preset.get(name, value)
    }
    require(
        not standing,
        f"loss.preset={new['preset']} does not reach keys that the file gives: "
        + ", ".join(f"loss.{name} ({value})" for name, value in standing.items())
        + "; take them out of the file, or override them too",
    )


def _values(preset: Any, raw: dict[str, Any]) -> dict[str, Any]:
    """A value for every key that any preset sets: this preset's for such a draft, or else the
    default."""
    own = LOSS_PRESETS.get(preset, {}) if isinstance(preset, str) else {}
    model = raw.get("model")
    if isinstance(model, dict) and model.get("sample_from_anchor") is False:
        own = {**own, "slot_mask": "label"}  # which stands at a slot's own position then
    names = {name for values in LOSS_PRESETS.values() for name in values}
    return {name: own.get(name, getattr(LossConfig(), name)) for name in sorted(names)}
