"""The values of `loss.preset`: how the training code of other projects sets the loss section."""

from dataclasses import asdict
from typing import Any

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import LossTerms, without_older_names
from dspark_megatron.errors import require

LOSS_PRESETS: dict[str, dict[str, Any]] = {
    "deepspec": {},
    "modelopt": {"anchor_rule": "token", "supervised_slots": "all", "normalization": "local"},
    "speculators": {
        "anchor_rule": "token",
        "supervised_slots": "all",
        "slot_mask": "input",
        "ce_labels": "target_argmax",
        "terms": {"ce": 0.1, "l1": 0.45},
        "normalization": "local_count",
    },
}


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config, with the preset's values for keys of the loss that are left out,
    and with `terms` for their older names."""
    loss = raw.get("loss")
    if not isinstance(loss, dict):
        return raw
    defaults = _values(loss.get("preset"), raw)
    return {**raw, "loss": {**defaults, **without_older_names(loss, defaults["terms"])}}


def with_terms(
    raw: dict[str, Any], changes: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sections of a file and of overrides, both with `terms` for their older names. Where an
    override changes a term of a file that gives none, the file gets those of the preset."""
    loss, new = (x.get("loss") for x in (raw, changes))
    if not isinstance(loss or {}, dict) or not isinstance(new or {}, dict):
        return raw, changes
    loss, new = loss or {}, without_older_names(new or {}, {})
    preset = new.get("preset", loss.get("preset"))
    base = _values(preset, raw)["terms"]
    loss = without_older_names(loss, base)
    if "terms" in new:
        loss = {**loss, "terms": loss.get("terms", base)}
    raw = {**raw, "loss": loss} if loss else raw
    return raw, ({**changes, "loss": new} if new else changes)


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
        if name not in new and _written_out(name, value) != preset.get(name, value)
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
    own = {name: _written_out(name, value) for name, value in own.items()}
    defaults = asdict(LossConfig())
    return {name: own.get(name, defaults[name]) for name in sorted(names)}


def _written_out(name: str, value: Any) -> Any:
    """Terms with the zeros of those that are left out; other values as they are."""
    is_terms = name == "terms" and isinstance(value, dict)
    return {**asdict(LossTerms()), **value} if is_terms else value
