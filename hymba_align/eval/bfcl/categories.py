"""BFCL's categories: which are run, which are not and why, and how many problems of each a limit leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hymba_align.errors import RecipeError

NON_LIVE = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
)
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
SINGLE_TURN = NON_LIVE + LIVE
MULTI_TURN = ("multi_turn_base", "multi_turn_miss_func", "multi_turn_miss_param", "multi_turn_long_context")
RUN = SINGLE_TURN + MULTI_TURN
_MEMORY = "agentic: needs a memory that lasts over conversations, with an embedding model; hymba-align does not run it"
_WEB_SEARCH = "agentic: needs the internet and a paid search service; hymba-align does not run it"
NOT_RUN = {
    "memory_kv": _MEMORY,
    "memory_vector": _MEMORY,
    "memory_rec_sum": _MEMORY,
    "web_search_base": _WEB_SEARCH,
    "web_search_no_snippet": _WEB_SEARCH,
    "format_sensitivity": "asks for call formats other than the chat template's; the official overall score leaves it out",
}
IRRELEVANCE = ("irrelevance", "live_irrelevance")
"""Right is who calls nothing: reported apart, beside a model that never calls"""
LIVE_SCORE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_relevance")
"""What the score `live` is over, each problem counting the same"""
SIMPLE = ("simple_python", "simple_java", "simple_javascript")


def chosen_categories(names: Sequence[str]) -> tuple[str, ...]:
    """Categories that are run, in the package's order; all where none are named.

    Raises: RecipeError for a name that is no category, or one that is not run.
    """
    for name in names:
        if name in NOT_RUN:
            raise RecipeError(f"eval.bfcl.categories has {name}, which is not run ({NOT_RUN[name]}); remove it")
        if name not in RUN:
            raise RecipeError(f"eval.bfcl.categories has {name}, which is no category; categories: {', '.join(RUN)}")
    return tuple(name for name in RUN if name in names or not names)


def not_run(chosen: Sequence[str]) -> dict[str, str]:
    """Why each category that is not scored is not."""
    left_out = {name: "not among eval.bfcl.categories" for name in RUN if name not in chosen}
    return {**left_out, **NOT_RUN}


def shares(sizes: Mapping[str, int], limit: int | None) -> dict[str, int]:
    """How many problems of each category are scored, its first ones.

    Under a limit, one of each category, and what is left of the limit in proportion to what is left of each (by largest
    remainders, the earlier category first where they are equal). With a limit below the number of categories, one of
    each nevertheless.
    """
    total = sum(sizes.values())
    if limit is None or limit >= total:
        return dict(sizes)
    left, rest = max(0, limit - len(sizes)), total - len(sizes)
    exact = {name: left * (size - 1) / rest for name, size in sizes.items()} if rest else dict.fromkeys(sizes, 0.0)
    counts = {name: 1 + int(share) for name, share in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: int(exact[name]) - exact[name])  # stable
    for name in by_remainder[: max(0, limit - sum(counts.values()))]:
        counts[name] += 1
    return counts
