"""Every backend that runs here against a float64 reference on fresh random inputs: outputs, states and gradients.

An error is the largest difference divided by the largest entry of the reference. References see the inputs as the
backend sees them, after rounding, so that only the backend's own arithmetic is judged.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from typing import Any, TypeAlias

import torch
from torch import Tensor

from gpu import references
from gpu.backends import all_of, load, why_not
from gpu.findings import Finding, failed
from gpu.sizes import Sizes, tiny_shape
from hymba_align.inside.attention import measure_attention
from hymba_align.inside.fusion import measure_fusion
from hymba_align.inside.rows import Document, pack_rows
from hymba_align.model import HymbaConfig, HymbaForCausalLM, SegmentTree, without_branch
from hymba_align.model.decoding import decode

SECTION = "correctness"
STATE, TAPS, WINDOW, SEQUENCES = 16, 4, 96, 7
INSPECTED = (40, 25, 9)
"""Tokens of the documents that a tiny model is looked into with"""
BOUNDS = {torch.float32: 5e-4, torch.bfloat16: 2e-2}
"""Largest error of a kernel. bfloat16 keeps 8 bits, so that a rounded output alone is off by up to 0.4 %."""
MODEL_BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 1e-1}
"""The same of logits and gradients of a whole model, as root mean squares."""

Call: TypeAlias = Callable[..., tuple[Tensor, ...]]


def run(sizes: Sizes) -> Iterator[Finding]:
    """One finding per backend and dtype."""
    seed = random.SystemRandom().randrange(2**31)
    torch.manual_seed(seed)
    lengths, parents = random_tree(sizes.checked_lengths, seed)
    yield Finding(SECTION, "row", f"seed {seed}, segments {lengths}, parents {parents}", numbers={"seed": seed})
    for dtype in (torch.float32, torch.bfloat16):
        for part, check in CHECKS.items():
            for name in all_of(part):
                what = f"{part}={name}, {str(dtype).removeprefix('torch.')}"
                try:
                    if (reason := why_not(part, name, sizes.device, dtype)) is not None:
                        yield Finding(SECTION, what, f"not run: {reason}")
                        continue
                    errors = check(load(part, name), lengths, parents, sizes, dtype)
                except Exception as error:  # the others are checked all the same; the table and the exit show this one
                    yield failed(SECTION, what, error)
                    continue
                yield from_errors(what, errors, BOUNDS[dtype])
        yield whole_model(sizes, dtype)
        yield looked_into(sizes, dtype)
    yield same_text(sizes)


def from_errors(what: str, errors: dict[str, float], bound: float) -> Finding:
    """The largest of the errors, judged; an error that is no number is a failure, too."""
    worst = max(errors, key=lambda name: float("inf") if errors[name] != errors[name] else errors[name])
    met = all(value <= bound for value in errors.values())
    return Finding(SECTION, what, f"{errors[worst]:.1e} ({worst})", f"≤ {bound:g}", met, errors)


def random_tree(lengths: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """The lengths in random order twice, as a deep and wide tree below a first segment of meta tokens."""
    rng = random.Random(seed)
    order = rng.sample([*lengths[:-1], *lengths], 2 * len(lengths) - 1)
    return [8, *order], [-1, *(rng.randrange(segment) for segment in range(1, len(order) + 1))]


# ---- kernels ---------------------------------------------------------------------------------------------------------


def check_scan(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    tokens, channels = sum(lengths), sizes.checked_channels
    row = backend.build(lengths, parents, [-1] * len(lengths), sizes.device)
    inputs = {
        "u": draw(sizes, tokens, channels, dtype=dtype),
        "dt": draw(sizes, tokens, channels) - 2,
        "A": -torch.exp(draw(sizes, channels, STATE)),
        "B": draw(sizes, tokens, STATE, dtype=dtype),
        "C": draw(sizes, tokens, STATE, dtype=dtype),
        "D": draw(sizes, channels),
        "z": draw(sizes, tokens, channels, dtype=dtype),
    }
    return compare(row.gated, lambda *xs: references.gated_scan(lengths, parents, *xs), inputs)


def check_conv(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    row = backend.build(lengths, parents, [-1] * len(lengths), TAPS, sizes.device)
    inputs = {
        "u": draw(sizes, sum(lengths), sizes.checked_channels, dtype=dtype),
        "weight": draw(sizes, sizes.checked_channels, TAPS),
        "bias": draw(sizes, sizes.checked_channels),
    }
    return compare(lambda *xs: row.run(*xs, silu=True), lambda *xs: references.conv_silu(lengths, parents, *xs), inputs)


def check_attention(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    row = backend.build(lengths, parents, WINDOW, sizes.device)
    heads, groups, size = (10, 2, 64) if not sizes.smoke else (4, 2, 16)
    shapes = {"q": (heads, size), "k": (groups, size), "v": (groups, 2 * size)}
    inputs = {name: draw(sizes, sum(lengths), *shape, dtype=dtype) for name, shape in shapes.items()}
    errors = {}
    for is_global in (True, False):
        found = compare(
            lambda *xs, g=is_global: (row.attend(*xs, is_global=g, stored=None),),
            lambda *xs, w=None if is_global else WINDOW: (references.attention(lengths, parents, w, *xs),),
            inputs,
        )
        errors |= {f"{name}, {'global' if is_global else 'local'}": error for name, error in found.items()}
    return errors


def check_norm(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    inputs = {
        "x": draw(sizes, sum(lengths), sizes.checked_channels, dtype=dtype),
        "weight": draw(sizes, sizes.checked_channels, dtype=dtype),
    }

    def reference(x: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6),)

    return compare(lambda x, weight: (backend(x, weight, 1e-6),), reference, inputs)


def check_scan_step(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    channels = sizes.checked_channels
    row = backend.build([1] * SEQUENCES, [-1] * SEQUENCES, list(range(SEQUENCES)), sizes.device)
    A, D = -torch.exp(draw(sizes, channels, STATE)), draw(sizes, channels)
    states = draw(sizes, SEQUENCES, channels, STATE)
    u, z = (draw(sizes, SEQUENCES, channels, dtype=dtype) for _ in range(2))
    dt = draw(sizes, SEQUENCES, channels) - 2
    B, C = (draw(sizes, SEQUENCES, STATE, dtype=dtype) for _ in range(2))
    with torch.no_grad():
        found = row.gated(u, dt, A, B, C, D, z, states.clone())
    wide = [x.double() for x in (u, dt, A, B, C, D, z, states)]
    u, dt, A, B, C, D, z, states = wide
    step = torch.nn.functional.softplus(dt)
    h = torch.exp(step[..., None] * A) * states + (step * u)[..., None] * B[:, None]
    y = ((h * C[:, None]).sum(-1) + D * u) * torch.nn.functional.silu(z)
    return {"output": largest(found[0], y), "state": largest(found[1], h)}


def check_conv_step(
    backend: Any, lengths: list[int], parents: list[int], sizes: Sizes, dtype: torch.dtype
) -> dict[str, float]:
    channels = sizes.checked_channels
    row = backend.build([1] * SEQUENCES, [-1] * SEQUENCES, list(range(SEQUENCES)), TAPS, sizes.device)
    u, tails = draw(sizes, SEQUENCES, channels, dtype=dtype), draw(sizes, SEQUENCES, TAPS - 1, channels, dtype=dtype)
    weight, bias = draw(sizes, channels, TAPS), draw(sizes, channels)
    with torch.no_grad():
        y, after = row.run(u, weight, bias, tails.clone(), silu=True)
    inputs = torch.cat([tails, u[:, None]], 1).double()
    expected = torch.nn.functional.silu(torch.einsum("twi,iw->ti", inputs, weight.double()) + bias.double())
    return {"output": largest(y, expected), "tail": largest(after, inputs[:, 1:])}


CHECKS: dict[str, Callable[..., dict[str, float]]] = {
    "scan": check_scan,
    "conv": check_conv,
    "attention": check_attention,
    "norm": check_norm,
    "scan_step": check_scan_step,
    "conv_step": check_conv_step,
}


def draw(sizes: Sizes, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers."""
    return torch.randn(*shape, device=sizes.device).to(dtype)


