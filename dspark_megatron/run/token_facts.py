"""What decides on the samples of a run, as texts and numbers: equal facts mean equal samples."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import dspark_megatron
from dspark_megatron.data.files.opening import file_errors
from dspark_megatron.data.files.sources import DataFile, find_files
from dspark_megatron.data.rules import SampleRules
from dspark_megatron.data.token_store import Facts
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.ranks.file_pieces import pieces_text
from dspark_megatron.run.states import tokenizer_text

_TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "chat_template*", "generation_config.json"),
)
_PACKAGES = ("transformers", "tokenizers", "jinja2")


def token_facts(plan: RunPlan, entries: list[str], rules: SampleRules) -> Facts:
    """All that decides on the samples of some entries: files, tokenizer, rules and code."""
    tokenizer, folder = plan.tokenizer, Path(plan.config.target.path)
    names = {file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)}
    files = sorted(file for file in names if file.is_file())
    package = Path(dspark_megatron.__file__).parent
    code = [*sorted((package / "data").rglob("*.py")), package / "run" / "indexed_dataset.py"]
    return {
        "data files": files_facts(entries),
        "tokenizer": _digest(type(tokenizer).__name__, tokenizer_text(tokenizer)),
        "tokenizer's files": {file.name: _digest(file.read_bytes()) for file in files},
        "chat template": _digest(str(tokenizer.chat_template)),
        "vocab_size": plan.shape.vocab_size,
        "rules": rules.facts(),
        "code": _digest(*(file.read_bytes() for file in code)),
        "versions": {
            "Python": ".".join(platform.python_version_tuple()[:2]),
            **{name: version(name) for name in _PACKAGES},
        },
    }


def files_facts(entries: list[str]) -> list[list[Facts]]:
    """The files of each entry. One that was written since has another time of change, which nobody
    can set, and small ones other content. ConfigError for one that cannot be read."""
    return [[_file_facts(file) for file in find_files(entry)] for entry in entries]


def _file_facts(file: DataFile) -> Facts:
    parts = [Path(f"{file.path}{end}") for end in ((".bin", ".idx") if file.indexed else ("",))]
    with file_errors(file.path):
        parts = [part for part in parts if part.is_file()]
        changed = [[part.stat().st_ctime_ns, part.stat().st_ino] for part in parts]
        named = str(file.path)  # messages of bad lines are kept with the samples
        seen = {"named": named, "changed": changed, "content": pieces_text(parts)}
        return {**file.identity(), **seen}


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else part.encode("utf-8", "surrogatepass"))
        digest.update(b"\0")
    return digest.hexdigest()[:32]
