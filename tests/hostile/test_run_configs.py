"""A run's YAML and its overrides: strict, finite, bounded."""

import pytest

from dspark_megatron.config.loading import load_config
from support.hostile import make_strange, refused

GOOD = """
target: {path: somewhere}
data: {train_files: [chats.jsonl]}
train: {output_dir: runs/x, iterations: 10}
"""
BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)
TEXTS = [
    (b"\xff\xfea: 1", "must be text in UTF-8, and its byte 0 is not"),
    ("a: \u00e9".encode("latin-1"), "must be text in UTF-8"),
    (b"a: [", "is not valid YAML"),
    (b"a: \x01", "is not valid YAML"),
    (b"- 1\n- 2", "must hold sections (a YAML mapping), not a list"),
    (b"text", "must hold sections (a YAML mapping), not a str"),
    (b"a: 1\n---\nb: 2", "is not valid YAML"),
    (b"a: !!python/object/apply:os.system [echo]", "is not valid YAML"),
    (b"a: !!int x", "is not valid YAML"),
    (b"a: 2026-13-45", "is not valid YAML"),
    (b"a: !!bool x", "is not valid YAML"),
    (b"[[1]: 2]", "is not valid YAML"),
    (b"{[1, 2]: 3}", "is not valid YAML"),
    (b"a: " + b"[" * 20_000, "is nested too deeply to be read as YAML"),
    (b"a: " + b"{a: " * 20_000, "is nested too deeply to be read as YAML"),
    (BOMB.encode(), "has more than 100,000 values with its aliases written out"),
    (b"a: &a [*a]", "has an alias inside of what it stands for, in line 1"),
    (b"a: &a {b: {c: *a}}", "has an alias inside of what it stands for, in line 1"),
    (b"#" + b"x" * 2**20, "at most 1,048,576 are read"),
    (b"train: {seed: 1}\ndata: {}\ntrain: {seed: 2}", "gives the key 'train' twice, in line 1 and"),
    (b"train:\n  seed: 1\n  iterations: 2\n  seed: 3", "'seed' twice, in line 2 and in line 4"),
    (b"train: {seed: 1, 'seed': 2}", "gives the key 'seed' twice, in line 1 and in line 1"),
    (b"x: &x {a: 1}\ny: {<<: *x, <<: *x}", "gives the key '<<' twice, in line 2 and in line 2"),
    (b"a: [{b: 1,\n b: 2}]", "gives the key 'b' twice, in line 1 and in line 2"),
    (b"nobody: {}", "unknown config key nobody"),
    (b"1: {}", "unknown config key 1"),
    (b"train: {" + b"x" * 900 + b": 1}", "unknown config key train.xxx"),
    (b"train: 7", "train must be a section"),
    (b"train: [1]", "train must be a section"),
]


@pytest.mark.parametrize(("content", "fragment"), TEXTS)
def test_a_text_that_is_no_config(tmp_path, content, fragment):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    refused(lambda: load_config(path), fragment)


def test_merge_keys_and_aliases_may_be_used(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        GOOD.replace("train: {", "evaluate: &seeds {seed: 7}\ntrain: {<<: *seeds, seed: 8, ")
    )
    config = load_config(path)
    assert (config.evaluate.seed, config.train.seed) == (7, 8)


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("pipe", "it is a folder, pipe or device"),
        ("folder", "it is a folder, pipe or device"),
        ("dangling", "the link leads nowhere"),
        ("loop", "the link leads nowhere"),
    ],
)
def test_a_config_that_is_no_file(tmp_path, kind, fragment):
    make_strange(tmp_path / "run.yaml", kind)
    refused(lambda: load_config(tmp_path / "run.yaml"), fragment)


