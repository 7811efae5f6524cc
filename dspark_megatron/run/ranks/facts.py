"""What a rank says of itself when ranks are compared: texts by field, of what decides what it
computes. Digests are short: they tell copies apart, and nobody tries to make two alike."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

import dspark_megatron
from dspark_megatron.config import Config
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.files.sources import find_files
from dspark_megatron.data.prompts.chat_prompts import Prompt
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.check import RunPlan
from dspark_megatron.run.initial.initial_weights import initial_folder
from dspark_megatron.run.ranks.agreement import Facts
from dspark_megatron.run.ranks.file_pieces import pieces_text
from dspark_megatron.run.states import tokenizer_text
from dspark_megatron.storage.gpt_checkpoint import GPTCheckpoint

_PACKAGES = (
    *("torch", "megatron-core", "transformers", "tokenizers", "safetensors", "jinja2", "numpy"),
    *("triton", "transformer-engine", "flash-attn", "compressed-tensors", "fla-core"),
)
_ENVIRONMENT = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "DNNL_DEFAULT_FPMATH_MODE",
    "DNNL_MAX_CPU_ISA",
    "MKL_CBWR",
    "MKL_ENABLE_INSTRUCTIONS",
    "NCCL_ALGO",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "ONEDNN_MAX_CPU_ISA",
    "TORCHDYNAMO_DISABLE",
    "TORCHINDUCTOR_EMULATE_PRECISION_CASTS",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_COMPILE_DISABLE",
    "USE_HUB_KERNELS",
)
"""Variables by which libraries compute otherwise, or choose collectives that must match."""
_ENVIRONMENT_PREFIXES = ("NVTE_",)


def launch_facts(config: Config, **arguments: Any) -> Facts:
    """Settings, versions, code and environment. arguments: of the command, beside its config."""
    return {
        **{f"the argument {name}": repr(value) for name, value in arguments.items()},
        **config_facts(config),
        **{f"the version of {name}": version for name, version in _versions().items()},
        **{f"the code of {part}": digest for part, digest in _code().items()},
        **_user_code(config),
        **{f"the variable {name}": value for name, value in _environment().items()},
        "the device": "cuda" if torch.cuda.is_available() else "cpu",
        "the precision of float32 products": torch.get_float32_matmul_precision(),
    }


def config_facts(config: Config) -> Facts:
    """Every setting by its full name, those of `model.attention` too."""
    return {
        name: text
        for section in fields(config)
        for name, text in _settings(section.name, getattr(config, section.name)).items()
    }


def _settings(name: str, value: Any) -> Facts:
    if not is_dataclass(value):
        return {name: repr(value)}
    return {
        full: text
        for key in fields(value)
        for full, text in _settings(f"{name}.{key.name}", getattr(value, key.name)).items()
    }


def _versions() -> dict[str, str]:
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _code() -> dict[str, str]:
    """Digests of this package by part."""
    root = Path(dspark_megatron.__file__).parent
    parts: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.py")):
        parts.setdefault(file.relative_to(root.parent).parts[1], []).append(file)
    return {
        f"{root.name}/{part}": digest(text for file in files for text in _named(file))
        for part, files in parts.items()
    }


def _named(file: Path) -> tuple[bytes, bytes]:
    return file.name.encode(), file.read_bytes()


def _user_code(config: Config) -> Facts:
    """Of the user's own layers."""
    words = config.model.layer_spec
    if not words:
        return {}
    try:
        found = importlib.util.find_spec(words[0])
        text = file_digest(Path(found.origin)) if found and found.origin else "none"
    except Exception:  # said where it is imported
        text = "none"
    return {f"the code of {words[0]}": text}


def _environment() -> dict[str, str]:
    names = {*_ENVIRONMENT, *(n for n in os.environ if n.startswith(_ENVIRONMENT_PREFIXES))}
    return {name: os.environ.get(name, "not set") for name in sorted(names)}


