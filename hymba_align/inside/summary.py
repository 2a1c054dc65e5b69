"""An inspection in a few lines: for a run's report, and for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hymba_align.inside.evidence import of_problems
from hymba_align.inside.findings_training import moved_parts, speed_of, typical_movement
from hymba_align.inside.result import Alignment, Cost, Finding, Importance, Inspection
from hymba_align.inside.wording import count, number, percent, signed, size_in_bytes, with_error
from hymba_align.inspect_choices import PARTS

MOST_FINDINGS = 7
HEAD = ("what", "measured")


@dataclass(frozen=True)
class Summary:
    """Plain texts, which whoever shows them has to escape."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    findings: tuple[Finding, ...]
    """Signs that something may be wrong first, then the most telling of each part"""
    read: str = ""
    """What was read, and what the checkpoint is compared with"""


def summary(inspection: Inspection) -> Summary:
    """The numbers that stand for each part, and the findings that matter most."""
    tasks = [one.metric for one in inspection.importance if one.metric != "loss"]
    return Summary(HEAD, tuple(_rows(inspection)), _chosen(inspection.findings, tasks), _read(inspection))


def _read(inspection: Inspection) -> str:
    told = [f"Read: {inspection.data.partition(chr(10))[0]}."] if inspection.data else []
    return " ".join([*told, *([f"Compared with {inspection.against}."] if inspection.against else [])])


def _chosen(findings: tuple[Finding, ...], tasks: Sequence[str]) -> tuple[Finding, ...]:
    """All signs if they fit, one of each part before a second, and each task's first sentence; then each part's."""
    signs = [one for one in findings if one.sign]
    of_tasks = [
        next((one for one in findings if one.part == "importance" and f"the score on {task}".lower() in one.text), None)
        for task in tasks
    ]
    firsts = [one for part in PARTS for one in [one for one in findings if one.part == part][:1]]
    of_parts = [one for part in PARTS for one in [one for one in signs if one.part == part][:1]]
    ordered = dict.fromkeys([*of_parts, *(one for one in of_tasks if one is not None), *signs, *firsts])
    chosen = list(ordered)[:MOST_FINDINGS]
    return tuple(sorted(chosen, key=lambda one: (not one.sign, PARTS.index(one.part))))


def _rows(inspection: Inspection) -> Iterator[tuple[str, str]]:
    if inspection.attention is not None:
        yield "attention on meta tokens", percent(inspection.attention.all_layers.meta) + _since(inspection)
    for importance in inspection.importance:
        yield from _importance(importance)
    if inspection.fusion is not None and inspection.fusion.layers:
        shares_of = [layer.ssm_share for layer in inspection.fusion.layers]
        yield (
            "SSM branch at the fusion",
            f"{percent(min(shares_of))} to {percent(max(shares_of))} of the squared size, by layer",
        )
    if inspection.meta_tokens is not None and inspection.meta_tokens.threshold_z is not None:
        preferring = {one.token for one in inspection.meta_tokens.preferences}
        total = len(inspection.meta_tokens.domains[0].mass)
        meta = inspection.meta_tokens
        cut = f"first {count(meta.first_tokens, 'token')} of each text{f', the median length in {meta.cut_by}' if meta.cut_by else ''}"
        yield "meta tokens that prefer a domain", f"{len(preferring)} of {total} ({cut.replace('_', ' ')})"
    if inspection.alignment is not None:
        yield from _alignment(inspection.alignment)
    if inspection.cost is not None:
        yield from _cost(inspection.cost)


def _since(inspection: Inspection) -> str:
    """By how much the attention on meta tokens changed, where it was compared over the same tokens."""
    before = inspection.alignment.attention_before if inspection.alignment is not None else None
    after = inspection.attention_compared
    if before is None or after is None or before.tokens != after.tokens:
        return ""
    change = 100 * (after.all_layers.meta - before.all_layers.meta)
    return f"; {signed(change, 2)} percentage points by training"


def _importance(importance: Importance) -> Iterator[tuple[str, str]]:
    name = "loss, nats per token" if importance.metric == "loss" else f"{importance.metric}, {importance.unit}"
    is_task = importance.metric != "loss"
    told = with_error(of_problems(importance.whole, importance.documents) if is_task else importance.whole)
    first = next((layer for layer in importance.layers if layer.layer == 0), None)
    if first is not None:
        digits = 1 if importance.unit.startswith("%") else 3
        told += f"; without the first layer's SSM heads {number(first.ssm.score, digits)}"
    yield name, told


def _alignment(alignment: Alignment) -> Iterator[tuple[str, str]]:
    moved = typical_movement(alignment.weights) if moved_parts(alignment.weights) else "nothing: the same, to the bit"
    yield "parts of the weights moved by", moved
    if alignment.divergence is not None:
        yield "KL, nats per token", with_error(alignment.divergence.kl)
    if alignment.pairs is not None and alignment.pairs.pairs:
        pairs = alignment.pairs
        made = f" ({pairs.made_rejected:,} made from the right ones)" if pairs.made_rejected else ""
        yield (
            f"chosen, rejected answers{made}, nats per token",
            f"{with_error(pairs.chosen_change, sign=True)}, {with_error(pairs.rejected_change, sign=True)}",
        )
        yield "margin, nats per pair", with_error(pairs.margin_change, sign=True)


def _cost(cost: Cost) -> Iterator[tuple[str, str]]:
    if cost.cache:
        last = max(cost.cache, key=lambda one: one.context)
        told = f"{size_in_bytes(last.formula)}, {number(last.ratio, 2)} times smaller than a transformer's"
        yield f"cache at {last.context:,} tokens", told
    if cost.decode:
        slow = max(cost.decode, key=lambda one: one.context)
        told = f"{number(slow.tokens_per_second, 1)} tokens per second; beside a transformer {speed_of(cost, slow)}"
        yield f"decoding at {slow.context:,} tokens", told
