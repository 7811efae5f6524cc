"""The parts `terms` and `weighting` of the section `loss`: what a slot loses and weighs."""

import contextlib
import math
from dataclasses import dataclass, fields
from typing import Any, Literal

from dspark_megatron.config.rules import not_negative, shown
from dspark_megatron.errors import ConfigError, require

MOST_WEIGHT = 10**6
"""Of a term: far more than losses are weighed with, and far from what fp32 can hold."""
OLDER_NAMES = {
    "ce_loss_alpha": "ce",
    "l1_loss_alpha": "l1",
    "tvd_loss_alpha": "tvd",
    "kl_loss_alpha": "kl",
}
"""Keys of the loss section in older versions, which name a term each."""
SPECULATORS_NAMES = {
    "kl_div": "kl",
    "rkl": "reverse_kl",
    "jsd": "js",
    "tv": "tvd",
    "nla": "lk_alpha",
}
"""What the terms are called in speculators' `--loss-fn`."""


@dataclass(kw_only=True, frozen=True)
class LossTerms:
    """Weights of the terms of a slot's loss; a term that is left out weighs 0. p is the draft's
    distribution, q the target's, and the accept rate a = sum min(p, q). `tvd: x` is another way to
    write `l1: x/2`."""

    ce: float = 0.0
    """Cross entropy with the labels, in nats (paper Eq. 9)."""
    l1: float = 0.0
    """Raw L1 distance to the target's distribution, sum |p - q| in 0..2 (paper Eq. 10)."""
    kl: float = 0.0
    """Forward divergence KL(q || p) in nats."""
    reverse_kl: float = 0.0
    """Reverse divergence KL(p || q) in nats."""
    js: float = 0.0
    """Jensen-Shannon divergence of p and q in nats, at most log 2."""
    renyi_half: float = 0.0
    """Renyi divergence of order 1/2, -2 log sum sqrt(p q), in nats."""
    lk_alpha: float = 0.0
    """-log a, with a clamped to 1e-5 (arXiv 2602.23881)."""
    lk_hybrid: float = 0.0
    """l KL(q || p) + (1 - l) L1 / 2 with l = exp(-3 a), constant in the gradient (arXiv
    2602.23881)."""

    def validate(self) -> None:
        not_negative("loss.terms", self, *TERMS)
        for name, weight in self.by_name.items():
            require(
                weight <= MOST_WEIGHT,
                f"loss.terms.{name} ({weight}) must be at most {MOST_WEIGHT:,}",
            )

    @property
    def by_name(self) -> dict[str, float]:
        """The weight of each term."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def teach_something(self) -> bool:
        """Whether any term weighs anything."""
        return any(weight > 0 for weight in self.by_name.values())

    @property
    def compare_with_target(self) -> bool:
        """Whether any of them reads the target's distribution."""
        return any(weight > 0 for name, weight in self.by_name.items() if name != "ce")


TERMS = tuple(field.name for field in fields(LossTerms))


@dataclass(kw_only=True)
class LossWeighting:
    """What a supervised slot weighs in the terms."""

    name: Literal["decay", "dpace", "dpard"] = "decay"
    """`decay`: slot k weighs exp(-k / loss_decay_gamma). `dpace` (D-PACE, arXiv 2605.18810): with
    c_i = (1 - alpha) exp(-CE_i) + alpha and P_j = c_0 ... c_j, slot j weighs P_j + ... + P_last, so
    that what comes first and what is likely to be reached weighs most. `dpard`: the same with the
    accept rate a_i instead of exp(-CE_i). Both are constants in the gradient and know no decay."""
    alpha: float = 0.5
    """Smallest c of `dpace` and `dpard`, in (0, 1]. With 1 the weights depend on the slot alone."""

    def validate(self) -> None:
        require(
            0 < self.alpha <= 1,
            f"loss.weighting.alpha ({self.alpha}) must be in (0, 1]",
        )
        require(
            self.name != "decay" or self.alpha == LossWeighting.alpha,
            f"loss.weighting.alpha ({self.alpha}) is of dpace and dpard, and loss.weighting.name "
            "is decay, whose rate is loss.loss_decay_gamma; set the name too, or leave alpha out",
        )


def terms_of(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Terms as they are written, under their own names: `tvd: x` becomes `l1: x/2`."""
    for name in sorted(SPECULATORS_NAMES.keys() & values.keys()):
        raise ConfigError(f"{where}.{name} is called {where}.{SPECULATORS_NAMES[name]} here")
    if "tvd" not in values:
        return values
    require(
        "l1" not in values,
        f"{where} gives l1 ({values.get('l1')}) and tvd ({values['tvd']}), and they are one term "
        "(tvd is half of l1); give one of the two",
    )
    half = _weight(f"{where}.tvd", values["tvd"]) / 2
    return {
        ("l1" if name == "tvd" else name): half if name == "tvd" else value
        for name, value in values.items()
    }


def whole_terms(values: Any) -> Any:
    """A mapping of terms with 0 for those that it leaves out; any other value as it is."""
    if not isinstance(values, dict):
        return values
    return {**LossTerms().by_name, **terms_of(values, "loss.terms")}


def _weight(name: str, value: Any) -> float:
    """A weight as a file gives it, where YAML 1.1 reads 9e-1 as a text."""
    weight = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            weight = float(value)
    require(
        math.isfinite(weight) and weight >= 0,
        f"{name} ({shown(value)}) must be a finite number >= 0",
    )
    return weight


def without_older_names(loss: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """A loss section with `terms` instead of the keys of older versions. base: the terms that those
    keys change."""
    if loss.get("terms", 0) is None:  # left open in the file
        loss = {key: value for key, value in loss.items() if key != "terms"}
    older = {
        term: _weight(f"loss.{key}", loss[key]) for key, term in OLDER_NAMES.items() if key in loss
    }
    if not older:
        if isinstance(loss.get("terms"), dict):
            return {**loss, "terms": terms_of(loss["terms"], "loss.terms")}
        return loss
    for zero in ("tvd", "l1"):  # saved files of older versions have both, one of them 0
        if {"l1", "tvd"} <= older.keys() and older[zero] == 0:
            del older[zero]
    given = [f"loss.{key}" for key in OLDER_NAMES if key in loss]
    require(
        "terms" not in loss,
        f"{', '.join(given)} and loss.terms say the same; give loss.terms alone",
    )
    own = {key: value for key, value in loss.items() if key not in OLDER_NAMES}
    return {**own, "terms": {**base, **terms_of(older, "the loss section")}}
