"""Ranks that differ are named, with what differs, before they would wait for each other."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dspark_megatron.config.loading import PARTS
from dspark_megatron.data.prompts.chat_prompts import Prompt
from dspark_megatron.errors import ConfigError
from dspark_megatron.run.ranks import facts as rank_facts
from dspark_megatron.run.ranks import file_pieces
from dspark_megatron.run.ranks.agreement import RankFacts, agree_at_launch, disagreement
from dspark_megatron.run.ranks.runtime import Launch
from support.tiny_target import make_chats, tiny_config
from support.training_runs import train_in_own_folder


def ranks(*values, hosts=None, field="train.seed"):
    hosts = hosts or ["a"] * len(values)
    return [RankFacts(i, h, {field: v}) for i, (v, h) in enumerate(zip(values, hosts, strict=True))]


def test_ranks_are_named_by_host_with_both_values():
    found = disagreement(ranks("1", "1", "2", "2", "1", hosts=["a", "a", "b", "b", "c"]))
    assert "train.seed is 1 on ranks 0-1 (a), rank 4 (c) and 2 on ranks 2-3 (b). Start" in found
    assert disagreement(ranks("1", "1", "1")) == ""


def test_long_values_are_shown_where_they_differ():
    long = "x" * 500
    found = disagreement(ranks(f"{long} one {long}", f"{long} two {long}"))
    assert " one " in found and " two " in found and len(found) < 500


def test_many_differences_are_counted():
    facts = [{f"field {i}": f"{rank}" for i in range(12)} for rank in range(2)]
    found = disagreement([RankFacts(rank, "a", some) for rank, some in enumerate(facts)])
    assert "field 7 is" in found and "field 8" not in found and "; 4 more. Start" in found


def test_what_only_some_ranks_have_is_compared_among_them():
    facts = [{"of 0": "x"}, {"of 1": "y"}, {"of 0": "x"}, {"of 1": "z"}]
    found = disagreement([RankFacts(rank, "a", some) for rank, some in enumerate(facts)])
    assert "of 1 is y on rank 1 (a) and z on rank 3 (a)" in found and "of 0" not in found


def launched(facts, times=1):
    """What becomes of ranks that compare these facts as they start, one thread each."""
    store, results = dist.HashStore(), {}

    def start(rank):
        job = Launch(rank, len(facts), 0, store, store)
        try:
            for _ in range(times):
                agree_at_launch(job, facts[rank])
            results[rank] = ""
        except ConfigError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[rank] for rank in range(len(facts))]


def test_ranks_compare_at_launch_without_process_groups():
    assert launched([{"a": "1"}] * 3, times=2) == [""] * 3
    said = launched([{"a": "1"}, {"a": "1"}, {"a": "2"}])
    assert len(set(said)) == 1 and "a is 1 on ranks 0-1" in said[0] and "2 on rank 2" in said[0]


def test_a_launch_compares_settings_versions_code_and_environment(tiny_run, monkeypatch, tmp_path):
    config = tiny_config(tiny_run)
    before = rank_facts.launch_facts(config, command="train")
    assert {"the version of torch", "the code of dspark_megatron/ops"} <= before.keys()
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    monkeypatch.setenv("NVTE_FLASH_ATTN", "0")
    monkeypatch.setitem(rank_facts.importlib.metadata.__dict__, "version", lambda name: "0.0")
    package = tmp_path / "dspark_megatron"
    shutil.copytree(Path(rank_facts.dspark_megatron.__file__).parent, package)
    (package / "ops" / "rope.py").write_text("# another\n")
    monkeypatch.setattr(rank_facts.dspark_megatron, "__file__", str(package / "__init__.py"))
    config.train.seed = 9
    after = rank_facts.launch_facts(config, command="evaluate")
    found = disagreement([RankFacts(0, "a", before), RankFacts(1, "b", after)])
    versions = [f for f in after if f.startswith("the version of") and before[f] != after[f]]
    assert "the argument command is 'train' on rank 0 (a) and 'evaluate' on rank 1 (b)" in found
    assert "train.seed is 1234 on rank 0 (a) and 9 on rank 1 (b)" in found
    assert "the version of torch" in versions
    changed = {field for field in after if before.get(field) != after[field]} - set(versions)
    assert changed == {
        "the argument command",
        "train.seed",
        "the code of dspark_megatron/ops",
        "the variable NVIDIA_TF32_OVERRIDE",
        "the variable NVTE_FLASH_ATTN",
    }


def test_every_setting_of_a_config_is_compared(tiny_run):
    config = tiny_config(tiny_run)
    sections = config.to_dict()
    for section, parts in PARTS.items():
        for part in parts:
            sections[f"{section}.{part}"] = sections[section].pop(part)
    wanted = {f"{s}.{key}" for s, values in sections.items() for key in values}
    assert rank_facts.config_facts(config).keys() == wanted


def test_large_files_are_compared_by_pieces_from_their_first_byte_to_their_last(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(file_pieces, "_PIECE", 4)
    for size, budget in ((10, 64), (1000, 64)):
        monkeypatch.setattr(file_pieces, "_OF_A_FILE", budget)
        file = tmp_path / f"{size}"
        file.write_bytes(bytes(size))
        before = file_pieces.pieces_text([file])
        for place in (0, size // 2, size - 1):
            content = bytearray(size)
            # A change of less than the distance of two pieces may be missed, in a large file only.
            content[place : place + (100 if size > budget else 1)] = b"x" * 100
            file.write_bytes(content[:size])
            assert file_pieces.pieces_text([file]) != before, (size, place)


@pytest.fixture
def own_copies(tiny_run, tmp_path):
    """Two folders with the target and the chats, and a config that names them relatively."""
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        shutil.copytree(tiny_run["target"]["path"], folder / "target")
        shutil.copy(tiny_run["data"]["train_files"][0], folder / "chats.jsonl")
        make_chats(folder / "heldout.jsonl", 4)
    sections = {
        "target": {"path": "target"},
        "data": {"train_files": ["chats.jsonl"]},
        "train": {"output_dir": str(tmp_path / "run"), "iterations": 1},
        "evaluate": {"heldout_files": ["heldout.jsonl"], "every": 1},
    }
    return folders, sections


def change_words(path):
    """As many tokens as before."""
    path.write_text(path.read_text().replace("hill", "llih"))


def change_template(path):
    path.write_text(path.read_text().replace("assistant", "assistent"))


def change_value(path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(iter(sorted(tensors)))
    tensors[name].view(-1)[0] += 1
    save_file(tensors, path, metadata={"format": "pt"})


def change_last_value(path):
    """Of the first tensor, far from its first row, which the fingerprint reads."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(n for n, t in sorted(tensors.items()) if t.ndim == 2)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, path, metadata={"format": "pt"})


