"""Chat templates that read the clock: one day for a whole run, on all ranks and in stores."""

import json
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from dspark_megatron.config.loading import config_from_dict
from dspark_megatron.data.chats.answers import AnswerRules
from dspark_megatron.data.chats.messages import Chat
from dspark_megatron.data.chats.template import ChatTemplate, on_day, reads_clock
from dspark_megatron.data.prompts.chat_prompts import load_prompts
from dspark_megatron.errors import ConfigError
from dspark_megatron.run import states as target_cache
from dspark_megatron.run.check import check
from dspark_megatron.run.checkpoints.state import check_same_run
from dspark_megatron.run.data import load_run_data, sample_rules
from dspark_megatron.run.identity import fix_template_day, run_identity, template_day
from dspark_megatron.run.states import sample_facts
from dspark_megatron.storage.checkpoints.meta import FORMAT
from dspark_megatron.storage.checkpoints.metadata import META
from support.chat_lines import chat, write_jsonl
from support.samples import VOCAB_SIZE
from support.shapes import SHAPE
from support.tiny_target import tiny_config
from support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

DAY = {"template_date": "2026-03-05", "max_length": 256}
CLOCK = "{% set day = strftime_now('%d %B %Y') %}Today is {{ day }}.\n" + CHATML_TEMPLATE


def rendered(template, day="2026-03-05"):
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = template
    asked = Chat(chat("hi", "hello")["messages"], {})
    return ChatTemplate(tokenizer, rules=AnswerRules(template_date=day)).render_prompt(asked)


@pytest.mark.parametrize("directive", ["%Y-%m-%d", "%d %b %Y", "%B %-d, %Y", "%A %j", "%H:%M"])
def test_a_template_reads_the_day_that_it_is_given(directive):
    expected = date(2026, 3, 5).strftime(directive)
    said = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert rendered("{{ strftime_now('" + directive + "') }}" + said) == expected + "hihello"
    inside = (
        "{% macro today() %}{{ strftime_now(f) }}{% endmacro %}{% set f = '" + directive + "' %}"
    )
    nested = "{% for m in messages[:1] %}{{ today() if strftime_now is defined }}{% endfor %}"
    template = inside.replace("(f)", f"('{directive}')") + nested + said
    assert rendered(template) == expected + "hihello"


@pytest.mark.parametrize("template", [CLOCK, CHATML_TEMPLATE])
def test_every_rank_asks_for_the_day(tiny_run, template):
    """A rank whose template reads no clock would keep the others waiting."""
    plan = check(tiny_config(tiny_run), 1)
    plan.tokenizer.chat_template = template
    asked = []
    fix_template_day(plan, lambda choose: asked.append(choose()) or asked[-1])
    assert len(asked) == 1
    assert (plan.config.data.template_date is not None) == (template == CLOCK)


@pytest.mark.parametrize(
    "start", ["", "\n", "  ", "  {% set x = 1 %}", "{#- x -#}", "\n{%- set x = 1 %}"]
)
def test_nothing_else_of_a_template_changes(start):
    template = start + "\n" + CHATML_TEMPLATE
    assert on_day(template, "2026-03-05") == template
    read = template + "{% if 0 %}{{ strftime_now('%Y') }}{% endif %}"
    assert reads_clock(read) and on_day(read, "2026-03-05") != read
    assert rendered(read) == rendered(template)


def plan_of(folder, template=CLOCK, **data):
    """As much of a run's plan as the day is decided by."""
    tokenizer = tiny_tokenizer(VOCAB_SIZE)
    tokenizer.chat_template = template
    config = config_from_dict({"train": {"output_dir": str(folder)}, "data": data})
    return SimpleNamespace(config=config, tokenizer=tokenizer, found_tokenizer=tokenizer)


def fixed(plan, **where):
    fix_template_day(plan, lambda choose: choose(), **where)
    return template_day(plan)


def test_the_day_is_that_of_the_first_start(tmp_path):
    run, cache = tmp_path / "run", tmp_path / "cache"
    assert fixed(plan_of(run)) == date.today().isoformat()
    assert fixed(plan_of(run, template_date="2026-01-02")) == "2026-01-02"
    cache.mkdir()
    (cache / "manifest.json").write_text(json.dumps({"data": {"template_date": "2026-01-03"}}))
    cached = plan_of(run)
    cached.config.target.provider, cached.config.target.cache = "cache", str(cache)
    assert fixed(cached) == "2026-01-03"
    run.mkdir()
    first = plan_of(run, template_date="2026-01-04")
    (run / "config.yaml").write_text(first.config.to_yaml())
    assert fixed(plan_of(run)) == "2026-01-04"
    cached.config.data.template_date = None
    assert fixed(cached) == "2026-01-04"  # its checkpoints are of that day
    assert fixed(plan_of(run), stored=cache) == "2026-01-03"  # stored states that are gone on with
    newest = run / "checkpoints" / "iter_0000002"
    newest.mkdir(parents=True)
    (newest / "dspark.json").write_text('{"template_date": "2026-01-07"}')
    (newest.parent / "latest_checkpointed_iteration.txt").write_text("2")
    assert fixed(plan_of(run)) == "2026-01-07"
    (newest / "dspark.json").unlink()
    (run / "config.yaml").unlink()
    (run / "dspark.json").write_text('{"template_date": "2026-01-05"}')  # Megatron's loop
    assert fixed(plan_of(run)) == "2026-01-05"
    (run / "dspark.json").write_text("{")
    with pytest.raises(ConfigError, match="dspark.json cannot be read .* set data.template_date"):
        fixed(plan_of(run))


