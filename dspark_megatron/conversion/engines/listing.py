"""What is known of each engine, in words: its version, where it reads each key, what it takes for
an absent one, which tensors it leaves alone, and its rules."""

from collections.abc import Iterator
from typing import Any

from dspark_megatron.conversion.engines.reading import KEYS
from dspark_megatron.conversion.engines.table import AttentionKeys, Engine
from dspark_megatron.conversion.engines.verdicts import ENGINES, problem_rules, warning_rules
from dspark_megatron.errors import require

NOT_READ = "not read"


def find_engines(name: str | None) -> list[Engine]:
    """All of them for None. ConfigError for a name that none has."""
    found = [e for e in ENGINES if name is None or e.name.lower() == name.lower()]
    names = ", ".join(engine.name for engine in ENGINES)
    require(bool(found), f"--engine ({name!r}) must be one of {names}")
    return found


def engine_record(engine: Engine) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "engine": engine.name,
        "version": engine.version,
        "source": engine.source,
        "architectures": list(engine.architectures),
        "keys": {key: _places(engine, key) for key in KEYS},
        "defaults": engine.defaults,
        "attention": _said(engine.attention),
        "logit_scale": list(engine.logit_scale),
        "final_logit_softcapping": list(engine.softcap),
        "speculators": engine.speculators_ids is not None,
        "gemma4": engine.gemma is not None,
        "tensors": {
            "may be absent": engine.optional,
            "left alone": engine.skips,
            "passed over in silence": engine.silent,
            "other names": engine.renames,
        },
        "problems": _rules(engine, problem_rules(engine.gemma is not None)),
        "warnings": _rules(engine, warning_rules(engine.gemma is not None)),
    }


def engine_lines(engine: Engine) -> Iterator[str]:
    """For people."""
    record = engine_record(engine)
    yield f"{engine.name} {engine.version}, from {engine.source}"
    yield f"  architectures: {', '.join(engine.architectures) or 'not looked at'}"
    yield "  keys, the first place wins, and what stands for an absent one:"
    for key, places in record["keys"].items():
        absent = f" (else {engine.defaults[key]})" if key in engine.defaults else ""
        yield f"    {key}: {', '.join(places)}{absent}"
    for what, places in record["attention"].items():
        yield f"    {what}: {places}"
    for what in ("logit_scale", "final_logit_softcapping"):
        yield f"    {what}: {', '.join(record[what]) or NOT_READ}"
    for what in ("speculators", "gemma4"):
        yield f"  {what}: {'read' if record[what] else NOT_READ}"
    for what, pattern in record["tensors"].items():
        yield f"  tensors {what}: {pattern if pattern not in ('$^', {}) else 'none'}"
    for kind in ("problems", "warnings"):
        yield f"  {kind}:"
        for rule in record[kind]:
            yield f"    {rule['fact']}: {rule['line']} [{rule['read_in']}]"


def _places(engine: Engine, key: str) -> list[str]:
    if engine.by_tensors and key.startswith(("markov_", "enable_", "confidence_")):
        return ["the tensors"]
    lifted = [f"dflash_config.{key}"] if key in engine.lifts else []
    return [*engine.places.get(key, (key,)), *lifted] or [NOT_READ]


def _said(keys: AttentionKeys) -> dict[str, str]:
    """Window, causality and sink."""
    layers = "layers that layer_types calls sliding" if keys.per_layer else "all layers"
    swa = ", all where only dflash_config.use_swa says so" if keys.use_swa else ""
    switch = f", if one of {', '.join(keys.switches)} is set" if keys.switches else ""
    default = "as the layer slides" if keys.sliding_is_causal else "no"
    return {
        "window": f"{', '.join(keys.width)}: {layers}{swa}{switch}" if keys.width else NOT_READ,
        "causal": f"{', '.join(keys.causal) or NOT_READ} (else {default})",
        "sink": ", ".join(keys.sink) or NOT_READ,
    }


def _rules(engine: Engine, rules: Any) -> list[dict[str, str]]:
    return [
        {
            "fact": rule.fact,
            "line": rule.line.replace("{}", "..."),
            "read_in": rule.read_in or engine.version,
        }
        for rule in rules
        if engine.name in rule.engines
    ]