COPIES = [
    ("chats.jsonl", change_words, "the files of data.train_files is", 1),
    ("chats.jsonl", change_words, "the files of data.train_files is", 2),
    ("heldout.jsonl", change_words, "the files of evaluate.heldout_files is", 1),
    ("target/chat_template.jinja", change_template, "the target's chat template is", 2),
    ("target/model.safetensors", change_value, "the fingerprint of the target's weights is", 2),
    ("target/model.safetensors", change_last_value, "the target's files is model.safetensors", 1),
]


@pytest.mark.parametrize("file, change, message, tp", COPIES)
def test_ranks_with_other_copies_of_a_file_do_not_train(
    pool, tiny_run, own_copies, file, change, message, tp
):
    folders, sections = own_copies
    change(folders[1] / file)
    config = tiny_config(tiny_run, **sections, parallel={"tensor_parallel": tp})
    with pytest.raises(AssertionError) as error:
        pool.run(train_in_own_folder, world=2, tp=tp, config=config, folders=folders)
    said = str(error.value)
    assert message in said and "on rank 0 (" in said and "on rank 1 (" in said
    assert said.count("the same, and they differ") == 2, "every rank says it, and none waits"


def test_ranks_with_the_same_copies_train(pool, tiny_run, own_copies):
    folders, sections = own_copies
    config = tiny_config(tiny_run, **sections)
    pool.run(train_in_own_folder, world=2, tp=1, config=config, folders=folders)


def draft_of_another_start(runtime, config, changed):
    """A draft's weights, of which the last rank has changed one."""
    from dspark_megatron.run.build import build_draft
    from dspark_megatron.run.check import check
    from dspark_megatron.run.ranks.agreement import agree

    draft = build_draft(check(config, runtime.world_size), runtime)
    if runtime.rank == runtime.world_size - 1 and changed:
        with torch.no_grad():
            draft.get_parameter(changed)[0] += 1
    agree(rank_facts.draft_facts(draft, runtime.tp_group.rank()))


def test_drafts_are_compared_over_all_ranks(pool, tiny_run):
    layout = dict(world=4, tp=2)
    config = tiny_config(tiny_run, parallel={"tensor_parallel": 2})
    pool.run(draft_of_another_start, **layout, config=config, changed=None)
    for name, message in (
        ("final_layernorm.weight", "the draft's weights that are not split is"),
        ("markov_head.markov_w2.weight", "the draft's weights of tensor-parallel rank 1 is"),
        ("output_head.weight", "the draft's weights of tensor-parallel rank 1 is"),
    ):
        with pytest.raises(AssertionError, match=message):
            pool.run(draft_of_another_start, **layout, config=config, changed=name)


def test_prompts_and_starts_are_compared(tmp_path, tiny_run):
    one, other = Prompt([1, 2], "x"), Prompt([1, 3], "x")
    facts = [rank_facts.prompt_facts({"p.jsonl": [prompt]}) for prompt in (one, other)]
    found = disagreement([RankFacts(rank, "a", some) for rank, some in enumerate(facts)])
    assert "the prompts of p.jsonl is 1 (fingerprint " in found
    folders = [tmp_path / "0" / "draft", tmp_path / "1" / "draft"]
    for i, folder in enumerate(folders):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"of": i}))
    facts = [rank_facts.folder_facts("the draft", folder) for folder in folders]
    found = disagreement([RankFacts(rank, "a", some) for rank, some in enumerate(facts)])
    assert "the draft is draft, config.json " in found
