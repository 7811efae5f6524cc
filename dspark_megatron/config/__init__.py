"""All settings of a run: their defaults, meanings, units, and the checks that need no files.

Each section of the YAML file is a module. `Config` holds all sections and checks the rules between
them. `loading.py` reads a config; the rules that need the target's own shape are in `shape`.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import yaml

from dspark_megatron.config.data import DataConfig
from dspark_megatron.config.evaluate import EvaluateConfig
from dspark_megatron.config.model import ModelConfig
from dspark_megatron.config.objective.loss import LossConfig
from dspark_megatron.config.optimizer import OptimizerConfig
from dspark_megatron.config.parallel import ParallelConfig
from dspark_megatron.config.rules import check_bounds, check_choices
from dspark_megatron.config.target import TargetConfig
from dspark_megatron.config.train import StorageConfig, TrainConfig
from dspark_megatron.errors import require


@dataclass(kw_only=True)
class Config:
    """A whole run, by section."""

    target: TargetConfig = field(default_factory=TargetConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)

    def validate(self, *, trains: bool = True) -> None:
        """Raises ConfigError unless all settings are valid, alone and together. trains: whether
        what only training needs must be given (its data, folder and length)."""
        for section in dataclasses.fields(self):
            check_choices(section.name, getattr(self, section.name))
            check_bounds(section.name, getattr(self, section.name))
            getattr(self, section.name).validate()
        if trains:
            self._check_given()
            require(
                self.evaluate.weights != "ema" or self.optimizer.ema_decay is not None,
                "evaluate.weights=ema evaluates a moving average of the weights, and "
                "optimizer.ema_decay is null; set optimizer.ema_decay=0.999, say, or "
                "evaluate.weights=trained",
            )
        loss = self.loss
        confidence = self.model.enable_confidence_head
        require(
            loss.terms.teach_something or (confidence and loss.confidence_head_alpha > 0),
            "there is nothing to learn: a weight in loss.terms"
            + (" or loss.confidence_head_alpha" * confidence)
            + " must be > 0",
        )
        self._check_overlap()
        self._check_scaled_parts()
        require(
            not (self.model.initialize_from_target_layers and self.train.initial_checkpoint),
            f"model.initialize_from_target_layers ({self.model.initialize_from_target_layers}) and "
            f"train.initial_checkpoint ({self.train.initial_checkpoint}) name two starts; give one",
        )
        require(
            self.evaluate.scheduler == "none" or self.model.enable_confidence_head,
            f"evaluate.scheduler ({self.evaluate.scheduler!r}) goes by the confidence head, and "
            "model.enable_confidence_head is false; set evaluate.scheduler=none",
        )
        every = self.evaluate.every
        require(
            every is None or self.needs_target_logits,
            "evaluate.every compares with the target's distribution, which an objective of cross "
            "entropy alone does not load; set evaluate.every=null, or give a term that compares "
            "(loss.terms.l1, loss.terms.kl, ...) a weight",
        )
        require(
            every is None or not self.target.is_stored,
            f"evaluate.every ({every}) needs the target for answers whose states "
            "are not stored; set evaluate.every=null or target.provider=huggingface",
        )
        self._check_confidence()
        self._check_passes()
        self._check_padding()
        if self.parallel.pipeline_parallel > 1:
            self._check_pipeline()

    def _check_scaled_parts(self) -> None:
        model = self.model
        there = {
            "markov_head": (model.markov_rank > 0, "model.markov_rank is 0"),
            "confidence_head": (
                model.enable_confidence_head,
                "model.enable_confidence_head is false",
            ),
        }
        for part, (is_there, why) in there.items():
            scale = getattr(self.optimizer.lr_scale, part)
            require(
                is_there or scale == 1,
                f"optimizer.lr_scale.{part} ({scale}) is of a head that the draft does not have: "
                f"{why}; leave it out",
            )

    def _check_overlap(self) -> None:
        if not self.optimizer.overlap_grad_reduce:
            return
        loss, waits = (
            self.loss,
            "optimizer.overlap_grad_reduce waits for the gradient of every weight",
        )
        require(
            not self.model.enable_confidence_head or loss.confidence_head_alpha > 0,
            f"{waits}, and the confidence head gets none: loss.confidence_head_alpha is 0; set "
            "model.enable_confidence_head=false or optimizer.overlap_grad_reduce=false",
        )
        require(
            not loss.confidence_stop_gradient or loss.terms.teach_something,
            f"{waits}, and the backbone gets none from loss.confidence_stop_gradient with "
            "loss.terms of 0; set optimizer.overlap_grad_reduce=false",
        )

    def _check_given(self) -> None:
        files, train = self.data.train_files, self.train
        require(bool(files), "data.train_files is empty; name at least one file")
        require(bool(train.output_dir), "train.output_dir is missing")
        require(
            (train.iterations is None) != (train.epochs is None),
            f"give exactly one of train.iterations ({train.iterations}) "
            f"and train.epochs ({train.epochs})",
        )
        require(
            self.model.sample_from_anchor or self.loss.slot_mask == "label",
            f"loss.slot_mask ({self.loss.slot_mask!r}) must be 'label' with "
            "model.sample_from_anchor=false: a slot's input stands where its label does; set "
            "loss.slot_mask=label",
        )

    def _check_confidence(self) -> None:
        loss = self.loss
        options = {
            "confidence_weights": loss.confidence_weights != "decay",
            "confidence_stop_gradient": loss.confidence_stop_gradient,
        }
        for name, given in options.items():
            require(
                not given or (self.model.enable_confidence_head and loss.confidence_head_alpha > 0),
                f"loss.{name} ({getattr(loss, name)}) is about the confidence head's loss, and "
                f"there is none with model.enable_confidence_head "
                f"({self.model.enable_confidence_head}) and loss.confidence_head_alpha "
                f"({loss.confidence_head_alpha}); set both, or "
                f"loss.{name}={str(getattr(LossConfig, name)).lower()}",
            )
        gamma, last = loss.loss_decay_gamma, self.model.num_draft_tokens - 1
        require(
            loss.confidence_weights != "reach"
            or loss.weighting.name != "decay"
            or gamma is None
            or last / gamma < 80,
            f"loss.loss_decay_gamma ({gamma}) leaves slot {last} no weight in fp32, and "
            "loss.confidence_weights 'reach' gives it one that nothing divides; raise "
            "loss.loss_decay_gamma, or set it to null",
        )

    def _check_passes(self) -> None:
        most, longest = self.target.max_tokens_per_forward, self.data.max_length
        require(
            self.target.provider != "megatron" or most is None or most >= longest,
            f"target.max_tokens_per_forward ({most}) must hold a whole sample with "
            f"target.provider=megatron: raise it to data.max_length ({longest}), or lower that",
        )
        most, size = self.target.samples_per_pass, self.train.micro_batch_size
        require(
            most is None or most >= size,
            f"target.samples_per_pass ({most}) must hold a micro-batch: raise it to "
            f"train.micro_batch_size ({size}), or lower that; target.max_tokens_per_forward is "
            "what cuts a micro-batch into several passes",
        )

    def _check_padding(self) -> None:
        require(
            not self.data.group_by_length or self.loss.normalization.startswith("global_"),
            "data.group_by_length changes which samples share a micro-batch, and with "
            f"loss.normalization {self.loss.normalization!r} that changes the gradient; set "
            "loss.normalization=global_step (or global_samples), or data.group_by_length=false",
        )
        require(
            not self.target.packing or self.target.samples_per_pass != 1,
            "target.packing puts the samples of a pass behind one another, and "
            "target.samples_per_pass (1) has one, without padding; set target.samples_per_pass > 1 "
            "or null, or target.packing=false",
        )

    def _check_pipeline(self) -> None:
        stages, target = self.parallel.pipeline_parallel, self.target
        require(
            target.provider == "megatron",
            f"parallel.pipeline_parallel ({stages}) needs target.provider=megatron, and it is "
            f"{target.provider!r}; set that, or split the target with parallel.tensor_parallel and "
            "target.shard_across_data_parallel",
        )
        require(
            target.max_tokens_per_forward is None,
            f"target.max_tokens_per_forward ({target.max_tokens_per_forward}) must be null with "
            f"parallel.pipeline_parallel ({stages}): a micro-batch goes through the stages whole; "
            "set train.micro_batch_size=1 and parallel.pipeline_micro_batches=1 for less memory",
        )
        require(
            target.samples_per_pass is None,
            f"target.samples_per_pass ({target.samples_per_pass}) must be null with "
            f"parallel.pipeline_parallel ({stages}): how many micro-batches go through the stages "
            "together is parallel.pipeline_micro_batches",
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def needs_target_logits(self) -> bool:
        """Whether the loss compares with the target's distribution."""
        return self.loss.needs_target_logits(with_confidence_head=self.model.enable_confidence_head)

    @property
    def min_loss_tokens(self) -> int:
        """`data.min_loss_tokens`, or twice the tokens that a block drafts (DeepSpec's default)."""
        return self.data.min_loss_tokens or 2 * self.model.num_draft_tokens
