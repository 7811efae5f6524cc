"""A draft as a Python program uses it: loss, one round, whole answers, export.

Every method is a few lines around what the commands run.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dspark_megatron.api.target import Prompt, Target
from dspark_megatron.config import Config
from dspark_megatron.conversion.draft_tensors import whole_tensors
from dspark_megatron.conversion.folder_writer import WriteOptions, write_draft_folder
from dspark_megatron.conversion.layouts.table import LAYOUTS
from dspark_megatron.conversion.sources import (
    ChangedDraft,
    CheckpointSource,
    DraftSource,
    FolderSource,
)
from dspark_megatron.conversion.verify import DTYPES
from dspark_megatron.data.batch import Batch, micro_batch
from dspark_megatron.data.conversation import Sample
from dspark_megatron.data.sampler import SampleRef
from dspark_megatron.errors import ConfigError, require
from dspark_megatron.evaluation.command import checked_head
from dspark_megatron.evaluation.decoding import Decoder, Sampling
from dspark_megatron.evaluation.figures import acceptance, speed
from dspark_megatron.evaluation.generation import Round
from dspark_megatron.model.draft_model import DSparkDraftModel
from dspark_megatron.model.drafting import Drafter
from dspark_megatron.ops.acceptance import probabilities, sample
from dspark_megatron.ops.logit_transform import TargetHead
from dspark_megatron.run.build import build_draft
from dspark_megatron.run.check import RunPlan, check
from dspark_megatron.run.initial.initial_weights import InitialWeights, is_draft_folder
from dspark_megatron.run.known_draft import with_initial_draft
from dspark_megatron.run.ranks.runtime import from_main_rank
from dspark_megatron.shape import DraftShape
from dspark_megatron.storage.training_checkpoint import find_checkpoint
from dspark_megatron.targets.base import StatesSource, TargetStates
from dspark_megatron.targets.huggingface.target import HuggingFaceTarget
from dspark_megatron.training.forward_step import ForwardStep
from dspark_megatron.training.metrics import MetricSums


class Loss(NamedTuple):
    """Of a batch."""

    value: Tensor
    """`[]`, with gradients."""
    figures: dict[str, Any]
    """The terms, `tau`, `accept_rate` by slot and more, as a line of `metrics.jsonl` has them."""


class Drafted(NamedTuple):
    """One block."""

    token_ids: list[int]
    """What the draft proposes to follow the context."""
    confidence: list[float] | None
    """By token: the chance that the target keeps it, if it kept those before (not calibrated). None
    without a confidence head."""


@dataclass(frozen=True)
class Generated:
    """An answer."""

    token_ids: list[int]
    text: str
    """Without special tokens."""
    rounds: list[Round]
    """Each draft and what became of it."""
    figures: dict[str, Any]
    """`tau`, `accept_rate` by slot, `tokens_per_second` and more, as an evaluation has them."""


class Draft:
    """A draft with the target that it is for; make one with `Draft.from_pretrained`."""

    def __init__(self, plan: RunPlan, target: Target, weights: InitialWeights) -> None:
        self.target, self._plan = target, plan
        self.model: DSparkDraftModel = build_draft(plan, target.runtime).eval()
        """The PyTorch module: this tensor-parallel rank's part."""
        weights.load(self.model, tp_group=self._tp_group)
        folder = weights.folder
        self._source: DraftSource = (
            FolderSource(folder) if folder is not None else CheckpointSource(weights.path)
        )
        self._head: TargetHead | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        target: Target,
        iteration: int | str | None = None,
        dtype: str | None = None,
        config: Config | None = None,
    ) -> "Draft":
        """Load a draft for this target. All ranks of the target call it together.

        Args:
            path: A draft's folder in any layout (this project's and DeepSpec's, speculators,
                ModelOpt, SpecForge), a run, or one of its checkpoints.
            target: The target that the draft was trained for.
            iteration: Which checkpoint of a run; None takes the newest, `best` the one with the
                best held-out tau.
            dtype: Type of the draft's weights here, `bfloat16` or `float32`; None takes
                `train.dtype`.
            config: Settings of the loss, anchors and kernels, from `load_config`. None takes the
                defaults. The draft's shape comes from `path`, the target's settings from `target`.

        Raises:
            ConfigError: Something cannot work; the message says the way out.
        """
        path = Path(path)
        require(path.is_dir(), f"{path} is not a folder; give a draft's folder or a run")
        is_folder = is_draft_folder(path)
        require(
            not is_folder or iteration is None,
            f"{path} is a draft's folder, which has no iterations; leave iteration ({iteration!r}) "
            "out",
        )
        config = copy.deepcopy(config) if config is not None else Config()
        config.target = replace(target.settings, check_logits=config.target.check_logits)
        config.parallel.tensor_parallel = target.runtime.tp_group.size()
        config.train.initial_checkpoint = str(
            path if is_folder else find_checkpoint(path, iteration)
        )
        if dtype is not None:
            name: Any = dtype
            config.train.dtype = name
        config.validate(trains=False)
        plan = check(with_initial_draft(config), target.runtime.world_size, use="evaluate")
        weights = InitialWeights.open(plan)
        assert weights is not None, "the config names them"
        return cls(plan, target, weights)

    @property
    def config(self) -> Config:
        """All settings, those of the draft's shape filled in."""
        return self._plan.config

    @property
    def shape(self) -> DraftShape:
        """Its dimensions."""
        return self._plan.shape

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """The target's layers whose outputs it reads."""
        return self.shape.target_layer_ids

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        """What is trained of it: the copies of the target's embedding and LM head are not."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def loss(
        self, samples: Sequence[Sample], states: TargetStates | None = None, *, epoch: int = 0
    ) -> Loss:
        """The loss of these samples as one micro-batch of a training step has it, with gradients.

        Anchors are those that training draws for samples 0, 1, ... of an epoch, from `train.seed`.
        The loss is this rank's: nothing is added up over data-parallel ranks.

        Args:
            samples: Of `target.encode`.
            states: `target.states(samples, draft.target_layer_ids)`; None runs the target.
            epoch: Each one draws other anchors.

        Raises:
            ConfigError: There is nothing to learn, or the states are of other samples.
        """
        require(bool(samples), "the loss needs at least one sample")
        refs = [SampleRef(epoch, i) for i in range(len(samples))]
        batch = micro_batch(samples, refs, self.config)
        step = self._step
        step.target = self._provider if states is None else _Given(states, self.shape)
        metrics = MetricSums.zeros(self.shape.num_draft_tokens, self.target.device)
        total = step(batch, self.model, metrics)
        if total is None:
            raise ConfigError(
                f"nothing is learnt from these {len(samples)} samples: a block needs two adjacent "
                "tokens that the target wrote; give longer answers, or check the loss masks"
            )
        return Loss(total / step.divisor(batch), metrics.means(step.term_weights))

    def propose(self, context: Prompt, *, temperature: float = 0.0, seed: int = 0) -> Drafted:
        """Draft one block after a context: a prompt, or token ids of at least two tokens. The
        target reads all but the last token, which is the anchor."""
        ids = self.target.prompt_ids(context)
        require(len(ids) > 1, f"a context must have at least 2 tokens, has {len(ids)}")
        decoder, drafter = self._decoder(ids, 1, temperature), Drafter(self.model)
        before = torch.tensor([ids[:-1]], device=self.target.device)
        drafter.add(self._provider.states(Batch(before)).taps[0])
        generator = torch.Generator(device=self.target.device).manual_seed(seed)

        def pick(logits: Tensor) -> tuple[Tensor, Tensor]:
            probs = probabilities(logits, temperature)
            return decoder.agree(sample(probs, [generator])), probs

        anchor = torch.tensor(ids[-1:], device=self.target.device)
        found = drafter.propose(anchor, pick)
        logits = found.confidence_logits
        confidence = None if logits is None else logits[0].sigmoid().tolist()
        return Drafted(found.tokens[0].tolist(), confidence)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> Generated:
        """Answer a prompt by speculative decoding: greedily (temperature 0) with the target's own
        tokens, else with its own distribution. Tensor-parallel ranks call it together."""
        ids = self.target.prompt_ids(prompt)
        decoded = self._decoder(ids, max_new_tokens, temperature).speculative([ids], [seed])
        (answer,) = decoded.generations
        figures = acceptance([answer], self.shape.num_draft_tokens)
        del figures["prompts"], figures["confidence_intervals"]  # of several prompts
        return Generated(
            answer.token_ids,
            self.target.tokenizer.decode(answer.token_ids, skip_special_tokens=True),
            answer.rounds,
            {**figures, "tokens_per_second": speed([decoded])},
        )

    def export(
        self,
        folder: str | Path,
        *,
        layout: str = "hf",
        dtype: str | None = "bfloat16",
        force: bool = False,
        target_name: str | None = None,
    ) -> Path:
        """Write the draft for an engine, as `dspark export` does, and return the folder. All ranks
        call it together, and the main one writes.

        Weights that were changed here are written as they are now; the calibrated temperatures and
        the history of the draft that was loaded are then left out.

        Args:
            folder: New, empty, or an earlier export of the same.
            layout: `hf`, `speculators`, `modelopt` or `specforge`.
            dtype: `bfloat16`, `float16`, `float32`; None takes the type that loses nothing.
            force: Replace an earlier export of other weights.
            target_name: The target as users find it, such as a hub id; None takes its folder's
                name.

        Raises:
            ConfigError: The export could not be used, or not be written.
        """
        require(
            layout in LAYOUTS, f"layout ({layout!r}) must be one of {', '.join(map(repr, LAYOUTS))}"
        )
        types = (*DTYPES, None)
        require(dtype in types, f"dtype ({dtype!r}) must be one of {', '.join(map(repr, types))}")
        options = WriteOptions(
            layout=layout,
            dtype=None if dtype is None else DTYPES[dtype],
            force=force,
            target_name=target_name,
        )
        own, problem = whole_tensors(self.model, tp_group=self._tp_group), ""
        if self.target.runtime.is_main:
            try:
                source = (
                    self._source if self._is_unchanged(own) else ChangedDraft(self._source, own)
                )
                write_draft_folder(source, Path(self.target.settings.path), Path(folder), options)
            except ConfigError as error:
                problem = str(error)
        if problem := from_main_rank(problem):
            raise ConfigError(problem)
        return Path(folder)

    def _is_unchanged(self, own: dict[str, Tensor]) -> bool:
        there = self._source.tensors()
        return all(torch.equal(own[name], tensor.to(own[name].dtype)) for name, tensor in there)

    @property
    def _tp_group(self) -> dist.ProcessGroup:
        return self.target.runtime.tp_group

    @cached_property
    def _provider(self) -> HuggingFaceTarget:
        return self.target.tapped(self.target_layer_ids)

    @cached_property
    def _step(self) -> ForwardStep:
        return ForwardStep(
            self.config.loss,
            self.model,
            self._provider,
            self._plan.target_transform,
            tp_group=self._tp_group,
            device=self.target.device,
        )

    def _decoder(self, ids: list[int], max_new_tokens: int, temperature: float) -> Decoder:
        require(max_new_tokens > 0, f"max_new_tokens ({max_new_tokens}) must be > 0")
        require(temperature >= 0, f"temperature ({temperature}) must be >= 0 (0: greedy)")
        if self._head is None:  # the first prompt serves for the checks
            first = torch.tensor([ids])
            self._head = checked_head(self._plan, self.model, self._provider, first)
        sampling = Sampling(temperature, max_new_tokens, self.target.stop_token_ids)
        return Decoder(self._provider, self.model, self._head, sampling, batch_size=1)


class _Given(StatesSource):
    """States that were made before."""

    lockstep = False

    def __init__(self, states: TargetStates, shape: DraftShape) -> None:
        self._states, self._width = states, len(shape.target_layer_ids) * shape.hidden_size

    def states(self, batch: Batch) -> TargetStates:
        found, wanted = tuple(self._states.taps.shape), (*batch.input_ids.shape, self._width)
        require(
            found == wanted,
            f"the states must be of these samples and the draft's layers, with taps of shape "
            f"{list(wanted)}; they have {list(found)}",
        )
        return self._states
