"""The temperatures that a calibration ends with: those fitted, where they are better than none."""

from dataclasses import dataclass, field

from torch import Tensor

from dspark_megatron.evaluation.confidence.calibration_gain import LEAST_PROMPTS, Gain, GainJudge
from dspark_megatron.evaluation.confidence.temperature_scaling import fit_temperatures


@dataclass
class Chosen:
    """1 stands where nothing was fitted, or the fitted one was not better beyond its noise."""

    temperatures: list[float]
    fitted: list[float]
    notes: list[str] = field(default_factory=list)
    """What was turned down, and why."""

    @property
    def verdict(self) -> str:
        """One line for people."""
        used = [slot for slot, t in enumerate(self.temperatures) if t != 1]
        if used:
            return f"temperatures other than 1 are used in slots {', '.join(map(str, used))}"
        if all(t == 1 for t in self.fitted):
            return "T = 1 is kept in all slots: none fits better"
        return "T = 1 is kept in all slots: no other temperature was better beyond its noise"


def choose_temperatures(
    logits: Tensor, labels: Tensor, grid: list[float], bins: int, judge: GainJudge
) -> Chosen:
    """Fit slot by slot on these rounds, [n, k] each, and keep what the judge of other rounds finds
    better; then all of them together, against none."""
    slots = logits.shape[1]
    chosen = Chosen([], [1.0] * slots)

    def is_kept(temperatures: list[float]) -> bool:
        slot, t = len(temperatures) - 1, temperatures[-1]
        chosen.fitted[slot] = t
        gain = judge.gain([*temperatures[:-1], 1.0], temperatures, first=slot)
        if gain is not None and gain.is_real:
            return True
        chosen.notes.append(f"slot {slot}: T = 1 is kept; the fitted {t:.3g} would {_why(gain)}")
        return False

    chosen.temperatures = fit_temperatures(logits, labels, grid, bins, is_kept)
    ones = [1.0] * slots
    if chosen.temperatures != ones:
        gain = judge.gain(ones, chosen.temperatures)
        if gain is None or not gain.is_real:
            chosen.notes.append(f"T = 1 is kept in all slots; together they would {_why(gain)}")
            chosen.temperatures = ones
    return chosen


def _why(gain: Gain | None) -> str:
    if gain is None:
        return f"have to be compared on at least {LEAST_PROMPTS} prompts held out"
    return f"{gain.describe()}, on the prompts held out"
