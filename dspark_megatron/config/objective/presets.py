"""The values of `loss.preset`: how the training code of other projects sets the loss section."""

from dataclasses import asdict
from typing import Any

from dspark_megatron.config import LossConfig
from dspark_megatron.config.objective.terms import LossTerms, LossWeighting, without_older_names
from dspark_megatron.errors import require

_SPECULATORS = {
    "anchor_rule": "token",  # models/dflash/utils.py: select_anchors
    "supervised_slots": "all",  # models/dflash/core.py: the mask at a slot's input, and no more
    "slot_mask": "input",
    "ce_labels": "target_argmax",  # losses/fused.py: its cross entropy knows no other labels
    "normalization": "local_count",  # losses/utils.py: loss_function
}
LOSS_PRESETS: dict[str, dict[str, Any]] = {
    # DeepSpec afdfa7c, the code of the paper's checkpoints: what LossConfig has.
    "deepspec": {},
    # ModelOpt 0.47.0, torch/speculative/plugins/hf_dspark.py: _compute_dspark_loss.
    "modelopt": {"anchor_rule": "token", "supervised_slots": "all", "normalization": "local"},
    # SpecForge 0.2.0, OnlineDSparkModel in algorithms/common/dflash_family_model.py, with
    # config/schema.py's defaults: without decay unless training.loss_decay_gamma is given.
    "specforge": {"loss_decay_gamma": None, "normalization": "deepspec"},
    # speculators 0.9.0 with `--loss-fn '{"ce": 0.1, "tv": 0.9}'`, as the cards of RedHat's drafts.
    "speculators": {**_SPECULATORS, "terms": {"ce": 0.1, "l1": 0.45}},
    # speculators 0.9.0 as it comes, train/config/schema.py: `--loss-fn kl_div`, fixed decay.
    "speculators_kl": {**_SPECULATORS, "terms": {"kl": 1.0}},
    # D-PACE (arXiv 2605.18810), whose actor is the cross entropy with the data's tokens, on the
    # paper's slots. The divisor is the number of supervised slots, as in speculators 0.9.0, which
    # also leaves the confidence head at the fixed decay (models/dspark/metrics.py).
    "dpace": {"terms": {"ce": 1.0}, "weighting": {"name": "dpace", "alpha": 0.5}},
    # D-PARD, SpecForge pull request 827 and speculators 1078, neither of them merged: Renyi-1/2
    # and the confidence head's loss by reach, over one number of samples or blocks.
    "dpard": {
        "terms": {"renyi_half": 1.0},
        "weighting": {"name": "dpard", "alpha": 0.5},
        "confidence_weights": "reach",
        "normalization": "global_samples",
    },
}
_PARTS = {"terms": LossTerms, "weighting": LossWeighting}


def with_preset(raw: dict[str, Any]) -> dict[str, Any]:
    """The sections of a config, with the preset's values for keys of the loss that are left out,
    and with `terms` for their older names. `terms` is a whole set, `weighting` goes by key."""
    loss = raw.get("loss")
    if not isinstance(loss, dict):
        return raw
    defaults = _values(loss.get("preset"), raw)
    loss = without_older_names(loss, defaults["terms"])
    weighting = loss.get("weighting")
    weighting = {} if weighting is None else weighting
    if isinstance(weighting, dict):
        loss = {**loss, "weighting": {**defaults["weighting"], **weighting}}
    return {**raw, "loss": {**defaults, **loss}}


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
    preset, given = _flat(_values(new["preset"], merged)), _flat(new)
    file = dict(raw.get("loss") or {})
    if "terms" in file:
        file["terms"] = _written_out("terms", file["terms"])
    standing = {
        name: value
        for name, value in _flat(file).items()
        if name not in given and value != preset.get(name, value)
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
    """A part with the defaults of the keys that are left out; other values as they are."""
    is_part = name in _PARTS and isinstance(value, dict)
    return {**asdict(_PARTS[name]()), **value} if is_part else value


def _flat(loss: dict[str, Any]) -> dict[str, Any]:
    """The keys of a loss section, those of its parts as `part.key`."""
    flat: dict[str, Any] = {}
    for name, value in loss.items():
        inner = value if name in _PARTS and isinstance(value, dict) else None
        flat |= {name: value} if inner is None else {f"{name}.{k}": v for k, v in inner.items()}
    return flat
