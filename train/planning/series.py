"""The estimate of a series: memory, work and time of measuring its checkpoints, and their disk."""

from pathlib import Path

from selfcorrect.evaluate.measuring.series import find_numbers
from selfcorrect.evaluate.measuring.sources import is_on_hub, model_in
from selfcorrect.evaluate.scoring.limits import BATCH_TOKENS
from selfcorrect.evaluate.scoring.load_model import ADAPTER, base_of
from selfcorrect.evaluate.scoring.precision import resolved
from selfcorrect.recipes.schema import Model
from selfcorrect.recipes.series import Given, Series
from selfcorrect.train.planning.disk import Disk
from selfcorrect.train.planning.estimate import ModelEstimate
from selfcorrect.train.planning.flops import evaluation_work
from selfcorrect.train.planning.memory import Parallelism
from selfcorrect.train.planning.model_shape import ModelShape, model_shape
from selfcorrect.train.planning.settings import evaluation_devices
from selfcorrect.train.planning.stage_memory import evaluation_footprint

PUBLISHED_BYTES = 2.0  # of a weight on the hub


def estimate_series(
    series: Series, parallelism: Parallelism, only: str | None = None
) -> tuple[list[ModelEstimate], dict[str, int], list[str]]:
    """Return the estimate of each model, or of `only` one; checkpoints by model; and notes.

    Work and disk are those of all its checkpoints; of one if their number is not known, as where
    the hub cannot be reached, which a note says.
    """
    found, notes = find_numbers(series)
    evaluate, estimates, counts = series.evaluate, [], {}
    length = 256 + evaluate.max_new_tokens
    devices = evaluation_devices(evaluate, series.launch.processes)
    rows = max(1, BATCH_TOKENS["gpu" if parallelism.gpu else "cpu"] // length)
    for name in (model.name for model in series.models if only in (None, model.name)):
        entries = [given for given in found.checkpoints if given.model == name]
        count = sum(1 for given in entries for _ in given.places())
        counts[name] = count if all(given.is_listed for given in entries) else 0
        shape = _shape(entries[0], f"checkpoints.{found.checkpoints.index(entries[0])}")
        dtype = resolved(evaluate.dtype, shape.parameters, parallelism.fast)
        work = evaluation_work(series, shape, max(1, counts[name]))
        at_once = rows if work.sampled else 0
        size = PUBLISHED_BYTES * shape.parameters
        fetched = size * any(is_on_hub(given.path) for given in entries)
        kept = fetched * max(1, counts[name]) if series.keep_weights else 0.0
        estimates.append(
            ModelEstimate(
                name,
                shape,
                parallelism,
                [evaluation_footprint(shape, parallelism, at_once, length, dtype, devices)],
                [work],
                Disk(0.0, 0.0, kept, 0.0 if series.keep_weights else fetched),
                dtype != "float32",
                gathers=False,
                has_adapter=False,
                engine=evaluate.engine,
                measured_on=devices,
            )
        )
    return estimates, counts, notes


def _shape(given: Given, key: str) -> ModelShape:
    """Return the shape of an entry's first checkpoint; an adapter's is that of its base."""
    first = next((place for _, place in given.places()), given.place(0, None))
    path, revision, gguf_file = str(first.path), first.revision, first.gguf_file
    if not is_on_hub(path):
        found = None if gguf_file or path.endswith(".gguf") else model_in(Path(path).expanduser())
        if found is not None:
            adapter = found / ADAPTER
            path = (given.base or base_of(adapter)) if adapter.is_file() else str(found)
    elif given.base is not None:
        path = given.base
    if path.endswith(".gguf"):
        path, gguf_file = str(Path(path).parent), Path(path).name
    return model_shape(
        Model(name=given.model, path=path, revision=revision, gguf_file=gguf_file), key
    )
