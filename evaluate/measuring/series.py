"""Open a series as a run folder: find its checkpoints, check them, and record where they are.

From then on `run.evaluate_run` measures it like a run of this project whose training has ended.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from selfcorrect.evaluate.measuring.inputs import check_inputs
from selfcorrect.evaluate.measuring.run import recipe_plan
from selfcorrect.evaluate.measuring.sources import (
    cached_commit,
    hub_commit,
    hub_configuration,
    hub_revisions,
    is_on_hub,
    local_model,
    model_in,
    recorded_step,
    version_of,
)
from selfcorrect.evaluate.run_folder import (
    CheckpointKey,
    CheckpointRecord,
    Source,
    checkpoint_folder,
    find_checkpoints,
    read_checkpoint,
)
from selfcorrect.evaluate.scoring.load_model import ADAPTER, base_of
from selfcorrect.evaluate.scoring.precision import num_parameters
from selfcorrect.recipes.foundation.checksums import file_digest
from selfcorrect.recipes.foundation.errors import (
    InputError,
    RunFailure,
    is_from_outside,
    reason_of,
)
from selfcorrect.recipes.foundation.locks import hold_lock
from selfcorrect.recipes.load import load_measured, save_recipe
from selfcorrect.recipes.series import (
    SIZE_TOLERANCE,
    Given,
    Numbers,
    Place,
    Series,
    fill,
    parse_size,
    pattern_of,
    with_steps,
)

# Folders of checkpoints as trainers write them: Hugging Face and TRL, verl, OpenRLHF, open-instruct
# and prime-rl.
TRAINERS = (
    "checkpoint-{step}",
    "global_step_{step}",
    "global_step{step}_hf",
    "step_{step}",
    "weights/step_{step}",
)
_COMMIT = re.compile(r"[0-9a-f]{7,40}")

_sizes: dict[tuple[str, bool], int] = {}  # by the digest of a configuration


def adopt(folder: Path) -> str | None:
    """Return the pattern of a trainer's checkpoints in its output folder, None if it has none.

    A folder that is a model itself must hold several.
    """
    if not folder.is_dir() or (folder / "recipe.yaml").is_file():
        return None
    is_model = any((folder / name).is_file() for name in ("config.json", ADAPTER))
    counts: dict[str, int] = {}
    for pattern in TRAINERS:
        found = list(_folders(str(folder / pattern)))
        counts[pattern] = sum(_holds_model(path) for path, _ in found)
    best = max(counts, key=lambda pattern: counts[pattern])
    return str(folder / best) if counts[best] > is_model else None


def _holds_model(folder: Path) -> bool:
    try:
        return model_in(folder) is not None
    except InputError:
        return True  # in a form that needs a step by hand, which opening the series explains


def open_series(series: Series, run: Path, *, wait: bool = False) -> tuple[Series, bool]:
    """Write recipe.yaml and the checkpoints' records into `run`.

    Returns the series with all steps listed, and whether anything has changed. The caller holds the
    run's lock. With `wait`, listed checkpoints may appear later.

    Raises InputError, before anything is written, for a folder of another run, benchmarks that
    cannot be used, a checkpoint that does not exist or is given twice, sizes that contradict the
    configurations, and adapters of different bases; RunFailure if the hub cannot be reached.
    """
    old = _old_series(series, run)
    try:
        found = _Search(series, run, wait).find()
        resolved = with_steps(series, found.numbers)
        if old != resolved:
            recipe_plan(resolved, run)
    except (InputError, RunFailure):
        if old is None:
            shutil.rmtree(run, ignore_errors=True)
        raise
    changed = old != resolved
    if changed:
        save_recipe(resolved, run / "recipe.yaml")
        check_inputs(resolved, run, training=False)
    for checkpoint in find_checkpoints(run, {}):
        is_ours = checkpoint.record.source is not None and checkpoint.key not in found.sources
        if is_ours and not any(checkpoint.evaluation.glob("*.parquet")):
            with hold_lock(checkpoint.evaluation) as is_free:
                if is_free:
                    shutil.rmtree(checkpoint.folder)
    for key, source in found.sources.items():
        changed |= _record(resolved, run, key, source, found.parameters[key.model])
    return resolved, changed


def _old_series(series: Series, run: Path) -> Series | None:
    path = run / "recipe.yaml"
    if not path.is_file():
        if run.is_dir() and any(entry.name != ".lock" for entry in run.iterdir()):
            raise InputError(f"{run}: neither empty nor a run of this series; give another --out")
        return None
    old = load_measured(str(path))
    if not isinstance(old, Series) or old.name != series.name:
        raise InputError(f"{run}: the run of {old.name}; give another --out, or another name")
    return old


def _record(series: Series, run: Path, key: CheckpointKey, source: Source, size: int) -> bool:
    """Write a checkpoint's record, unless it is there; return whether it was written.

    The digest of its weights is unknown until they are loaded, also if they may have changed.
    """
    folder = checkpoint_folder(series, run, key)
    known = _known(folder)
    if known is not None and known.source == source and known.parameters == size:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    CheckpointRecord(
        **key._asdict(),
        parameters=size,
        episodes=None,
        tokens=None,
        optimizer_updates=None,
        kl=None,
        reward=None,
        source=source,
        recipe_digest=hashlib.sha256(source.model_dump_json().encode()).hexdigest(),
        versions={},
    ).write(folder)
    return True


def _known(folder: Path) -> CheckpointRecord | None:
    try:
        return read_checkpoint(folder).record
    except InputError:
        return None  # none, or a damaged one


def find_numbers(series: Series) -> tuple[Series, list[str]]:
    """Return the series with the steps that exist now, and a note for each that is not known."""
    search = _Search(series, Path(), wait=False, pauses=())
    found: dict[int, list[Numbers]] = {}
    notes = []
    for index, given in enumerate(series.checkpoints):
        if not given.is_listed:
            try:
                found[index] = list(search.discover(given))
            except (InputError, RunFailure) as error:
                notes.append(f"{given.model}: steps are not known: {error}")
    return with_steps(series, found), notes


@dataclass
class _Search:
    """The search for the checkpoints of a series."""

    series: Series
    run: Path
    wait: bool
    pauses: Sequence[float] | None = None
    sources: dict[CheckpointKey, Source] = field(default_factory=dict)
    numbers: dict[int, list[Numbers]] = field(default_factory=dict)
    """Seeds and steps found, by position of the entry that does not list them."""
    parameters: dict[str, int] = field(default_factory=dict)
    """The size of each model, as its first checkpoint's configuration has it."""
    bases: dict[str, tuple[str, str]] = field(default_factory=dict)
    """The base of each model's adapters, and the adapter that names it."""
    revisions: dict[str, dict[str, str] | RunFailure] = field(default_factory=dict)
    """The commits of each hub model's revisions, or why they are not known."""

    def find(self) -> "_Search":
        """Fill in sources, numbers and sizes; raises as `open_series`."""
        try:
            self._find()
        except InputError as error:
            raise InputError(f"{self.series.name}: {error}") from None
        return self

    def _find(self) -> None:
        for index, given in enumerate(self.series.checkpoints):
            places = self.discover(given) if given.is_searched else dict(given.places())
            if not given.is_listed:
                self.numbers[index] = list(places)
            first = True
            for (seed, step), place in places.items():
                key = CheckpointKey(given.model, seed, step)
                if key in self.sources:
                    raise InputError(f"checkpoints: {key} is given twice, once as {place}")
                source = self._source(given, key, place)
                if source is None:
                    continue  # it may come yet
                self.sources[key] = source
                if not source.on_hub or first or given.model in self.bases:
                    self._check_size(given, source, place)
                first = False

    def discover(self, given: Given) -> dict[Numbers, Place]:
        """Return the checkpoints that exist, by seed and step."""
        found: list[tuple[Numbers, Place]] = []
        there = ""
        if not is_on_hub(given.path):
            for path, groups in _folders(given.path):
                if model_in(path) is not None if given.gguf_file is None else path.is_dir():
                    numbers = _numbers(given, groups)
                    found.append((numbers, given.place(*numbers)._replace(path=str(path))))
        else:
            is_seeded = "{seed}" in given.path
            if given.revision is None or "{step}" in given.path or (is_seeded and not given.seeds):
                raise InputError(
                    f"checkpoints: {given.model}: {given.path}: steps can be looked for in a hub "
                    "model's revisions, or in folders: list steps, and seeds in names of models"
                )
            for repo_seed in given.seeds or [0] if is_seeded else [None]:
                repo = fill(given.path, repo_seed, None)
                pattern = pattern_of(fill(given.revision, repo_seed, None))
                known = self._revisions(repo)
                there = f"; its revisions are {_some(sorted(known))}"
                for name in known:
                    if match := pattern.fullmatch(name):
                        numbers = _numbers(given, match.groupdict(), repo_seed)
                        place = Place(repo, name, fill(given.gguf_file or "", *numbers) or None)
                        found.append((numbers, place))
        places = dict(found)
        if len(places) < len(found):
            double = next(n for n in places if sum(n == other for other, _ in found) > 1)
            both = " and ".join(str(place) for n, place in found if n == double)
            raise InputError(f"checkpoints: {given.model}: {both} are both step {double.step}")
        if not places and not self.wait:
            raise InputError(
                f"checkpoints: {given.model}: nothing like {given.place(None, None)}{there}"
            )
        seeds = given.seeds or sorted({seed for seed, _ in places})
        for seed in seeds if not self.wait else ():
            for step in given.steps or sorted({step for n, step in places if n == seed}) or [0]:
                if (seed, step) not in places:
                    missing = given.place(seed, step if given.steps else None)
                    raise InputError(f"checkpoints: {given.model}: nothing like {missing}{there}")
        return {
            Numbers(seed, step): places[Numbers(seed, step)]
            for seed, step in sorted(places)
            if seed in seeds and (given.steps is None or step in given.steps)
        }

    def _source(self, given: Given, key: CheckpointKey, place: Place) -> Source | None:
        """Return where a checkpoint is; None if it is not there yet, and may come."""
        assert place.path is not None
        where: dict[str, str | None] = {"gguf_file": place.gguf_file, "base": given.base}
        place = self._as_written(given, key, place)
        assert place.path is not None
        if is_on_hub(given.path):
            commit = self._commit(place.path, place.revision or "main", key)
            if commit is None:
                return None
            where |= {"revision": place.revision, "version": commit}
            return Source.model_validate({"path": place.path, "on_hub": True, **where})
        if place.revision is not None:
            raise InputError(
                f"checkpoints: {key}: {place.path} is a folder, which has no revision: remove it"
            )
        folder = Path(place.path).expanduser().absolute()
        source = Source.model_validate(
            {"path": str(folder), "on_hub": False, "version": "", **where}
        )
        try:
            model = local_model(source)
        except FileNotFoundError:
            if self.wait:
                return None
            raise InputError(
                f"checkpoints: {key}: {place} has no model (a folder with config.json and "
                "*.safetensors, an adapter, or a GGUF file)"
            ) from None
        recorded = recorded_step(model)
        if recorded not in (None, key.step) and "{step}" in given.path:
            raise InputError(
                f"checkpoints: {key}: {model / 'trainer_state.json'} says step {recorded}; list "
                "the checkpoint with that step"
            )
        if (model / ADAPTER).is_file():
            self._check_base(model / ADAPTER, given, str(place))
        return source.model_copy(update={"version": version_of(model)})

    def _as_written(self, given: Given, key: CheckpointKey, place: Place) -> Place:
        """Return the place as the hub or the disk writes its number: step_0025 for step 25."""
        assert place.path is not None
        if not is_on_hub(given.path):
            if Path(place.path).expanduser().exists():
                return place
            numbers = Numbers(key.seed, key.step)
            paths = [
                str(p) for p, found in _folders(given.path) if _numbers(given, found) == numbers
            ]
            return place._replace(path=paths[0]) if len(paths) == 1 else place
        try:
            known = set(self._revisions(place.path))
        except (InputError, RunFailure):  # offline: as recorded
            record = _known(checkpoint_folder(self.series, self.run, key))
            source = None if record is None else record.source
            known = set() if source is None or source.revision is None else {source.revision}
        if place.revision is None or place.revision in known:
            return place
        wanted = _unpadded(place.revision)
        names = [name for name in known if _unpadded(name) == wanted]
        return place._replace(revision=names[0]) if len(names) == 1 else place

    def _commit(self, repo: str, revision: str, key: CheckpointKey) -> str | None:
        try:
            known = self._revisions(repo)
        except (InputError, RunFailure):  # offline: as recorded, or as fetched to the cache
            record = _known(checkpoint_folder(self.series, self.run, key))
            source = None if record is None else record.source
            if source is not None and (source.path, source.revision or "main") == (repo, revision):
                return source.version
            if commit := cached_commit(repo, revision):
                return commit
            raise
        if revision in known:
            return known[revision]
        if _COMMIT.fullmatch(revision) or revision.startswith("refs/pr/"):
            return hub_commit(repo, revision)
        if self.wait:
            return None
        raise InputError(
            f"checkpoints: {key}: {repo} has no revision {revision} on the hub; it has "
            f"{_some(sorted(known))}"
        )

    def _revisions(self, repo: str) -> dict[str, str]:
        if repo not in self.revisions:
            try:
                self.revisions[repo] = hub_revisions(repo, self.pauses)
            except RunFailure as error:
                self.revisions[repo], self.pauses = error, ()  # the next will not be waited for
        known = self.revisions[repo]
        if isinstance(known, RunFailure):
            raise known
        return known

    def _check_base(self, adapter: Path, given: Given, place: str) -> None:
        """Raise InputError unless an adapter is for the base that others and the series name."""
        named = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if given.base is not None:
            if Path(str(named)).name != Path(given.base).name:
                raise InputError(
                    f"checkpoints: {given.model}: base: {given.base}, but {adapter} was trained on "
                    f"{named}; give that model, or correct base_model_name_or_path there"
                )
            base = given.base
        else:
            base = base_of(adapter)
        other, source = self.bases.setdefault(given.model, (base, place))
        if other != base:
            raise InputError(
                f"checkpoints: {given.model}: the adapter {place} is for {base}, {source} for "
                f"{other}; give adapters of different bases different model names"
            )

    def _check_size(self, given: Given, source: Source, place: Place) -> None:
        """Raise InputError if a checkpoint's size contradicts the series or its other steps."""
        if source.on_hub and source.gguf_file is None:
            adapter = hub_configuration(source.path, source.version) / ADAPTER
            if adapter.is_file():
                self._check_base(adapter, given, str(place))
        size = _parameters(source, given)
        told = None if given.size is None else parse_size(given.size)
        if told is not None and abs(size - told) > SIZE_TOLERANCE * told:
            raise InputError(
                f"checkpoints: {given.model}: size: {given.size}, but {place} has {size:,} "
                "parameters"
            )
        other = self.parameters.setdefault(given.model, size)
        if abs(size - other) > SIZE_TOLERANCE * other:
            raise InputError(
                f"checkpoints: {given.model}: {place} has {size:,} parameters, other checkpoints "
                f"have {other:,}; give models of different sizes different names"
            )


