"""A simulation of serving from files to files: recorded drafts and a table of step times go in,
figures and a picture come out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from dspark_megatron.conversion.sidecar import read_temperatures
from dspark_megatron.errors import require
from dspark_megatron.evaluation.draft_records import DraftRecords
from dspark_megatron.evaluation.pages.plots import png
from dspark_megatron.evaluation.serving.serving_plot import serving_plot
from dspark_megatron.evaluation.serving.serving_simulation import simulate_serving
from dspark_megatron.evaluation.serving.settings import ServingSettings
from dspark_megatron.evaluation.serving.sps_table import read_sps_table
from dspark_megatron.storage.checkpoints.named import NamedCheckpoint
from dspark_megatron.storage.writing import json_text, write_files


def simulate_files(
    records_file: Path,
    sps_file: Path,
    output: Path,
    *,
    requests: list[int],
    settings: ServingSettings,
    temperatures: Path | None,
) -> dict[str, Any]:
    """Settings and figures, by requests and policy; `output` then holds the same, and a picture
    lies beside it. temperatures: the folder of a calibrated draft."""
    require(
        output.parent.is_dir() and output.suffix == ".json",
        f"--output {output} must name a .json file in a folder that exists",
    )
    records = DraftRecords.load(records_file)
    table = read_sps_table(sps_file)
    if temperatures:
        draft = records.facts.get("iteration"), NamedCheckpoint.of_facts(records.facts)
        found = read_temperatures(temperatures, records.num_draft_tokens, *draft)
        settings = replace(settings, temperatures=found)
    figures = simulate_serving(records, table, requests, settings)
    about = {"records": str(records_file), "sps_table": str(sps_file), **vars(settings)}
    result = {**about, "drafts": records.facts, "figures": figures}
    write_files(
        output.parent,
        {
            picture_of(output).name: png(serving_plot(figures)),
            output.name: f"{json_text(result, indent=2)}\n".encode(),
        },
    )
    return result


def picture_of(output: Path) -> Path:
    return output.with_suffix(".png")
