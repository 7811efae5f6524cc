"""The data of a planned run, read by its own rules, with a mask token that they do not have."""

from dataclasses import dataclass, replace

from dspark_megatron.config import Config
from dspark_megatron.data.dataset import ConversationDataset
from dspark_megatron.data.rules import DropReport
from dspark_megatron.data.tokenizing.encoding import mask_token_found
from dspark_megatron.errors import ConfigError
from dspark_megatron.planning.mask_token import MaskToken, mask_tokens
from dspark_megatron.run.check import check
from dspark_megatron.run.data import load_run_data
from dspark_megatron.run.identity import fix_template_day
from dspark_megatron.storage.target_folder import load_target_config, load_tokenizer, stop_token_ids


@dataclass(frozen=True)
class PlannedData:
    config: Config
    """Of the run, with its mask token."""
    mask: MaskToken
    report: DropReport
    longest: int
    """Tokens of the longest sample that is kept."""

    def lines(self) -> list[str]:
        report, length = self.report, self.config.data.max_length
        mean, share = report.total_tokens / report.kept, report.loss_tokens / report.total_tokens
        return [
            *report.describe().splitlines(),
            f"a sample has {mean:,.0f} tokens on average and {self.longest:,} at most, of "
            f"{length:,}; the loss mask has {share:.0%} of all tokens",
            f"mask token: {self.mask.words()}; no sample has it",
        ]


def read_data(config: Config, *, show_progress: bool = False) -> PlannedData:
    """Read all data.train_files as training does, once for each mask token that has to be tried;
    one that the config names is the only one. ConfigError where training would have it, and where
    no mask token is safe."""
    tried: list[MaskToken] = []
    for mask in _choices(config):
        chosen = replace(config, model=replace(config.model, mask_token_id=mask.id))
        try:
            dataset = _dataset(chosen, show_progress)
        except ConfigError as error:
            if config.model.mask_token_id is not None or not _has(str(error), mask):
                raise
        else:
            report = dataset.report
            if not _has(report.bad_lines.describe(), mask):
                return PlannedData(chosen, mask, report, int(dataset.lengths.max()))
        tried.append(mask)
    raise ConfigError(_none_is_safe(tried))


def _none_is_safe(tried: list[MaskToken]) -> str:
    way_out = "set model.mask_token_id to a token that never occurs in the data"
    if not tried:
        why = "the tokenizer has no reserved token, and the embedding no row that is no token"
        return f"no mask token is safe: {why}; {way_out}"
    seen = "; ".join(mask.words() for mask in tried)
    return (
        f"no mask token is safe: the data have each that was tried ({seen}); {way_out}, or take "
        "the lines that have one of these out"
    )


def _choices(config: Config) -> list[MaskToken]:
    given, path = config.model.mask_token_id, config.target.path
    if given is not None:
        return [MaskToken(given, "", "as given")]
    tokenizer = load_tokenizer(path)
    return mask_tokens(tokenizer, load_target_config(path), stop_token_ids(path, tokenizer))


def _has(reasons: str, mask: MaskToken) -> bool:
    """Whether lines were refused because of the mask token."""
    return mask_token_found(mask.id) in reasons


def _dataset(config: Config, show_progress: bool) -> ConversationDataset:
    layout, data = config.parallel, config.data
    ranks = layout.tensor_parallel * max(1, config.target.shard_across_data_parallel)
    plan = check(config, max(ranks, layout.expert_parallel))  # the smallest job that it allows
    fix_template_day(plan, lambda choose: choose())
    return load_run_data(plan, data.train_files, weights=data.weights, show_progress=show_progress)
