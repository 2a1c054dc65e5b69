"""What is exported, and where it comes from: the run it belongs to, and the model that training started from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hymba_align.adapter_config import ADAPTER_CONFIG
from hymba_align.adapter_folder import Chain
from hymba_align.errors import UsageError
from hymba_align.eval.report.contents import STAGES, TRAINING_STAGES, Run, read_run
from hymba_align.recipe import is_local_path
from hymba_align.run.folder import RunFolder
from hymba_align.run.manifest import MANIFEST, check_whole

NVIDIA = "nvidia/hymba"  # how the names of NVIDIA's repositories begin, in small letters


@dataclass(frozen=True)
class Source:
    """A checkpoint or adapter, and the run and stage that made it where that is known."""

    checkpoint: str
    run: Run | None
    stage: str | None
    unfinished: tuple[str, ...] = ()
    """Later stages of the run's recipe that are not finished, where the run folder itself was named"""


def find_source(checkpoint: str) -> Source:
    """What a run folder, a checkpoint, an adapter or a hub repository is to be exported as.

    A run folder stands for its last finished training stage; the weights that it starts from are exported by their own
    folder only. What a run knows of later stages than the exported one is left out.

    Raises:
        UsageError: a run folder without a finished training stage.
        CheckpointError: weights that changed since they were saved.
    """
    folder = Path(checkpoint)
    if not is_local_path(checkpoint) or not folder.is_dir():
        return Source(checkpoint, None, None)
    if (folder / "recipe.yaml").is_file() and not is_model(folder):
        return _checked(_of_run(folder, checkpoint))
    root, stage = folder.absolute().parent.parent, folder.absolute().parent.name
    if folder.name == "final" and stage in STAGES and (root / "recipe.yaml").is_file():
        return _checked(Source(checkpoint, _until(read_run(root), stage), stage))
    return _checked(Source(checkpoint, None, None))


def _of_run(root: Path, name: str) -> Source:
    """A run's last finished training stage. Raises: UsageError."""
    manifests = RunFolder(root)
    stages = [
        stage
        for stage in reversed(TRAINING_STAGES)
        if is_model(root / stage / "final") and "completed" in manifests.read_manifest(stage)
    ]
    if not stages:
        untrained = root / "base" / "final"
        where = f", or name {untrained}, the weights before training" if is_model(untrained) else ""
        raise UsageError(
            f"{name} is a run without a finished training stage; finish it with 'hymba-align run' first{where}"
        )
    stage, run = stages[0], read_run(root)
    unfinished = tuple(later for later in TRAINING_STAGES[TRAINING_STAGES.index(stage) + 1 :] if run.section(later))
    return Source(str(root / stage / "final"), _until(run, stage), stage, unfinished)


def is_model(folder: Path) -> bool:
    """Whether a folder is a checkpoint or an adapter, by its configuration."""
    return any((folder / name).is_file() for name in ("config.json", ADAPTER_CONFIG))


def _checked(source: Source) -> Source:
    if (Path(source.checkpoint) / MANIFEST).is_file():
        check_whole(Path(source.checkpoint), "make it again with the command that wrote it")
    return source


def _until(run: Run, stage: str) -> Run:
    """The run without the stages after one."""
    kept = STAGES[: STAGES.index(stage) + 1]
    metrics = {name: run.metrics[name] if name in kept else [] for name in TRAINING_STAGES}
    data = {name: run.data[name] if name in kept else {} for name in TRAINING_STAGES}
    scored = tuple(one for one in run.scored if one.stage in kept)
    recipe = {key: value for key, value in run.recipe.items() if key not in set(STAGES) - set(kept)}
    return dataclasses.replace(run, metrics=metrics, data=data, scored=scored, recipe=recipe)


@dataclass(frozen=True)
class Lineage:
    """The weights that a model descends from. `repository` is a hub repository; `words` say what is known."""

    repository: str | None
    words: str
    random: bool = False

    @property
    def from_nvidia(self) -> bool:
        """Whether they are NVIDIA's, by the name of their repository."""
        return self.repository is not None and self.repository.lower().startswith(NVIDIA)


def lineage(source: Source, chain: Chain) -> Lineage:
    """What is known about where a model's weights come from: from the run's recipe, else from its adapters, else nothing."""
    base = source.run.section("base") if source.run is not None else {}
    if base.get("config") is not None:
        return Lineage(None, "random weights of a shape that the recipe gives (`base.config`)", random=True)
    named, revision = base.get("model"), base.get("revision")
    if not isinstance(named, str):
        named, revision = (chain.base, chain.base_revision) if chain.adapters else (source.checkpoint, None)
    if not is_local_path(named):
        of = f" (revision {revision})" if revision else ""
        return Lineage(named, f"[{named}](https://huggingface.co/{named}){of}")
    if named == source.checkpoint:
        return Lineage(None, "unknown: the checkpoint does not say what it was trained from")
    return Lineage(None, f"a folder called `{PurePath(named).name}`; which weights those were is not recorded")


def without_places(value: Any) -> Any:
    """Plain values in which absolute paths, which name people and machines, are cut to their last part."""
    if isinstance(value, dict):
        return {key: without_places(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_places(inner) for inner in value]
    return short_path(value) if isinstance(value, str) else value


def short_path(text: str) -> str:
    """A path of this machine as its last part; any other text as it is."""
    alone = "\n" not in text and " " not in text
    is_path = alone and (text.startswith(("/", "~", "..", "file://")) or PurePath(text).is_absolute())
    return f"…/{PurePath(text).name}" if is_path and PurePath(text).name else text