def compare(ours: Call, reference: Call, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Errors of all outputs and of the gradient of every input; gradients flow in through all outputs."""
    narrow = [x.clone().requires_grad_() for x in inputs.values()]
    wide = [x.double().requires_grad_() for x in inputs.values()]
    found, expected = ours(*narrow), reference(*wide)
    weights = [torch.randn_like(output) for output in found]
    gradients = torch.autograd.grad(found, narrow, weights)
    expected_gradients = torch.autograd.grad(expected, wide, [weight.double() for weight in weights])
    errors = {name: largest(x, y) for name, x, y in zip(("output", "final state"), found, expected, strict=False)}
    for name, x, y in zip(inputs, gradients, expected_gradients, strict=True):
        errors[f"gradient of {name}"] = largest(x, y)
    return errors


def largest(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected entry."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


# ---- a whole model ---------------------------------------------------------------------------------------------------


def whole_model(sizes: Sizes, dtype: torch.dtype) -> Finding:
    """A tiny model on the device against itself in float64 on the CPU: logits and every gradient."""
    what = f"whole tiny model, {str(dtype).removeprefix('torch.')}"
    model = tiny_model()
    tree = SegmentTree(torch.tensor([20, 9, 1, 30, 3]), torch.tensor([-1, 0, 0, -1, 1]))
    ids = torch.randint(0, model.config.vocab_size, (1, tree.num_tokens))
    model.to(dtype).to(torch.float64)  # weights as the other one has them, rounded
    expected = run_model(model, ids, tree)
    found = run_model(model.to(dtype).to(sizes.device), ids.to(sizes.device), tree)
    errors = {name: root_mean_square(found[name], value) for name, value in expected.items()}
    return from_errors(what, errors, MODEL_BOUNDS[dtype])


def looked_into(sizes: Sizes, dtype: torch.dtype) -> Finding:
    """What `inspect` measures of a tiny model on the device against the same in float64 on the CPU."""
    what = f"attention shares, fusion and a removed branch of a tiny model, {str(dtype).removeprefix('torch.')}"
    model = tiny_model().eval().to(dtype).to(torch.float64)
    ids = torch.randint(0, model.config.vocab_size, (sum(INSPECTED),)).tolist()
    documents = [Document(f"of {length} tokens", tuple(ids[:length]), (True,) * length) for length in INSPECTED]
    expected = look_into(model, documents)
    found = look_into(model.to(dtype).to(sizes.device), documents)
    errors = {name: root_mean_square(found[name], value) for name, value in expected.items()}
    return from_errors(what, errors, MODEL_BOUNDS[dtype])


@torch.no_grad()
def look_into(model: HymbaForCausalLM, documents: Sequence[Document]) -> dict[str, Tensor]:
    """Quantities of every layer, and the logits without one branch, in float64 on the CPU."""
    (row,) = pack_rows(documents, sum(INSPECTED))
    attention, fusion = measure_attention(model, [row], bos_token_id=None), measure_fusion(model, [row])
    with without_branch(model, 0, "ssm"):
        logits = model(input_ids=row.input_ids[None].to(model.device), segments=row.tree).logits
    heads = [astuple(head) for layer in attention.layers for head in layer.heads]
    sizes = [(layer.attention.before, layer.ssm.before, layer.ssm_share) for layer in fusion.layers]
    return {
        "attention": torch.tensor(heads, dtype=torch.float64),
        "fusion": torch.tensor(sizes, dtype=torch.float64),
        "logits without layer 0's SSM heads": logits.to("cpu", torch.float64),
    }


def tiny_model() -> HymbaForCausalLM:
    """Every kind of layer, on the CPU, float32, in training mode."""
    model: HymbaForCausalLM = HymbaForCausalLM(HymbaConfig(**tiny_shape())).train()
    return model


def run_model(model: HymbaForCausalLM, ids: Tensor, tree: SegmentTree) -> dict[str, Tensor]:
    """Logits and gradients, in float64 on the CPU."""
    model.zero_grad()
    output = model(input_ids=ids, labels=ids, segments=tree)
    output.loss.backward()
    found = {"logits": output.logits.detach()}
    found |= {f"gradient of {name}": x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.to("cpu", torch.float64, copy=True) for name, x in found.items()}


def root_mean_square(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return float((found - expected).norm() / expected.norm())


def same_text(sizes: Sizes) -> Finding:
    """Greedy decoding in float32 of prompts of several lengths, on the device and on the CPU."""
    model = tiny_model().eval()
    prompts = [torch.randint(0, 97, (length,)).tolist() for length in (3, 1, 12, 30, 7)]
    expected = [one.tokens for one in decode(model, prompts, max_new_tokens=12, batch_size=1)]
    model.to(sizes.device)
    found = [one.tokens for one in decode(model, prompts, max_new_tokens=12, batch_size=3)]
    same = sum(a == b for a, b in zip(found, expected, strict=True))
    return Finding(
        SECTION,
        "greedy text of a tiny model, batch 3 on the device against one at a time on the CPU, float32",
        f"{same} of {len(prompts)} the same",
        "all",
        same == len(prompts),
        {"same": same},
    )