BILLION = "must be at most 1,000,000,000"
VALUES = [
    ("train.iterations=" + "1" + "0" * 30, BILLION),
    ("train.iterations=" + "9" * 5000, "is not valid YAML"),
    ("train.iterations=0x" + "f" * 5000, "must be at most 1,000,000,000"),
    ("train.iterations=-1", "must be > 0"),
    ("train.iterations=1.5", "must be of type int"),
    ("train.iterations=true", "must be of type int"),
    ("train.iterations=.inf", "must be of type int"),
    ("train.epochs=1e30", "must be at most 1,000,000"),
    ("train.epochs=.nan", "train.epochs (nan) must be a finite number"),
    ("train.epochs=1" + "0" * 400, "must be a finite number"),
    ("train.seed=1" + "0" * 30, "must be at most 9,223,372,036,854,775,807"),
    ("train.save_every=1" + "0" * 20, BILLION),
    ("train.micro_batch_size=1" + "0" * 20, BILLION),
    ("train.exit_duration_minutes=.inf", "must be a finite number"),
    ('train.output_dir="a\\0b"', "without null characters"),
    ("train.output_dir=" + "x" * 300, "has a part of 300 bytes between slashes"),
    ("train.output_dir=" + "x/" * 2500, "must have at most 4,000 letters"),
    ("train.output_dir=[a]", "must be of type str"),
    ("train.output_dir=2026-01-31 10:00:00", "must be of type str"),
    ("train.dtype=float31", "must be one of bfloat16, float32"),
    ("train.dtype=[" + "a," * 500 + "]", "must be one of bfloat16, float32"),
    ("model.num_layers=1000000", "model.num_layers (1000000) must be at most 1,000"),
    ("model.num_layers=0", "must be > 0"),
    ("model.block_size=1000000", "must be at most 1,000"),
    ("model.num_anchors=1" + "0" * 30, "must be at most 1,000,000"),
    ("model.markov_rank=1" + "0" * 9, "must be at most 1,000,000"),
    ("model.head_dim=1" + "0" * 9, "must be at most 100,000"),
    ("model.target_layer_ids=[1" + "0" * 20 + "]", BILLION),
    ("model.target_layer_ids={}", "must be of type list"),
    ("model.initializer_range=.inf", "must be a finite number"),
    ("model.rope_parameters=[1]", "must be of type dict"),
    ("optimizer.lr=.inf", "optimizer.lr (inf) must be a finite number"),
    ("optimizer.lr=.nan", "optimizer.lr (nan) must be a finite number"),
    ("optimizer.lr=1e999", "must be a finite number"),
    ("optimizer.lr=fast", "must be of type float"),
    ("optimizer.clip_grad=-.inf", "must be a finite number"),
    ("optimizer.weight_decay={}", "must be of type float"),
    ("loss.loss_decay_gamma=.nan", "must be a finite number"),
    ("loss.ce_loss_alpha=.inf", "must be a finite number"),
    ("data.weights=[.inf]", "data.weights[0] (inf) must be a finite number"),
    ("data.skip_bad_lines=.nan", "must be a finite number"),
    ("data.max_length=1" + "0" * 20, BILLION),
    ("data.train_files=x", "must be of type list"),
    ("data.template_date=2026-02-31", "is not valid YAML"),
    ("data.template_date=tomorrow", "must be a day such as"),
    ("parallel.tensor_parallel=1" + "0" * 9, "must be at most 100,000"),
    ("parallel.pipeline_parallel=1" + "0" * 20, BILLION),
    ("evaluate.temperature=.inf", "must be a finite number"),
    ("evaluate.max_new_tokens=1" + "0" * 20, BILLION),
    ("train.seed={a: 1, a: 2}", "gives the key 'a' twice"),
    ("train.seed=" + "[" * 20_000, "is nested too deeply"),
    ("train.seed=[", "is not valid YAML"),
    ("nothing", "must look like section.key=value"),
    ("=", "must look like section.key=value"),
]


@pytest.mark.parametrize(("override", "fragment"), VALUES, ids=[v[:40] for v, _ in VALUES])
def test_a_value_that_no_run_can_have(tmp_path, override, fragment):
    path = tmp_path / "run.yaml"
    path.write_text(GOOD)
    refused(lambda: load_config(path, [override]), fragment)
