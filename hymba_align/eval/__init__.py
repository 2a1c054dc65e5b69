"""Scores of a checkpoint: adapters to the official harnesses, and the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hymba_align.eval.result import Sample, Score, TaskResult, read_result

if TYPE_CHECKING:
    from hymba_align.recipe import EvalSection

__all__ = ["Sample", "Score", "TaskResult", "evaluate", "read_result"]


def evaluate(
    checkpoint: str | Path, section: EvalSection, out_dir: Path, *, chat_template: str = "hymba"
) -> dict[str, TaskResult]:
    """Results by task; each is also written to `out_dir/<task>.json` as soon as it is there.

    Runs on the GPU in bfloat16 where there is one, else on the CPU in float32.
    Raises: UsageError for a checkpoint, a file or settings that cannot be used.
    """
    import torch

    from hymba_align.checkpoint import check_embeddings, check_is_hymba, load_model
    from hymba_align.data.template import load_tokenizer
    from hymba_align.eval.gsm8k import score_gsm8k
    from hymba_align.model.kernels.choice import check_request

    check_request()
    check_is_hymba(checkpoint, None)  # before the tokenizer, whose absence would hide it
    cuda = torch.cuda.is_available()
    tokenizer = load_tokenizer(str(checkpoint), chat_template=chat_template)
    model = load_model(str(checkpoint), dtype="bfloat16" if cuda else "float32")
    check_embeddings(str(checkpoint), model.config.vocab_size, tokenizer)
    torch.nn.Module.to(model, "cuda" if cuda else "cpu")  # PreTrainedModel hides the signature
    results: dict[str, TaskResult] = {}
    for task in section.tasks:
        results[task] = {"gsm8k": score_gsm8k}[task](model.eval(), tokenizer, section)
        results[task].write(out_dir / f"{task}.json")
    return results
