"""The `dspark` commands that make what a run's folder lacks. Words in capitals are left to the
reader; otherwise they can be copied as they are."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from dspark_megatron.config import Config

RECORDS = "drafts.safetensors"
UNTRAINED = "evaluation_untrained.json"


@dataclass(frozen=True)
class Commands:
    """Of one run."""

    folder: Path
    config: Config | None
    is_completed: bool = False
    of_average: bool = False
    """Whether its evaluation is of the moving average of the weights."""

    def train(self, *overrides: str) -> str:
        """Continues the run; one that is completed is trained again in another folder."""
        if self.is_completed:
            overrides = ("train.output_dir=NEW_RUN", *overrides)
        else:
            overrides = (*self._place(), *overrides)
        return _line("train", self._file(), *overrides)

    def train_with_heldout(self) -> str:
        if self.config is not None and self.config.evaluate.every is not None:
            return self.train()
        words = ("evaluate.heldout_files=[ANSWERS]", "evaluate.every=STEPS")
        return self.train(*self._loaded_target(), *words)

    def evaluate(self, *overrides: str) -> str:
        words = []
        if self.of_average and (self.config is None or self.config.evaluate.weights != "ema"):
            words.append("evaluate.weights=ema")
        if self.config is not None and self.config.evaluate.output:
            words.append(f"evaluate.output={self.folder / 'evaluation.json'}")
        return self._evaluate(*words, *overrides)

    def evaluate_with_records(self) -> str:
        return self.evaluate(f"evaluate.records={self.folder / RECORDS}")

    def evaluate_untrained(self) -> str:
        """Settings that name another draft are taken back."""
        words = ["evaluate.untrained=true", "evaluate.compare_plain=false"]
        words.append(f"evaluate.output={self.folder / UNTRAINED}")
        if self.config is not None:
            evaluate = self.config.evaluate
            words += ["evaluate.weights=trained"] * (evaluate.weights == "ema")
            words += ["evaluate.best=false"] * evaluate.best
            words += ['evaluate.checkpoint=""'] * bool(evaluate.checkpoint)
        return self._evaluate(*words)

    def calibrate(self) -> str:
        """Lines, of which the first writes the records where there are none."""
        lines = [] if (self.folder / RECORDS).exists() else [self.evaluate_with_records()]
        return "\n".join([*lines, _line("calibrate", str(self.folder))])

    def _evaluate(self, *overrides: str) -> str:
        if self.config is not None and (self.folder / "checkpoints").is_dir():
            run = [str(self.folder)]
        else:
            run = [self._file(), *self._place()]
        given = self.config is not None and self.config.evaluate.prompt_files
        prompts = [] if given else ["--prompts", "chat"]
        return _line("evaluate", *run, *self._loaded_target(), *overrides, *prompts)

    def _file(self) -> str:
        return "RUN.yaml" if self.config is None else str(self.folder / "config.yaml")

    def _loaded_target(self) -> list[str]:
        """For what stored states do not serve."""
        if self.config is None or not self.config.target.is_stored:
            return []
        provider = "megatron" if self.config.target.checkpoint else "huggingface"
        return [f"target.provider={provider}"]

    def _place(self) -> list[str]:
        """Nothing where the config names the folder; a run may have been moved."""
        named = self.config and self.config.train.output_dir
        if named and Path(named).resolve() == self.folder.resolve():
            return []
        return [f"train.output_dir={self.folder}"]


def _line(command: str, *words: str) -> str:
    return shlex.join(["dspark", command, *words])
