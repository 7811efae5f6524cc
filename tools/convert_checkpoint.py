"""Older door to `dspark export`, `import`, `convert`, `verify` and `served engines`:

python tools/convert_checkpoint.py export  --checkpoint RUN --target DIR --output DIR
python tools/convert_checkpoint.py import  --input DRAFT --target DIR --output RUN
python tools/convert_checkpoint.py convert --input DRAFT --target DIR --output DIR
python tools/convert_checkpoint.py verify  --input DRAFT [--checkpoint RUN] [--target DIR]
python tools/convert_checkpoint.py engines [--engine NAME] [--json]
"""

import logging
import sys

from dspark_megatron.cli.main import run_command

COMMANDS = {name: name for name in ("export", "import", "convert", "verify")}
COMMANDS["engines"] = "served engines"
OPTIONS = {
    "export": {"--checkpoint": None},
    "import": {"--input": None, "--layout": "--from-layout"},
    "convert": {"--input": None},
    "verify": {"--input": None, "--layout": "--from-layout", "--checkpoint": "--run"},
    "engines": {},
}
"""Older names, and what they are called now; None: the folder stands alone."""


def renamed(words: list[str], names: dict[str, str | None]) -> list[str]:
    """The words of the command as it is now; `--name=value` counts as two."""
    found: list[str] = []
    for word in words:
        name, equals, value = word.partition("=")
        now = names.get(name, name)
        found += [*filter(None, [now]), *([value] if equals else [])] if name in names else [word]
    return found


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    words = sys.argv[1:] if argv is None else argv
    if words[:1] and words[0] in COMMANDS:
        if {"-h", "--help"} & set(words):
            print(f"{__doc__}\nThe command as it is now:\n")
        name = COMMANDS[words[0]]
        prog = f"convert_checkpoint.py {words[0]}"
        return run_command(name, renamed(words[1:], OPTIONS[words[0]]), prog)
    print(f"usage: convert_checkpoint.py {'|'.join(COMMANDS)} ...\n\n{__doc__}")
    return 0 if words[:1] in (["-h"], ["--help"]) else 2


if __name__ == "__main__":
    sys.exit(main())
