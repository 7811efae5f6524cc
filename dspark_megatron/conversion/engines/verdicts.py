"""Which engines load a folder with a DSpark draft, each as it would read the folder, and why not: a
verdict is a reading of loaders, by the tables in `table.py`."""

from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.engines.facts import facts
from dspark_megatron.conversion.engines.reading import Reading, resolve, tensor_problems, unfolded
from dspark_megatron.conversion.engines.table import ENGINES, HF, PROBLEMS, WARNINGS, Engine


@dataclass(frozen=True)
class Verdict:
    engine: str
    problems: tuple[str, ...]
    """Why it does not load, or would run wrongly without saying so; empty: it loads."""
    warnings: tuple[str, ...]
    """It loads, but the user should know."""

    @property
    def loads(self) -> bool:
        return not self.problems


def engine_verdicts(
    config: dict[str, Any],
    tensors: dict[str, tuple[int, ...]],
    *,
    folder_name: str = "",
    target_config: Any = None,
) -> list[Verdict]:
    """A verdict for each engine on a raw `config.json` and the raw names and shapes of tensors.

    target_config: the target's Transformers `PretrainedConfig`; without it, rules that compare the
    draft with its target say nothing. A bad folder gives problems, never an exception.
    """
    target = target_config.get_text_config() if target_config is not None else None
    return [_verdict(engine, config, tensors, folder_name, target) for engine in ENGINES]


def _verdict(
    engine: Engine, raw: dict[str, Any], tensors: Any, folder_name: str, target: Any
) -> Verdict:
    speculators = "speculators_config" in raw and "model_type" not in raw
    if speculators and not engine.speculators_ids:
        return Verdict(engine.name, (f"does not read the speculators format; {HF}",), ())
    config = unfolded(engine, raw, speculators)
    values, lines = resolve(engine, config)
    reading = Reading(engine, config, values, tensors, folder_name, target, speculators)
    found = facts(reading)
    problems, warnings = (
        [line.format(found[x]) for names, x, line in rules if engine.name in names and found[x]]
        for rules in (PROBLEMS, WARNINGS)
    )
    return Verdict(engine.name, (*lines, *problems, *tensor_problems(reading)), tuple(warnings))
