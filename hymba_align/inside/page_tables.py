"""The numbers behind each part's plots, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hymba_align.inside.evidence import of_problems
from hymba_align.inside.result import (
    Alignment,
    Attention,
    BranchSize,
    Cost,
    Divergence,
    Fusion,
    Importance,
    Inspection,
    Measured,
    MetaTokens,
    Pairs,
    Shares,
)
from hymba_align.inside.wording import count, number, percent, signed, size_in_bytes, with_error
from hymba_align.inspect_choices import Part


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: frozenset[int] = frozenset()
    """Columns that hold texts of others, beside the first"""
    note: str = ""


def tables(inspection: Inspection) -> dict[Part, list[Table]]:
    """By part, in the order of the page."""
    found: dict[Part, list[Table]] = {}
    if inspection.attention is not None:
        found["attention"] = list(_attention(inspection.attention))
    found["importance"] = [_importance(one) for one in inspection.importance]
    if inspection.fusion is not None:
        found["fusion"] = [_fusion(inspection.fusion)]
    if inspection.meta_tokens is not None:
        found["meta_tokens"] = list(_meta_tokens(inspection.meta_tokens))
    if inspection.alignment is not None:
        found["alignment"] = list(_alignment(inspection.alignment))
        before, after = inspection.alignment.attention_before, inspection.attention_compared
        if before is not None and after is not None:
            found["alignment"].append(_attention_change(before, after))
    if inspection.cost is not None:
        found["cost"] = list(_cost(inspection.cost))
    return found


def _layer(layer: int, is_global: bool) -> str:
    return f"{layer}, global" if is_global else str(layer)


# ---- attention, importance, fusion -----------------------------------------------------------------------------------

SHARES = ("meta tokens, %", "<s>, %", "itself, %", "other tokens, %", "entropy, nats", "if even, nats")


def _attention(attention: Attention) -> Iterator[Table]:
    rows = [(_layer(one.layer, one.is_global), str(one.kv_source), *_shares(one.mean)) for one in attention.layers]
    for name, shares in (
        ("global layers", attention.global_layers),
        ("local layers", attention.local_layers),
        ("all layers", attention.all_layers),
    ):
        rows += [(name, "", *_shares(shares))] if shares is not None else []
    yield Table("Attention by layer", ("layer", "keys of layer", *SHARES), tuple(rows))
    heads = [
        (f"{one.layer}, head {at}", *_shares(head)) for one in attention.layers for at, head in enumerate(one.heads)
    ]
    yield Table("Attention by head", ("layer and head", *SHARES), tuple(heads))


def _shares(shares: Shares) -> tuple[str, ...]:
    parts = (shares.meta, shares.bos, shares.self, shares.cross)
    return (*(number(100 * part, 2) for part in parts), number(shares.entropy), number(shares.even_entropy))


def _importance(importance: Importance) -> Table:
    name = "Loss" if importance.metric == "loss" else importance.metric
    is_task = importance.metric != "loss"
    unit = "percentage points" if importance.unit.startswith("%") else importance.unit
    digits = 1 if importance.unit.startswith("%") else 3

    def change(measured: Measured) -> str:
        return with_error(of_problems(measured, importance.documents) if is_task else measured, sign=True)

    rows = tuple(
        (
            _layer(one.layer, one.is_global),
            number(one.attention.score, digits),
            change(one.attention.change),
            number(one.ssm.score, digits),
            change(one.ssm.change),
            change(one.difference),
        )
        for one in importance.layers
    )
    head = ("layer", "without attention heads", "change", "without SSM heads", "change", "difference")
    whole = of_problems(importance.whole, importance.documents) if is_task else importance.whole
    note = f"{importance.unit}; the whole model has {with_error(whole)}; changes in {unit}, paired over the same "
    note += f"{'problems' if is_task else 'documents'} ({importance.documents:,})."
    if is_task:
        note += " Where all problems go alike, ± is what Laplace's rule of succession leaves, not 0."
    return Table(f"{name} without a branch", head, rows, note=note)


def _fusion(fusion: Fusion) -> Table:
    rows = []
    for one in fusion.layers:
        shown = _layer(one.layer, one.is_global), number(one.cosine), number(100 * one.ssm_share, 1)
        rows.append((shown[0], *_size(one.attention), *_size(one.ssm), *shown[1:]))
    each = ("before its norm", "after it", "scale", "scale from", "scale to")
    head = (
        "layer",
        *(f"attention {word}" for word in each),
        *(f"SSM {word}" for word in each),
        "cosine",
        "SSM share, %",
    )
    return Table("Sizes at the fusion", head, tuple(rows))


def _size(size: BranchSize) -> tuple[str, ...]:
    return tuple(number(value) for value in (size.before, size.after, size.scale, size.scale_min, size.scale_max))


# ---- meta tokens -----------------------------------------------------------------------------------------------------


def _meta_tokens(meta: MetaTokens) -> Iterator[Table]:
    if meta.domains:
        names = [one.domain.replace("_", " ") for one in meta.domains]
        yield Table(
            "What was read for each domain",
            ("domain", "from", "documents", "tokens", "characters per token", "unknown, %"),
            tuple(
                (
                    name,
                    one.source,
                    f"{one.documents:,}",
                    f"{one.tokens:,}",
                    number(one.characters_per_token, 2),
                    number(100 * one.unknown, 2),
                )
                for name, one in zip(names, meta.domains, strict=True)
            ),
            texts=frozenset({1}),
        )
        shares = zip(*(one.share for one in meta.domains), strict=True)
        masses = zip(*(one.mass for one in meta.domains), strict=True)
        rows = (
            (str(token), *(number(100 * value, 2) for value in (*share, *mass)))
            for token, (share, mass) in enumerate(zip(shares, masses, strict=True))
        )
        head = ("meta token", *(f"{name}, of meta, %" for name in names), *(f"{name}, of all, %" for name in names))
        yield Table("Attention on each meta token", head, tuple(rows))
    if meta.preferences:
        yield Table(
            "Preferences",
            ("meta token", "domain", "share there, %", "share elsewhere, %", "standard errors"),
            tuple(
                (
                    str(one.token),
                    one.domain.replace("_", " "),
                    number(100 * one.share, 2),
                    number(100 * one.share_elsewhere, 2),
                    number(one.z, 1),
                )
                for one in meta.preferences
            ),
            texts=frozenset({1}),
        )
    if meta.movement:
        yield Table(
            "How far meta tokens moved",
            ("meta token", "distance", "of its length, %", "cosine"),
            tuple(
                (str(one.token), number(one.distance, 4), number(100 * one.relative, 2), number(one.cosine, 5))
                for one in meta.movement
            ),
        )


# ---- alignment -------------------------------------------------------------------------------------------------------


def _alignment(alignment: Alignment) -> Iterator[Table]:
    if alignment.divergence is not None:
        yield from _divergence(alignment.divergence, alignment.dtype)
    if alignment.pairs is not None:
        yield _pairs(alignment.pairs, alignment.dtype)
        if alignment.pairs.examples:
            yield _examples(alignment.pairs)
    rows = [
        (
            "outside layers" if one.layer is None else str(one.layer),
            "SSM" if one.part == "ssm" else "MLP" if one.part == "mlp" else one.part,
            f"{one.parameters:,}",
            number(one.distance, 4),
            number(100 * one.relative, 3),
            number(100 * one.share, 2),
        )
        for one in alignment.weights
    ]
    whole = alignment.whole
    rows.append(("all", "", f"{whole.parameters:,}", number(whole.distance, 4), number(100 * whole.relative, 3), "100"))
    head = ("layer", "part", "parameters", "distance", "of its length, %", "of the squared distance, %")
    note = f"Weights were compared in {alignment.dtype}.{_dominated(alignment)}"
    yield Table("How far weights moved", head, tuple(rows), texts=frozenset({1}), note=note)


def _dominated(alignment: Alignment) -> str:
    """What the line of all weights is mostly about, where one part makes up most of their length."""
    squares: dict[str, float] = {}
    for one in alignment.weights:
        if one.relative > 0:
            squares[one.part] = squares.get(one.part, 0.0) + (one.distance / one.relative) ** 2
    whole = alignment.whole
    if not squares or whole.relative <= 0:
        return ""
    part = max(squares, key=lambda name: squares[name])
    share = squares[part] / (whole.distance / whole.relative) ** 2
    if share <= 0.5:
        return ""
    constants = ", where constants such as A_log and the biases of dt_proj are large" if part == "ssm" else ""
    name = {"ssm": "the SSM branches", "mlp": "the MLPs"}.get(part, part)
    return f" The last line says mostly how far {name} moved: they make up {percent(share)} of the squared length of all{constants}."


def _attention_change(before: Attention, after: Attention) -> Table:
    """Shares of each layer before and after, in percent."""
    names = ("meta", "bos", "self", "cross")
    rows = [
        (
            _layer(new.layer, new.is_global),
            *(number(100 * getattr(one.mean, name), 3) for name in names for one in (old, new)),
        )
        for old, new in zip(before.layers, after.layers, strict=True)
    ]
    words = ("meta tokens", "<s>", "itself", "other tokens")
    head = ("layer", *(f"{word} {when}, %" for word in words for when in ("before", "now")))
    return Table("Attention before and after", head, tuple(rows))


def _divergence(found: Divergence, dtype: str) -> Iterator[Table]:
    measured: Sequence[tuple[str, Measured | None]] = (
        ("KL (checkpoint from the other)", found.kl),
        ("KL (the other from the checkpoint)", found.reverse_kl),
        ("loss before", found.loss_before),
        ("loss after", found.loss_after),
        ("loss, change", found.loss_change),
        ("entropy before", found.entropy_before),
        ("entropy after", found.entropy_after),
        ("entropy, change", found.entropy_change),
        ("KL, second half of a document minus first", found.kl_growth),
        ("log-probability of the end token, change", found.end_change),
    )
    rows = tuple((name, with_error(one)) for name, one in measured if one is not None)
    likeliest = ("same likeliest token", percent(found.same_likeliest))
    note = f"Means over {found.documents:,} documents, {found.tokens:,} tokens, of {found.source}; ± is the standard error "
    note += f"between documents. Both checkpoints were computed in {dtype}."
    yield Table("Divergence, nats per token", ("what", "mean"), (*rows, likeliest), note=note)
    positions = tuple((f"{first:,} to {last:,}", number(mean, 4)) for first, last, mean in found.by_position)
    yield Table("KL by position", ("tokens of the document", "nats per token"), positions)
    if found.largest:
        yield Table(
            "Where both differ most",
            ("document", "text before", "token there", "likeliest before", "likeliest now", "KL, nats"),
            tuple(
                (one.document, one.before, one.token, one.was_likeliest, one.is_likeliest, number(one.kl))
                for one in found.largest
            ),
            texts=frozenset({1, 2, 3, 4}),
        )


def _examples(pairs: Pairs) -> Table:
    """Some of the pairs as they read."""
    made = f" {pairs.made_rejected:,} of the rejected answers were made from the right ones, as for DPO: their rows have none."
    return Table(
        "Pairs as they read",
        ("pair", "prompt", "chosen", "rejected"),
        tuple((one.name, one.prompt, one.chosen, one.rejected) for one in pairs.examples),
        texts=frozenset({1, 2, 3}),
        note=f"The first {len(pairs.examples)} of {count(len(pairs.pairs), 'pair')} of {pairs.source}.{made if pairs.made_rejected else ''}",
    )


def _pairs(pairs: Pairs, dtype: str) -> Table:
    rows = tuple(
        (
            one.name,
            str(one.chosen_tokens),
            signed(one.chosen_after - one.chosen_before, 2),
            str(one.rejected_tokens),
            signed(one.rejected_after - one.rejected_before, 2),
            number(one.chosen_before - one.rejected_before, 2),
            number(one.chosen_after - one.rejected_after, 2),
        )
        for one in pairs.pairs
    )
    head = (
        "pair",
        "chosen, tokens",
        "chosen, change",
        "rejected, tokens",
        "rejected, change",
        "margin before",
        "margin now",
    )
    note = (
        f"Read from {pairs.source}; nats; both checkpoints were computed in {dtype}. Where a row has no rejected answer, one "
        "was made as for DPO. Changes per token, as in the sentences "
        "above, are those of all answers together divided by all their tokens, so that a long answer weighs more; their "
        "standard errors are between pairs."
    )
    return Table("Pairs, log-probabilities of whole answers", head, rows, note=note)


# ---- cost ------------------------------------------------------------------------------------------------------------


def _cost(cost: Cost) -> Iterator[Table]:
    beside = cost.transformer
    shape = f"The transformer is {beside.name}: {beside.parameters:,} parameters, {beside.layers} layers, width "
    shape += f"{beside.hidden_size:,}, {beside.heads} heads of queries and {beside.kv_heads} of keys."
    if cost.cache:
        yield Table(
            "Cache of one sequence",
            ("context", "by formula", "counted", "keys and values", "transformer", "counted there", "times smaller"),
            tuple(
                (
                    f"{one.context:,}",
                    size_in_bytes(one.formula),
                    "–" if one.measured is None else size_in_bytes(one.measured),
                    size_in_bytes(one.keys_values),
                    size_in_bytes(one.transformer_formula),
                    "–" if one.transformer_measured is None else size_in_bytes(one.transformer_measured),
                    number(one.ratio, 2),
                )
                for one in cost.cache
            ),
            note=" ".join([f"In {cost.dtype}; MB is a million bytes. {shape}", cost.not_timed]).strip(),
        )
    if cost.decode:
        yield Table(
            "Decoding",
            ("context", "tokens per second", "transformer", "times as fast", "lowest round", "highest round"),
            tuple(
                (
                    f"{one.context:,}",
                    number(one.tokens_per_second, 1),
                    number(one.transformer_tokens_per_second, 1),
                    number(one.ratio, 2),
                    number(one.ratio_low, 2),
                    number(one.ratio_high, 2),
                )
                for one in cost.decode
            ),
            note=f"Medians over {cost.rounds} rounds of {cost.steps} steps, both models in turn, batch size {cost.batch_size}, "
            f"{cost.device}, {count(cost.threads, 'thread')}: the last {cost.steps} tokens up to the context. No prompt was run: "
            f"caches were filled with random keys and values. {shape}",
        )