def test_the_main_ranks_day_is_everyones(tmp_path):
    plan = plan_of(tmp_path)
    fix_template_day(plan, lambda choose: "2026-01-06")
    assert template_day(plan) == "2026-01-06"


def test_other_templates_have_no_day(tmp_path):
    plan = plan_of(tmp_path, CHATML_TEMPLATE)
    assert fixed(plan) is None and plan.config.data.template_date is None


@pytest.mark.parametrize("day", ["5 March", "2026-3-5", "20260305", ""])
def test_a_day_that_is_none_is_refused(tiny_run, day):
    with pytest.raises(ConfigError, match="data.template_date .* such as 2026-01-31 or null"):
        tiny_config(tiny_run, data={"template_date": day})


def test_a_day_of_yaml_is_a_day(tiny_run):
    assert tiny_config(tiny_run, data={"template_date": date(2026, 3, 5)}).data.template_date


def test_a_run_of_another_day_is_refused_with_words_on_the_clock(tmp_path):
    def saved(**facts):
        known = {"iteration": 1, "consumed_samples": 1, "target_fingerprint": "", "num_anchors": 1}
        known |= {"shape": SHAPE.to_dict(), "initializer_range": 0.02, "confidence_head_alpha": 1.0}
        (tmp_path / META).write_text(json.dumps({"format": FORMAT, **known, **facts}))
        return tmp_path

    here = {"template_date": "2026-03-06", "data_fingerprint": "b"}
    run = saved(template_date="2026-03-05", data_fingerprint="a")
    with pytest.raises(
        ConfigError, match="reads the clock, .* set data.template_date to 2026-03-05."
    ):
        check_same_run(run, here)
    with pytest.raises(ConfigError, match="reads the clock, .* the day on which that was begun"):
        check_same_run(saved(data_fingerprint="a"), here)  # of a version that kept no day
    with pytest.raises(ConfigError, match="num_anchors: 1 there") as error:
        check_same_run(saved(data_fingerprint="b"), {**here, "num_anchors": 2})
    assert "clock" not in str(error.value)
    check_same_run(saved(data_fingerprint="b"), here)


def test_a_runs_description_and_its_caches_have_the_day(tiny_run):
    plan = check(tiny_config(tiny_run, data=DAY), 1)
    assert "template_date" not in run_identity(plan) and "template_date" not in sample_facts(plan)
    plan.tokenizer.chat_template = CLOCK
    assert run_identity(plan)["template_date"] == "2026-03-05"
    assert sample_facts(plan)["template_date"] == "2026-03-05"
    rules = sample_rules(plan.config).answers
    assert rules.template_date == "2026-03-05"


def test_stored_states_of_another_day_are_refused_with_words_on_the_clock(tiny_run):
    class Cache:
        path = Path("states")
        facts = {"target_fingerprint": "", "data": {"template_date": "2026-03-05"}}

        def keys(self):
            return []

        def shards(self):
            return {}

        def key(self, input_ids, loss_mask):
            return b"other"

    plan = check(tiny_config(tiny_run, data={**DAY, "template_date": "2026-03-06"}), 1)
    plan.tokenizer.chat_template = CLOCK
    data = load_run_data(plan, plan.config.data.train_files)
    runtime = SimpleNamespace(is_main=False, device=None, rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(target_cache, "open_stored_states", lambda plan: Cache())
        with pytest.raises(ConfigError, match="reads the clock, .*template_date to 2026-03-05"):
            target_cache.stored_states_of(plan, runtime, data)


def test_samples_of_a_run_have_its_day(tiny_run, tmp_path):
    plan = check(tiny_config(tiny_run, data=DAY), 1)
    plan.tokenizer.chat_template = CLOCK
    sample = load_run_data(plan, plan.config.data.train_files)[0]
    assert plan.tokenizer.decode(sample.input_ids).startswith("Today is 05 March 2026.")
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "hi"}])
    rules = AnswerRules(template_date="2026-03-05")
    [prompt] = load_prompts(prompts, plan.tokenizer, None, 999, rules)
    assert prompt.text.startswith("Today is 05 March 2026.")
