"""Which engines load a folder with a DSpark draft, each as it would read the folder, and why not: a
verdict is a reading of loaders, by the rows of `servers.py` and `local.py` and the rules."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dspark_megatron.conversion.engines.facts import facts
from dspark_megatron.conversion.engines.local import LOCAL
from dspark_megatron.conversion.engines.reading import (
    Reading,
    renamed,
    resolve,
    tensor_problems,
    unfolded,
)
from dspark_megatron.conversion.engines.rules import PROBLEMS, WARNINGS, Rule
from dspark_megatron.conversion.engines.servers import SERVERS
from dspark_megatron.conversion.engines.table import GEMMA, HF, Engine
from dspark_megatron.conversion.engines.variant_rules import (
    GEMMA_PROBLEMS,
    GEMMA_WARNINGS,
    VARIANT_PROBLEMS,
    VARIANT_WARNINGS,
)

ENGINES = (*SERVERS, *LOCAL)


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


def problem_rules(gemma: bool) -> tuple[Rule, ...]:
    return (*PROBLEMS, *VARIANT_PROBLEMS, *(GEMMA_PROBLEMS if gemma else ()))


def warning_rules(gemma: bool) -> tuple[Rule, ...]:
    return (*WARNINGS, *VARIANT_WARNINGS, *(GEMMA_WARNINGS if gemma else ()))


def _verdict(
    engine: Engine, raw: dict[str, Any], tensors: Any, folder_name: str, target: Any
) -> Verdict:
    speculators = "speculators_config" in raw and "model_type" not in raw
    if speculators and not engine.speculators_ids:
        return Verdict(engine.name, (f"does not read the speculators format; {HF}",), ())
    gemma = raw.get("architectures") == [GEMMA]
    if gemma and engine.gemma is None:
        return Verdict(engine.name, ("has no Gemma-4 drafts",), ())
    engine = dataclasses.replace(engine, **(engine.gemma or {})) if gemma else engine
    config, tensors = unfolded(engine, raw, speculators), renamed(engine, tensors)
    values, lines = resolve(engine, config, tensors)
    reading = Reading(engine, config, values, tensors, folder_name, target, speculators, gemma)
    found = facts(reading)
    problems, warnings = (
        [rule.line.format(found[rule.fact]) for rule in rules if _holds(rule, engine, found)]
        for rules in (problem_rules(gemma), warning_rules(gemma))
    )
    return Verdict(engine.name, (*lines, *problems, *tensor_problems(reading)), tuple(warnings))


def _holds(rule: Rule, engine: Engine, found: dict[str, Any]) -> bool:
    return engine.name in rule.engines and bool(found[rule.fact])