def _folders(pattern: str) -> Iterator[tuple[Path, dict[str, str]]]:
    """Yield the paths on this disk that match a pattern, with the numbers of its groups."""
    found: list[tuple[Path, dict[str, str]]] = [(Path(), {})]
    for part in Path(pattern).expanduser().absolute().parts:
        deeper: list[tuple[Path, dict[str, str]]] = []
        for folder, groups in found:
            if "{" not in part and "*" not in part:
                deeper.append((folder / part, groups))
            elif folder.is_dir():
                expression = pattern_of(part)
                for path in folder.iterdir():
                    match = expression.fullmatch(path.name)
                    new = match.groupdict() if match else {}
                    if match and all(groups.get(name, n) == n for name, n in new.items()):
                        deeper.append((path, {**groups, **new}))
        found = deeper
    yield from ((path, groups) for path, groups in found if path.exists())


def _numbers(given: Given, groups: dict[str, str], seed_of_model: int | None = None) -> Numbers:
    """Return seed and step; what the pattern does not say, the entry does."""
    seed: int | str | None = groups.get("seed", seed_of_model)
    if seed is None:
        seed = given.seeds[0] if given.seeds else 0
    step = groups.get("step", given.steps[0] if given.steps else 0)
    return Numbers(int(seed), int(step))


