"""What both training stages share before training: quiet libraries, starting point, data across processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hymba_align.errors import RecipeError
from hymba_align.recipe import DataSection, Recipe
from hymba_align.terminal import print_words

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.sft_config import SFTConfig

    from hymba_align.data.packing import PackingReport
    from hymba_align.data.prepare import Prepared
    from hymba_align.train.preference_rows import RowsReport

DATA_RECORD = "data.json"
SHARED_DATASET = "dataset"


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keeps the terminal for what matters: no bar per file that is read or written, no warning meant for TRL."""
    import datasets
    from transformers.utils import logging as transformers_logging

    terminal = sys.stderr.isatty()
    bars, maps = transformers_logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    transformers_logging.disable_progress_bar()
    if not terminal:
        datasets.disable_progress_bars()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no GPU
    try:
        with warnings.catch_warnings():
            # TRL 1.16 reads the old name; delete when it reads `is_activation_checkpointing`.
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
            # TRL 1.16 calls transformers' old names beside adapters.
            warnings.filterwarnings(
                "ignore", message=r".gradient_checkpointing_(dis|en)able. is deprecated", category=FutureWarning
            )
            # DeepSpeed 0.19 calls torch's collectives by their old names, at every step.
            warnings.filterwarnings(
                "ignore", message=r".*torch\.distributed\.\w+. is deprecated", category=FutureWarning
            )
            yield
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
        if maps and not terminal:
            datasets.enable_progress_bars()


# ---- starting point and data ----------------------------------------------------------------------------------------


def load_start(recipe: Recipe, start: str | Path | None, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model that a stage starts from, with the tokenizer's special tokens in its configurations."""
    from hymba_align.checkpoint import build_base, check_embeddings, load_model

    if start is None:
        model = build_base(recipe.base, tokenizer, recipe.seed)
    else:
        model = load_model(str(start), dtype=recipe.base.dtype)
        check_embeddings(str(start), model.config.vocab_size, tokenizer)
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.eos_token_id = tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.use_cache = True  # the released file says false, which makes decoding quadratic
    return model


def load_start_tokenizer(recipe: Recipe, start: str | Path | None) -> PreTrainedTokenizerBase:
    """The tokenizer beside the starting checkpoint, or the base section's."""
    from hymba_align.checkpoint import tokenizer_place
    from hymba_align.data.template import load_tokenizer

    if start is not None:
        return load_tokenizer(str(start), chat_template=recipe.base.chat_template)
    path = recipe.base.tokenizer or recipe.base.model
    if path is None:
        raise RecipeError("base.tokenizer is missing; give the folder or hub id of a tokenizer beside base.config")
    revision = recipe.base.revision if path == recipe.base.model else None
    if recipe.base.tokenizer is None:  # an adapter may have none of its own
        path, revision = tokenizer_place(path, revision)
    return load_tokenizer(path, revision=revision, chat_template=recipe.base.chat_template)


def prepare_once(
    prepare: Callable[[], Prepared], stage_dir: Path, arguments: SFTConfig | DPOConfig, *, streaming: bool = False
) -> Prepared:
    """The prepared data, made by one process and read from `stage_dir` by the others; a stream is each process's own.

    Read from disk, so that every process sees one fingerprint: TRL's and our own `map` calls keep their results in files
    beside the data, and data in memory would send each process to a temporary folder of its own.
    """
    from accelerate.utils import broadcast_object_list
    from datasets import load_from_disk

    from hymba_align.data.prepare import Prepared

    if arguments.world_size == 1 or streaming:
        prepared = prepare()
        if arguments.process_index == 0:
            print_words(prepared.summary())
        return prepared
    folder = stage_dir / SHARED_DATASET
    shared: list[Any] = [None]
    if arguments.process_index == 0:
        shutil.rmtree(folder, ignore_errors=True)
        prepared = prepare()
        print_words(prepared.summary())
        sides = {"dataset": prepared.dataset, "validation": prepared.validation}
        for name, side in sides.items():
            if side is not None:
                side.save_to_disk(folder / name)
        shared = [(prepared.sources, [name for name, side in sides.items() if side is not None])]
    broadcast_object_list(shared)
    sources, written = shared[0]
    read = {name: load_from_disk(folder / name) for name in written}
    return Prepared(read["dataset"], read.get("validation"), sources)


def check_planned(data: DataSection, stage_dir: Path) -> None:
    """Raises DataError when the rows are not those that the stage was planned, and named, for; asked once they are read.

    A stage that nobody planned has no record of its rows.
    """
    from hymba_align.data.unchanged import check_unchanged
    from hymba_align.files import read_json

    record = stage_dir / "manifest.json"
    if record.is_file():
        check_unchanged(data, read_json(record).get("contents", ()))


def record_data(
    stage_dir: Path, prepared: Prepared, packing: PackingReport | None = None, *, rows: RowsReport | None = None
) -> None:
    """Writes data.json, which says what became of every source's rows and how full packed rows are; prints the latter.

    `packing` is about rows of documents, `rows` about rows of pairs.

    Of a stream it says, and prints, what became of the rows that were read by now.
    """
    from hymba_align.data.counts import losses_by_reason
    from hymba_align.files import write_json

    sources = []
    for source in prepared.counted():
        counted = {key: value for key, value in vars(source).items() if key not in ("lost", "cut")}
        reasons = {reason: len(lost) for reason, lost in losses_by_reason(source.lost)}
        sources.append({**counted, "lost": reasons, "shortened": len(source.cut)})
    validation = len(prepared.validation) if prepared.validation is not None else 0
    report = {**vars(packing), "fill_rate": packing.fill_rate} if packing is not None else None
    record = {"sources": sources, "validation": validation, "packing": report}
    write_json(stage_dir / DATA_RECORD, {**record, "rows": vars(rows)} if rows is not None else record)
    for source in prepared.counted() if prepared.streams else ():
        print_words(source.summary())
    if packing is not None:
        print_words("packing: " + "; ".join(packing.lines()[:2]))
    if rows is not None:
        print_words(rows.line())
