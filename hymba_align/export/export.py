"""A model made ready for other people: weights, configuration, tokenizer, licence notes and a model card in a new folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hymba_align.export.folder import new_folder
from hymba_align.export.licence import write_notice
from hymba_align.export.merge import check_difference, in_words
from hymba_align.export.model_card import Card, write_card
from hymba_align.export.remote_code import fit_remote_code, leave_out_remote_code
from hymba_align.export.source import find_source, lineage
from hymba_align.export.weights import MAX_SHARD_SIZE, described, get_ready, write_checkpoint


@dataclass(frozen=True)
class ExportSettings:
    """How a model is exported. `license`, `title` and `place` go into the card.

    `license` replaces what follows from the base; `place` is what its users load: by default the folder's own name.
    """

    dtype: str | None = None
    base: str | None = None
    max_shard_size: str = MAX_SHARD_SIZE
    with_remote_code: bool = False
    license: str | None = None
    title: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class ExportResult:
    """What was written, and from where; `remarks` are what whoever hands the folder on has still to do."""

    output: Path
    checkpoint: str
    stage: str | None
    adapters: list[dict[str, Any]]
    dtype: str
    parameters: int
    bytes: int
    files: list[str]
    remote_code: bool
    license: str
    remarks: list[str]


def export(checkpoint: str, output: Path, settings: ExportSettings, *, say: Callable[[str], None]) -> ExportResult:
    """Writes a run's last finished training stage, a checkpoint or an adapter (merged) to a new folder that explains itself.

    Raises: UsageError for a source or a folder that cannot be used, StorageError for a disk that is too small.
    """
    source = find_source(checkpoint)
    ready = get_ready(source.checkpoint, output, base=settings.base, dtype=settings.dtype, compare=True)
    chain = ready.loaded.chain
    done = [described(one, merged) for one, merged in zip(chain.adapters, ready.loaded.merged, strict=True)]
    for one in reversed(done):
        check_difference(one)
        say(in_words(one))
    card = Card(
        title=settings.title or settings.place or output.name,
        place=settings.place or output.name,
        source=source,
        lineage=lineage(source, chain),
        license=settings.license,
        adapters=tuple(chain.adapters),
        config=ready.loaded.model.config,
        dtype=ready.dtype,
        parameters=ready.parameters,
        remote_code=settings.with_remote_code,
    )
    with new_folder(output) as folder:
        write_checkpoint(ready, folder, max_shard_size=settings.max_shard_size)
        if settings.with_remote_code:
            fit_remote_code(folder, ready.loaded.model.config, str(ready.tokenizer.chat_template))
        else:
            leave_out_remote_code(folder)
        remarks = [*write_notice(folder, card), *write_card(folder, card)]
    files = sorted(file.name for file in output.iterdir())
    size = sum((output / name).stat().st_size for name in files)
    for later in reversed(source.unfinished):
        told = f"{later}, a later stage of this run's recipe, is not finished, so this is the model of {source.stage}; "
        remarks.insert(0, f"{told}'hymba-align run RECIPE' finishes it")
    return ExportResult(
        output, source.checkpoint, source.stage, done, ready.dtype, ready.parameters, size, files,
        settings.with_remote_code, card.license_name, remarks,
    )  # fmt: skip
