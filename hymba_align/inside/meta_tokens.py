"""Which meta tokens draw attention in which domain: maths, code, prose, function calls, or any file of texts.

Two things must not pass for a domain. What all meta tokens get falls as a text grows, so it is compared how their
attention divides among them. And this division changes with the distance from them (the demo's first meta token gets
17 % of it from the first 64 tokens of a text and 30 % from the 64 behind the 200th, in every domain), so all domains
are seen over the same distances: the beginnings of their texts, of the same length.

Legend: M meta tokens, S documents of a row, N documents, C domains, R resamplings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hymba_align.inside.evidence import FEWEST, LEAST_PREFERENCE
from hymba_align.inside.observing import ObservedAttention, hymba_in, observe
from hymba_align.inside.result import DomainAttention, MetaTokens, Preference
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.inside.showing import forward_passes
from hymba_align.inside.texts import Texts, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hymba_align.model import HymbaModel

Floats = NDArray[np.float64]

FOLDER = (Path(__file__).parent / "domains").resolve()
SHIPPED_DOMAINS: Mapping[str, Path] = {
    name: FOLDER / f"{name}.jsonl" for name in ("maths", "code", "text", "function_calls")
}
"""Domains that ship with the package, and their files: data/domains of the repository."""
MOST_DOCUMENTS = 64
"""of a domain; a larger file gives so many, chosen by content"""
FALSE_ALARM = 0.05
"""Probability of one preference or more, among all meta tokens and domains, where the domains do not differ."""
RESAMPLINGS = 1999
"""Draws of every domain's documents from themselves, from which the threshold follows."""
AT_ONCE = 2**22
"""Numbers of resampled domains that exist at a time: 34 MB"""
ROUNDING = float(np.finfo(np.float32).eps)
"""Attention weights are float32: means of shares that agree but for this part of them count as known no better."""
BYTE = re.compile(r"<0x(?P<value>[0-9A-Fa-f]{2})>")
"""A piece of SentencePiece that stands for one byte of a character without a piece of its own"""
WHITE = frozenset(b"\t\n\r")
"""Bytes that such tokenizers have no other piece for"""


# ---- texts -----------------------------------------------------------------------------------------------------------


def domain_documents(
    file: str | Path, tokenizer: PreTrainedTokenizerBase, max_length: int, *, documents: int = MOST_DOCUMENTS
) -> Texts:
    """The texts of a domain, at most so many; of those in a file of the user's own that say nearly the same, one.

    A text that stands there twice says no more about its domain, and would count as evidence.

    Args:
        file: one of `SHIPPED_DOMAINS`, or anything that `read_texts` takes.
        max_length: most tokens of a text.
        documents: most texts.

    Raises: DataError where nothing of it can be used.
    """
    ships = Path(file).parent == FOLDER
    texts = read_texts(str(file), tokenizer, documents=documents, max_length=max_length, seed=0, distinct=not ships)
    if not ships:
        return texts
    # Where the package is installed says nothing about what is in the file.
    prefix = f"{FOLDER}/"
    named = tuple(replace(one, name=one.name.removeprefix(prefix)) for one in texts.documents)
    return replace(texts, source=f"{Path(file).name}, which ships with hymba-align", documents=named)


@dataclass(frozen=True)
class Spelling:
    """How a tokenizer writes texts: whether it knows their words, or spells them."""

    unknown: float
    """Share of the tokens that are `<unk>`, or single bytes of a character that has no piece"""
    characters_per_token: float