def target_facts(plan: RunPlan) -> Facts:
    """The target's config, tokenizer, template and weights."""
    path, tokenizer = Path(plan.config.target.path), plan.found_tokenizer
    facts = {
        f"the target's {name}": file_digest(path / name)
        for name in ("config.json", "generation_config.json")
    }
    if tokenizer is not None:
        facts["the target's tokenizer"] = digest([tokenizer_text(tokenizer).encode()])
        facts["the target's chat template"] = digest([str(tokenizer.chat_template).encode()])
    facts["the fingerprint of the target's weights"] = plan.target_fingerprint[:16]
    facts["the target's files"] = pieces_text(sorted(path.glob("*.safetensors")))
    if checkpoint := plan.config.target.checkpoint:
        shards = sorted(GPTCheckpoint(checkpoint).path.glob("*.distcp"))
        facts["the files of target.checkpoint"] = pieces_text(shards)
    return facts


def start_facts(plan: RunPlan, resume_from: Path | None) -> Facts:
    """What a run begins with: the checkpoint that it continues, or what else it starts from."""
    facts = folder_facts("the checkpoint to continue from", resume_from)
    if (initial := plan.config.train.initial_checkpoint) and resume_from is None:
        path = Path(initial)
        folder = initial_folder(path) if path.is_dir() else path
        facts |= folder_facts("train.initial_checkpoint", folder)
    if plan.config.target.is_stored:
        facts |= folder_facts("target.cache", Path(plan.config.target.cache))
    return facts


def folder_facts(name: str, folder: Path | None) -> Facts:
    """Of a checkpoint, a draft or stored states: what it says of itself."""
    if folder is None:
        return {name: "none"}
    files = ("dspark.json", ".metadata", "config.json", "manifest.json")
    found = [f"{file} {file_digest(folder / file)}" for file in files if (folder / file).is_file()]
    shards = [*folder.glob("*.safetensors"), *folder.glob("*.distcp")]
    sizes = [str(file.stat().st_size) for file in sorted(shards)]
    return {name: ", ".join([folder.name, *found, *sizes])}


def file_facts(name: str, entries: list[str]) -> Facts:
    """The files of data, as each rank sees them; `pieces_text` says how closely it looks."""
    files = [file for entry in entries for file in find_files(entry)]
    parts = [f"{file.path}{end}" for file in files for end in (".bin", ".idx") if file.indexed]
    parts += [str(file.path) for file in files if not file.indexed]
    paths = [path for path in map(Path, parts) if path.is_file()]
    rows = [f"{f.path} {len(f.dataset.rows):,} rows" for f in files if f.dataset is not None]
    seen = [f"{', '.join(map(str, paths))}: {pieces_text(paths)}"] if paths else []
    return {f"the files of {name}": ", ".join([*seen, *rows])}


def sample_facts(name: str, dataset: ConversationDataset) -> Facts:
    """Samples as they are trained on."""
    tokens, samples = dataset.report.total_tokens, len(dataset)
    return {
        f"the samples of {name}": f"{samples:,} with {tokens:,} tokens "
        f"(fingerprint {dataset.fingerprint[:12]})",
    }


def prompt_facts(files: dict[str, list[Prompt]]) -> Facts:
    """Prompts as they are decoded."""
    return {
        f"the prompts of {name}": f"{len(prompts):,} (fingerprint "
        f"{digest([str([prompt.input_ids for prompt in prompts]).encode()])})"
        for name, prompts in files.items()
    }


def draft_facts(draft: DSparkDraftModel, tp_rank: int) -> Facts:
    """The draft's weights: what tensor-parallel ranks share, and this one's own part, with its rows
    of the target's embedding and LM head."""
    own = [("embedding", draft.embed_tokens.weight), ("LM head", draft.lm_head)]
    shared: list[tuple[str, torch.Tensor]] = []
    for name, parameter in draft.named_parameters():
        if parameter.requires_grad:
            is_split = getattr(parameter, "tensor_model_parallel", False)
            (own if is_split else shared).append((name, parameter))
    return {
        "the draft's weights that are not split": digest(_bytes(shared)),
        f"the draft's weights of tensor-parallel rank {tp_rank}": digest(_bytes(own)),
    }


def _bytes(parameters: list[tuple[str, torch.Tensor]]) -> Iterable[Any]:
    for name, parameter in parameters:
        yield name.encode()
        yield parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def file_digest(file: Path) -> str:
    return digest([file.read_bytes()]) if file.is_file() else "none"


def digest(parts: Iterable[Any]) -> str:
    """parts: of bytes."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()[:12]
