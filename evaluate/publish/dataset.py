"""Write a run's results as a folder that `datasets.load_dataset` reads, with a card.

README.md                      the card: what the columns mean, and the configurations below
results.parquet                "results": the tidy table, one row per metric
items/<experiment>.parquet     "items-<experiment>": one row per scored prompt
prompts/<experiment>.parquet   "prompts-<experiment>": the texts that were asked
statistics.json                comparisons, trends and thresholds with intervals and p-values
"""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from selfcorrect.evaluate.measuring.cell_files import read_settings
from selfcorrect.evaluate.measuring.prompt_files import prompts_folder, read_prompts
from selfcorrect.evaluate.results import COLUMNS, results_of, write_items
from selfcorrect.evaluate.run_folder import find_checkpoints
from selfcorrect.evaluate.statistics.bootstrap import CONFIDENCE, NUM_RESAMPLES
from selfcorrect.evaluate.statistics.files import write_statistics
from selfcorrect.recipes.foundation.atomic_files import atomic_file, write_text
from selfcorrect.recipes.foundation.printable import escape_controls

_PROMPTS = pa.schema(
    [(name, pa.string()) for name in ("table", "condition", "item", "order", "prompt")]
)


def write_dataset(run: Path, out: Path) -> list[Path]:
    """Write the run's results as a dataset folder; return the paths, the card first.

    Raises InputError for a folder that is not a run, a damaged file, or a run without evaluations.
    """
    frame, statistics = results_of(run)
    results = out / "results.parquet"
    with atomic_file(results) as temporary:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        pq.write_table(table.replace_schema_metadata(None), temporary, compression="zstd")
    configs = {"results": "results.parquet"}
    paths = [results]
    for experiment in dict.fromkeys(frame["experiment"]):
        path = out / "items" / f"{experiment}.parquet"
        write_items(path, run, experiment=experiment)
        configs[f"items-{experiment}"] = path.relative_to(out).as_posix()
        paths.append(path)
        path = out / "prompts" / f"{experiment}.parquet"
        if _write_prompts(run, experiment, path):
            configs[f"prompts-{experiment}"] = path.relative_to(out).as_posix()
            paths.append(path)
    write_statistics(out / "statistics.json", statistics)
    write_text(out / "README.md", _card(run, configs))
    return [out / "README.md", out / "statistics.json", *paths]


def _write_prompts(run: Path, experiment: str, path: Path) -> bool:
    """Write the texts of all tables that the cells name; False where there is none."""
    tables: dict[str, Path] = {}
    for checkpoint in find_checkpoints(run):
        for cell in sorted(checkpoint.evaluation.glob("*.parquet")):
            settings = read_settings(cell)
            if settings["experiment"] == experiment and settings.get("prompts"):
                tables.setdefault(str(prompts_folder(cell.parent) / settings["prompts"]), cell)
    if not tables:
        return False
    with atomic_file(path) as temporary, pq.ParquetWriter(temporary, _PROMPTS) as file:
        for table, cell in tables.items():
            condition = read_settings(cell)["condition"]
            rows = [
                dict(zip(_PROMPTS.names, (Path(table).stem, condition, *key, prompt), strict=True))
                for key, prompt in read_prompts(cell).items()
            ]
            file.write_table(pa.Table.from_pylist(rows, schema=_PROMPTS))
    return True


def _card(run: Path, configs: dict[str, str]) -> str:
    from huggingface_hub import DatasetCard, DatasetCardData

    name = escape_controls(run.resolve().name)
    data = DatasetCardData(
        pretty_name=f"{name}: self-correction results",
        tags=["selfcorrect", "evaluation"],
        configs=[
            {"config_name": config, "data_files": path, "default": config == "results"}
            for config, path in configs.items()
        ],
    )
    columns = "\n".join(f"| `{column}` | {meaning} |" for column, (_, meaning) in COLUMNS.items())
    text = f"""# {name}: self-correction results

Metrics of every checkpoint, experiment and condition, with percentile bootstrap intervals
({CONFIDENCE:.0%}, {NUM_RESAMPLES:,} resamples of clusters), written by selfcorrect.

| column of `results` | meaning |
| --- | --- |
{columns}

`items-*` hold one row per scored prompt with the log-probability of every option, and `prompts-*`
the texts that were asked. `statistics.json` holds comparisons, trends and thresholds.
"""
    return str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))