def spelling(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """How the tokenizer writes these documents, markup of the chat template included."""
    ids = [token for document in documents for token in document.token_ids]
    unknown = {token for token in set(ids) if _is_unknown(token, tokenizer)}
    characters = sum(len(tokenizer.decode(list(document.token_ids))) for document in documents)
    return Spelling(sum(token in unknown for token in ids) / len(ids), characters / len(ids))


def _is_unknown(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    if token == tokenizer.unk_token_id:
        return token not in (tokenizer.eos_token_id, tokenizer.bos_token_id)  # one token for all three in GPT-2's kind
    byte = BYTE.fullmatch(str(tokenizer.convert_ids_to_tokens(token)))
    return byte is not None and int(byte["value"], 16) not in WHITE


# ---- attention -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure_meta_tokens(
    model: nn.Module, domains: Mapping[str, Texts], tokenizer: PreTrainedTokenizerBase, *, tokens_per_row: int
) -> MetaTokens:
    """What each meta token draws in each domain, and which prefer one. Source: Hymba (arXiv 2411.13676), its meta tokens.

    Exact as `measure_attention` is: every weight of every token counts, of the texts' beginnings as `beginnings` cuts them.
    The mass on all meta tokens together is the meta tokens' share there, where the documents are the same and weigh alike.

    Args:
        model: a Hymba, with or without adapters around it.
        domains: texts by the name of their domain, none of them empty.
        tokenizer: that made the texts' tokens.
        tokens_per_row: most tokens of a forward pass.
    """
    hymba = hymba_in(model)
    measured, shares = [], {}
    first, cut = beginnings({name: texts.documents for name, texts in domains.items()})
    passes = sum(len(list(pack_rows(documents, tokens_per_row))) for documents in cut.values())
    with forward_passes("Meta tokens", passes, hymba):
        mass = {name: document_mass(hymba, texts, tokens_per_row=tokens_per_row) for name, texts in cut.items()}
    for name, documents in cut.items():
        mass_NlM = mass[name].cpu().numpy()
        mass_NM = mass_NlM.mean(axis=1)
        shares[name] = mass_NM / mass_NM.sum(axis=1, keepdims=True)
        spelt = spelling(documents, tokenizer)
        measured.append(
            DomainAttention(
                domain=name,
                source=domains[name].source,
                documents=len(mass_NM),
                tokens=sum(len(document.token_ids) for document in documents),
                mass=tuple(mass_NM.mean(axis=0).tolist()),
                stderr=_standard_errors(mass_NM),
                by_layer=tuple(tuple(layer) for layer in mass_NlM.mean(axis=0).tolist()),
                share=tuple(shares[name].mean(axis=0).tolist()),
                unknown=spelt.unknown,
                characters_per_token=spelt.characters_per_token,
            )
        )
    found, threshold = preferences(shares)
    shortest = min(domains, key=lambda name: _middle_length(domains[name].documents))
    return MetaTokens(tuple(measured), _with_mass(found, measured), threshold, None, first, cut_by=shortest)


def beginnings(domains: Mapping[str, Sequence[Document]]) -> tuple[int, dict[str, tuple[Document, ...]]]:
    """So many tokens of each document at most, and the documents cut to them.

    The number is the median length in the domain of the shortest documents: all domains have as good as the same distances
    from the meta tokens, and no single short document takes the others' tokens away.
    """
    first = min(map(_middle_length, domains.values()))
    cut = {
        name: tuple(
            replace(document, token_ids=document.token_ids[:first], scored=document.scored[:first])
            for document in documents
        )
        for name, documents in domains.items()
    }
    return first, cut


def _middle_length(documents: Sequence[Document]) -> int:
    return median_low(len(document.token_ids) for document in documents)


def document_mass(hymba: HymbaModel, documents: Sequence[Document], *, tokens_per_row: int) -> Tensor:
    """(N, layers, M) float64: share of attention on each meta token, mean over heads and a document's tokens."""
    config, device = hymba.config, hymba.embed_tokens.weight.device
    rows = []
    for row in pack_rows(documents, tokens_per_row):
        sums_SlM = torch.zeros(
            row.tree.num_segments,
            config.num_hidden_layers,
            config.num_memory_tokens,
            dtype=torch.float64,
            device=device,
        )

        def add(seen: ObservedAttention, sums_SlM: Tensor = sums_SlM) -> None:
            meta = seen.row.meta_tokens
            for block in seen.weights():  # the first keys are the meta tokens, in order
                sums_SlM[block.segment, seen.layer] += block.weights[..., :meta].double().sum((0, 1))

        with observe(hymba, attention=add):
            hymba(input_ids=row.input_ids[None].to(device), segments=row.tree, use_cache=False)
        weights = row.tree.lengths.to(device) * config.num_attention_heads
        rows.append(sums_SlM / weights[:, None, None])
    return torch.cat(rows)


def _standard_errors(values_NM: Floats) -> tuple[float, ...] | None:
    """(M,) of the means over documents; None with fewer than two."""
    documents = len(values_NM)
    if documents < 2:
        return None
    return tuple((values_NM.std(axis=0, ddof=1) / documents**0.5).tolist())


def _with_mass(found: Sequence[Found], measured: Sequence[DomainAttention]) -> tuple[Preference, ...]:
    """The preferences as a report holds them, with what the meta tokens draw of all attention."""
    mass = {one.domain: one.mass for one in measured if one.documents >= FEWEST}
    made = []
    for one in found:
        others = [drawn[one.token] for domain, drawn in mass.items() if domain != one.domain]
        made.append(
            Preference(
                token=one.token,
                domain=one.domain,
                mass=mass[one.domain][one.token],
                elsewhere=sum(others) / len(others),
                share=one.share,
                share_elsewhere=one.elsewhere,
                z=one.z,
            )
        )
    return tuple(made)


# ---- preferences -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A meta token that prefers a domain."""

    token: int
    domain: str
    share: float
    elsewhere: float
    z: float


def preferences(shares: Mapping[str, Floats], *, seed: int = 0) -> tuple[tuple[Found, ...], float | None]:
    """The meta tokens that prefer a domain, by domain and strongest first, and the threshold that their z is above.

    z is a domain's mean share minus the mean of the other domains' means, in standard errors over documents, each
    domain with a variance of its own (Welch). There are C * M of them, neither independent nor normal, so the threshold
    is what the largest of them reaches where there is nothing to find: each domain's documents are moved to a common mean
    and drawn anew from among themselves, `RESAMPLINGS` times, and at most `FALSE_ALARM` of the largest values are above
    it. (Exchanging documents between domains would be right for domains that spread alike only.) Source: Westfall and
    Young, Resampling-Based Multiple Testing (1993). Of what passes, differences below `LEAST_PREFERENCE` are left out:
    texts differ, so every model has some that are no chance. The demo's random weights, which have learned nothing, have
    differences of up to 1 %.

    Args:
        shares: (N, M) of each document's attention on meta tokens, by domain; the same M for all.
        seed: of the draws.

    Returns: no preferences and no threshold with fewer than two domains that have `FEWEST` documents. Domains with fewer
        are not compared.
    """
    shares = {name: share for name, share in shares.items() if len(share) >= FEWEST}
    sizes = [len(share) for share in shares.values()]
    if len(sizes) < 2:
        return (), None
    common_M = np.concatenate(list(shares.values())).mean(axis=0)
    domain_N = np.repeat(np.arange(len(sizes)), sizes)
    once_CN = (domain_N == np.arange(len(sizes))[:, None]).astype(np.float64)
    centred_NM = np.concatenate(list(shares.values())) - common_M
    z_CM = _z(centred_NM, once_CN[None], sizes, ROUNDING * common_M)[0]
    threshold = _threshold([share - share.mean(axis=0) for share in shares.values()], ROUNDING * common_M, seed)
    mean_CM = np.stack([share.mean(axis=0) for share in shares.values()])
    elsewhere_CM = (mean_CM.sum(axis=0) - mean_CM) / (len(sizes) - 1)
    prefers_CM = (z_CM > threshold) & (mean_CM >= (1 + LEAST_PREFERENCE) * elsewhere_CM)
    found = [
        Found(int(token), name, float(mean_CM[c, token]), float(elsewhere_CM[c, token]), float(z_CM[c, token]))
        for c, name in enumerate(shares)
        for token in np.argsort(-z_CM[c], kind="stable")
        if prefers_CM[c, token]
    ]
    return tuple(found), threshold


def _threshold(moved: Sequence[Floats], rounding_M: Floats, seed: int) -> float:
    """What the largest z stays below, but for `FALSE_ALARM`, when domains of mean 0 are drawn anew from their documents."""
    draw = np.random.default_rng(seed)
    values_NM, sizes = np.concatenate(moved), [len(one) for one in moved]
    step = max(1, AT_ONCE // (len(sizes) * max(values_NM.shape)))
    largest: list[float] = []
    for first in range(0, RESAMPLINGS, step):
        times = min(step, RESAMPLINGS - first)
        drawn_RCN = np.zeros((times, len(sizes), len(values_NM)))
        start = 0
        for domain, size in enumerate(sizes):
            drawn_RCN[:, domain, start : start + size] = draw.multinomial(size, [1 / size] * size, size=times)
            start += size
        largest += _z(values_NM, drawn_RCN, sizes, rounding_M).max(axis=(1, 2)).tolist()
    # The texts as they are count as one more draw, so that the probability is right for any number of draws.
    allowed = int(FALSE_ALARM * (RESAMPLINGS + 1)) - 1
    return sorted(largest, reverse=True)[allowed]


def _z(values_NM: Floats, times_RCN: Floats, sizes: Sequence[int], rounding_M: Floats) -> Floats:
    """(R, C, M) differences in standard errors.

    Args:
        values_NM: with means of about 0, so that the squares lose nothing.
        times_RCN: how often each domain has each document.
        sizes: documents of each domain.
        rounding_M: standard error that is not gone below.
    """
    number_C1 = np.array(sizes, dtype=np.float64)[:, None]
    mean_RCM = times_RCN @ values_NM / number_C1
    squares_RCM = times_RCN @ values_NM**2 / number_C1
    error_RCM = np.maximum(squares_RCM - mean_RCM**2, 0) / (number_C1 - 1)  # squared, of each mean
    others = len(sizes) - 1
    difference_RCM = mean_RCM - (mean_RCM.sum(axis=1, keepdims=True) - mean_RCM) / others
    error_RCM = error_RCM + (error_RCM.sum(axis=1, keepdims=True) - error_RCM) / others**2
    return difference_RCM / np.maximum(np.sqrt(error_RCM), rounding_M)
