"""`dspark evaluate`: decode prompts by real speculative decoding with the target and report tau,
acceptance by position and speed, as a table and as JSON.

Drafts are given as they are: runs, checkpoints, folders in any layout. Settings are those of a
config, of the first run among them, or the defaults.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from dspark_megatron.cli.exit_codes import DONE
from dspark_megatron.cli.output import Output
from dspark_megatron.cli.train.launching import add_launch, run_on_ranks
from dspark_megatron.config.loading import load_config
from dspark_megatron.errors import require

EXAMPLES = """\
  dspark evaluate runs/mine --prompts chat maths code --gpus 8
  dspark evaluate runs/mine --prompts chats.jsonl evaluate.temperature=0
  dspark evaluate drafts/published runs/mine --target targets/qwen3-8b --prompts chat
  dspark evaluate run.yaml evaluate.temperature=1 evaluate.max_new_tokens=512"""
STOP = "stopping; nothing of an evaluation is kept"
_EMPTY = "''"
_CHOSEN = ("evaluate.checkpoint=", "evaluate.untrained=")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    about = "drafts: runs, checkpoints, or folders in any layout; or a run's YAML file; and "
    about += "section.key=value for single settings"
    parser.add_argument("given", nargs="*", metavar="DRAFT_OR_RUN", help=about)
    about = "YAML file with the settings (default: those of the first run that is given)"
    parser.add_argument("--config", metavar="FILE", help=about)
    parser.add_argument("--target", metavar="DIR", help="the target's folder (target.path)")
    about = "files of prompts, or the sets that come along: chat, maths, code "
    about += "(evaluate.prompt_files)"
    parser.add_argument("--prompts", nargs="+", metavar="FILE", help=about)
    about = "JSON file for the figures (default: evaluation.json of a single run)"
    parser.add_argument("--output", metavar="FILE", help=about)
    add_launch(parser)
    parser.set_defaults(dry_run=False)


def run(args: argparse.Namespace, output: Output) -> int:
    sort_arguments(args)
    load_config(args.config, args.overrides, trains=False)
    return run_on_ranks(args, output, rank, STOP)


def sort_arguments(args: argparse.Namespace) -> None:
    """Tell drafts, the config and single settings apart: `args.drafts`, `args.config` and
    `args.overrides`. ConfigError where they contradict each other."""
    given, args.prompts = list(args.given), list(args.prompts or ())
    for text in filter(_is_override, list(args.prompts)):  # settings may follow the files
        args.prompts.remove(text)
        given.append(text)
    overrides = [text for text in given if _is_override(text)]
    others = [text for text in given if text not in overrides]
    configs = [text for text in others if not Path(text).is_dir()]
    drafts = [text for text in others if Path(text).is_dir()]
    if args.config is not None:
        configs.insert(0, args.config)
    strange = [text for text in configs if Path(text).suffix not in (".yaml", ".yml", ".json")]
    require(
        not strange,
        f"{', '.join(strange)} must be the folder of a draft or a run, a YAML file, or "
        "section.key=value",
    )
    require(
        len(configs) <= 1, f"{' and '.join(configs)} both give the settings; name one YAML file"
    )
    twice = sorted({text for text in drafts if drafts.count(text) > 1})
    require(not twice, f"{', '.join(twice)} is named twice; name each draft once")
    chosen = [text for text in overrides if text.startswith(_CHOSEN)]
    require(
        len(drafts) < 2 or not chosen,
        f"{', '.join(chosen)} chooses one draft, and {len(drafts)} are named; leave it out",
    )
    args.config = configs[0] if configs else _config_of_run(drafts)
    require(
        args.config is not None or bool(args.target or overrides),
        "there is nothing to evaluate with; name a run, or a draft with --target DIR and --prompts "
        "FILE",
    )
    args.drafts = [] if chosen else drafts
    args.overrides = [*_of_drafts(drafts, args.drafts), *_options(args), *overrides]


def _is_override(text: str) -> bool:
    name, separator, _ = text.partition("=")
    return bool(separator) and "/" not in name and not Path(text).exists()


def _config_of_run(drafts: list[str]) -> str | None:
    """Of the first run among them, to which a checkpoint or an export of it belongs, too."""
    for draft in drafts:
        path = Path(draft).absolute()
        for folder in (path, *path.parents[:2]):
            if (folder / "config.yaml").is_file() and (folder / "checkpoints").is_dir():
                return str(folder / "config.yaml")
    return None


def _of_drafts(named: list[str], evaluated: list[str]) -> Iterator[str]:
    """What a config says of its own draft and of where results go, said of those that are named: of
    one run into its folder, which may have been moved."""
    if named:
        is_run = len(named) == 1 and (Path(named[0]) / "checkpoints").is_dir()
        yield f"train.output_dir={named[0] if is_run else _EMPTY}"
    if evaluated:
        yield "evaluate.untrained=false"
    if len(evaluated) > 1:
        yield from (f"evaluate.output={_EMPTY}", f"evaluate.records={_EMPTY}")


def _options(args: argparse.Namespace) -> Iterator[str]:
    """The options as the settings that they stand for."""
    if args.target is not None:
        yield f"target.path={args.target}"
    if args.prompts:
        yield f"evaluate.prompt_files=[{', '.join(map(repr, args.prompts))}]"
    if args.output is not None:
        yield f"evaluate.output={args.output}"


def rank(args: argparse.Namespace, output: Output) -> int:
    """The imports within are slow; those of the work need the CPU support that `launch`
    installs."""
    from dspark_megatron.cli.train.rank import ends_by_signal, words_for
    from dspark_megatron.run.ranks.launcher import end_with_launcher

    end_with_launcher()
    with ends_by_signal(), words_for(output):
        from dspark_megatron.run.ranks.runtime import launch

        with launch() as job:
            from dspark_megatron.evaluation.command import run as evaluate

            figures = evaluate(job, args)
    if job.rank == 0:
        output.result(figures)
    return DONE