def _unpadded(name: str) -> str:
    """Return a name whose numbers have no leading zeros."""
    return re.sub(r"(?<![0-9])0+(?=[0-9])", "", name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _parameters(source: Source, given: Given) -> int:
    """Return the parameters of a checkpoint, or of an adapter's base, by its configuration."""
    from transformers import AutoConfig

    options: dict[str, str] = {}
    if source.on_hub and source.gguf_file is not None:
        told = None if given.size is None else parse_size(given.size)
        if told is None:
            raise InputError(
                f"checkpoints: {given.model}: size: give it, such as 1.4B: the file "
                f"{source.gguf_file} on the hub does not tell before it is fetched"
            )
        return round(told)
    folder = (
        hub_configuration(source.path, source.version) if source.on_hub else local_model(source)
    )
    if (folder / ADAPTER).is_file():
        base = source.base or base_of(folder / ADAPTER)
        if is_on_hub(base):
            folder = hub_configuration(base, hub_revisions(base)["main"])
        else:
            folder = Path(base).expanduser()
    if folder.is_file():
        folder, options = folder.parent, {"gguf_file": folder.name}
    file = folder / options.get("gguf_file", "config.json")
    try:
        key = (version_of(file) if options else file_digest(file), given.trust_remote_code)
        if key in _sizes:
            return _sizes[key]
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=given.trust_remote_code, **options
        )
        return _sizes.setdefault(key, num_parameters(config, given.trust_remote_code))
    except Exception as error:  # the library raises all kinds
        if is_from_outside(error):
            raise
        raise InputError(
            f"checkpoints: {given.model}: {source.path}: its configuration cannot be read "
            f"({reason_of(error)})"
        ) from None
