"""Whatever comes in: a value, or one sentence. Hypothesis draws the inputs, the same ones in each
run."""

import contextlib
import json

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dspark_megatron.bounded_text import parse_yaml
from dspark_megatron.config.loading import config_from_dict, load_config
from dspark_megatron.conversion.model_card import check_name
from dspark_megatron.data.chats.messages import chat_of
from dspark_megatron.data.files.jsonl import lines_of, parse_line
from dspark_megatron.errors import ConfigError
from dspark_megatron.storage.safetensors_folder import SafetensorsFolder
from dspark_megatron.storage.target_schema import RULES, check_schema

steady = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=8,
)
SECTIONS = "target model loss data parallel optimizer train evaluate".split()
KEYS = st.sampled_from("path num_layers lr iterations train_files seed dtype weights x".split())
refused_or = contextlib.suppress(ConfigError)


@steady
@given(st.dictionaries(st.sampled_from(SECTIONS), VALUES | st.dictionaries(KEYS, VALUES)))
def test_a_config_of_anything_is_read_or_refused(raw):
    with refused_or:
        config_from_dict(raw).validate()


@steady
@given(
    st.binary(max_size=200)
    | st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace"))
)
def test_any_bytes_are_a_config_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("config") / "run.yaml"
    path.write_bytes(content)
    with refused_or:
        load_config(path)


@steady
@given(VALUES)
def test_what_yaml_can_say_is_read_as_it_was(value):
    text = json.dumps(value, allow_nan=False) if _finite(value) else "1"
    with refused_or:  # for keys that YAML takes for one another
        assert parse_yaml(text, "it") is not Ellipsis


@steady
@given(st.dictionaries(st.sampled_from(sorted(RULES)), VALUES))
def test_a_targets_config_of_anything_passes_its_rules_or_is_refused(config):
    with refused_or:
        check_schema(config, "config.json")


@steady
@given(st.lists(st.binary(max_size=60), max_size=5))
def test_any_lines_are_objects_or_refused(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("data") / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    with refused_or:
        for number, line in lines_of(path):
            assert number >= 1
            with refused_or:
                assert isinstance(parse_line(line), dict)


MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "tool"]) | SCALARS,
        "content": VALUES,
        "tool_calls": VALUES,
        "reasoning_content": SCALARS,
    },
)


@steady
@given(
    st.fixed_dictionaries(
        {"messages": st.lists(MESSAGES, max_size=4) | VALUES},
        optional={"tools": VALUES, "system": SCALARS, "chat_template_kwargs": VALUES},
    )
)
def test_a_chat_of_anything_is_brought_into_one_spelling_or_refused(record):
    with refused_or:
        for message in chat_of(record).messages:
            assert isinstance(message["role"], str) and isinstance(message["content"], str)


@steady
@given(st.text(max_size=40))
def test_a_name_is_one_line_or_refused(name):
    with refused_or:
        check_name("it", name)
        assert len(name.splitlines()) == 1 and "\x1b" not in name


@steady
@given(
    st.dictionaries(
        st.text(max_size=9),
        VALUES
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "BF16", "I64", "X"]),
                "shape": st.lists(st.integers(-1, 2**63), max_size=3),
                "data_offsets": st.lists(st.integers(-1, 2**63), min_size=2, max_size=2),
            }
        ),
        max_size=3,
    ),
    st.binary(max_size=64),
)
def test_any_safetensors_header_is_read_or_refused(tmp_path_factory, header, data):
    folder = tmp_path_factory.mktemp("weights")
    text = json.dumps(header).encode()
    content = len(text).to_bytes(8, "little") + text + data
    (folder / "model.safetensors").write_bytes(content)
    with refused_or:
        files = SafetensorsFolder(folder)
        for name in files.files:
            files.shape(name)
            files.tensor(name)


def _finite(value):
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True
