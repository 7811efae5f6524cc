"""The draft that is evaluated: a run's, that of a folder in any layout, or an untrained one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dspark_megatron.config import Config
from dspark_megatron.conversion.draft_tensors import fill_draft
from dspark_megatron.conversion.sidecar import SIDECAR, read_temperatures
from dspark_megatron.errors import printable, require
from dspark_megatron.evaluation.scheduled_cut import ScheduledCut
from dspark_megatron.evaluation.serving.sps_table import read_sps_table, sps_of_step
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.run.build import build_draft
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.checkpoints.loading import load_checkpoint
from dspark_megatron.run.checkpoints.state import check_same_run
from dspark_megatron.run.identity import draft_identity, fix_template_day
from dspark_megatron.run.initial.initial_weights import is_draft_folder, open_draft_folder
from dspark_megatron.run.initial.warm_start import WarmStart
from dspark_megatron.run.known_draft import evaluated_draft, with_draft_of
from dspark_megatron.run.ranks.agreement import Facts, agree
from dspark_megatron.run.ranks.facts import draft_facts, file_digest, folder_facts
from dspark_megatron.run.ranks.runtime import Launch, Runtime, main_ranks_folder
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.checkpoints.whole import check_whole
from dspark_megatron.storage.training_checkpoint import check_has, read_meta


@dataclass(frozen=True)
class EvaluatedDraft:
    """One that has passed every check that needs no weights."""

    name: str
    """As the user named it; empty where the config names it."""
    plan: RunPlan
    source: Path | None
    """An `iter_*` folder, or the folder of a draft; None for the draft before the first step."""
    cut: ScheduledCut | None
    """None verifies whole drafts."""

    @classmethod
    def of(cls, job: Launch, config: Config, name: str = "") -> "EvaluatedDraft":
        """The config's, or the one of this name. ConfigError where there is nothing to evaluate, or
        nothing to decode with, and for a damaged checkpoint or one of another target."""
        if name:
            config = replace(config, evaluate=replace(config.evaluate, checkpoint=name))
        config, source = with_known_draft(config)
        plan = check(config, job.world_size, use="evaluate")
        fix_template_day(plan, job.main_ranks)
        if source is not None:
            check_draft(plan, source, rank=job.rank)
        return cls(name, plan, source, _scheduled_cut(plan, source))

    def as_main_rank(self, runtime: Runtime) -> "EvaluatedDraft":
        """With the main rank's folder, since a run that goes on may have saved another checkpoint
        meanwhile."""
        if self.source is None:
            return self
        return replace(self, source=main_ranks_folder(self.source, runtime))

    def file_facts(self) -> Facts:
        """What is read of it, for ranks to compare."""
        settings, of = self.plan.config.evaluate, f" {self.name}" if self.name else ""
        return {
            **folder_facts(f"the checkpoint{of}", self.source),
            "evaluate.sps_table's content": file_digest(Path(settings.sps_table)),
            "evaluate.temperatures' content": file_digest(Path(settings.temperatures) / SIDECAR),
        }

    def facts(self, iteration: int | None) -> dict[str, Any]:
        """What was evaluated and how. iteration: as `load_draft` returned it."""
        weights, shape = self.plan.config.evaluate.weights, self.plan.shape
        named = {"checkpoint": None}
        if self.source is not None:
            named = NamedCheckpoint.at(self.source, weights).facts()
        names = ("temperature", "max_new_tokens", "seed", "batch_size", "scheduler")
        return {
            **({"draft": self.name} if self.name else {}),
            "target": self.plan.config.target.path,
            **named,
            "iteration": iteration,
            "block_size": shape.block_size,
            "num_draft_tokens": shape.num_draft_tokens,
            **{n: getattr(self.plan.config.evaluate, n) for n in (*names, "context_edges")},
        }


def evaluated_drafts(job: Launch, config: Config, names: Sequence[str]) -> list[EvaluatedDraft]:
    """Those of these names, or the one that the config says. All are checked before the target is
    loaded, and all are given prompts of the same day."""
    found: list[EvaluatedDraft] = []
    for name in names or [""]:
        if found:
            config = replace(config, data=found[0].plan.config.data)
        found.append(EvaluatedDraft.of(job, config, name))
    return found


def with_known_draft(config: Config) -> tuple[Config, Path | None]:
    """The config with what is known of the draft, and where that is; None for the untrained
    draft."""
    require(bool(config.evaluate.prompt_files), "evaluate.prompt_files is empty; name a file")
    require(
        not config.target.is_stored,
        "evaluation decodes with the target, and stored states have none of new tokens; set "
        "target.provider=huggingface",
    )
    source = evaluated_draft(config)
    if source is None:
        require(
            bool(config.train.output_dir or config.evaluate.output),
            "evaluate.output is missing: an untrained draft has no folder to write into; name a "
            "JSON file",
        )
        return config, None
    config = with_draft_of(config, source)
    if not config.train.output_dir and not is_draft_folder(source):  # results go beside its run
        config = replace(config, train=replace(config.train, output_dir=str(source.parent.parent)))
    return config, source


def check_draft(plan: RunPlan, source: Path, *, rank: int = 0) -> None:
    """ConfigError for a damaged checkpoint, one of another target or draft, or one without the
    weights that are asked for, and for a folder whose draft does not fit. The main rank alone reads
    all of a checkpoint, where that is asked for."""
    if is_draft_folder(source):
        open_draft_folder(plan, source)
        return
    check_whole(source, plan.config.storage.verify if rank == 0 else "size")
    check_same_run(source, draft_identity(plan))
    check_has(source, plan.config.evaluate.weights)


def load_draft(
    plan: RunPlan, runtime: Runtime, source: Path | None
) -> tuple[DSparkDraftModel, int | None]:
    """The draft and its iteration, None for that of a folder. All ranks call it together."""
    draft = build_draft(plan, runtime).eval()
    iteration: int | None = 0
    if source is None:
        if warm_start := WarmStart.open(plan):
            warm_start.load(draft, tp_group=runtime.tp_group)
    elif is_draft_folder(source):
        folder, iteration = open_draft_folder(plan, source), None
        if runtime.is_main and folder.doubts:
            print(printable("\n".join([f"{source}:", *folder.doubts])), flush=True)
        fill_draft(draft, folder.tensor, tp_group=runtime.tp_group)
    else:
        weights = plan.config.evaluate.weights
        iteration = load_checkpoint(source, draft, None, weights=weights).iteration
    agree(draft_facts(draft, runtime.tp_group.rank()))
    return draft, iteration


def _scheduled_cut(plan: RunPlan, source: Path | None) -> ScheduledCut | None:
    """The scheduler of the settings, None without one; ConfigError if its files cannot be used."""
    settings, num_draft_tokens = plan.config.evaluate, plan.shape.num_draft_tokens
    if settings.scheduler == "none":
        return None
    sps = read_sps_table(settings.sps_table)
    sps_of_step(sps, settings.batch_size, num_draft_tokens)  # the largest step must be within it
    return ScheduledCut(settings.scheduler, sps, num_draft_tokens, _temperatures(plan, source))


def _temperatures(plan: RunPlan, source: Path | None) -> list[float] | None:
    settings = plan.config.evaluate
    if not settings.temperatures:
        return None
    folder, iteration, named = Path(settings.temperatures), None, None
    if source is None:
        iteration = 0
    elif not is_draft_folder(source):
        iteration = read_meta(source)["iteration"]
        named = NamedCheckpoint.at(source, settings.weights)
    elif folder.resolve() != source.resolve():  # an export's own came with it, from its checkpoint
        named = NamedCheckpoint.at(source)
    return read_temperatures(folder, plan.shape.num_draft_tokens, iteration, named)
