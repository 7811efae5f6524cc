"""The command that says what each engine reads, and the tables of engines themselves."""

import json

import convert_checkpoint
import pytest

from dspark_megatron.conversion.engines.table import ALL, VLLM
from dspark_megatron.conversion.engines.verdicts import ENGINES, problem_rules, warning_rules


def test_each_engine_is_told_with_its_version_and_each_of_its_rules(capsys):
    assert convert_checkpoint.main(["engines"]) == 0
    text = capsys.readouterr().out
    for engine in ENGINES:
        assert f"{engine.name} {engine.version}, from " in text
    for rule in (*problem_rules(True), *warning_rules(True)):
        if not any(e.gemma is None and e.name in rule.engines for e in ENGINES):
            assert f"{rule.fact}: {rule.line.replace('{}', '...')}" in text


def test_one_engine_as_json(capsys):
    assert convert_checkpoint.main(["engines", "--engine", "VLLM", "--json"]) == 0
    (record,) = json.loads(capsys.readouterr().out)["engines"]
    assert record["engine"] == VLLM and record["version"] == "0.33.0"
    assert record["keys"]["mask_token_id"][0] == "dflash_config.mask_token_id"
    assert record["keys"]["markov_head_type"] == ["not read"]
    assert record["defaults"]["enable_confidence_head"] is False
    rule = next(rule for rule in record["warnings"] if rule["fact"] == "rank 0")
    assert rule["read_in"] == "PR #49646"


def test_an_unknown_engine_is_one_sentence(capsys):
    assert convert_checkpoint.main(["engines", "--engine", "x"]) != 0
    said = capsys.readouterr()
    assert "--engine ('x') must be one of DeepSpec, ModelOpt, vLLM" in said.err + said.out


def test_engines_and_rules_name_each_other():
    names = [engine.name for engine in ENGINES]
    assert sorted(names) == sorted(ALL)
    for rule in (*problem_rules(True), *warning_rules(True)):
        assert rule.engines and set(rule.engines) <= set(names), rule


@pytest.mark.parametrize("name", ALL)
def test_a_rule_is_one_row_for_an_engine(name):
    for rules in (problem_rules(True), warning_rules(True)):
        facts = [rule.fact for rule in rules if name in rule.engines]
        assert len(facts) == len(set(facts))
