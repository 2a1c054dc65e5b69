"""Ways of training a base on a machine, with what each takes of a device's memory, and the best one that fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hymba_align.errors import LaunchError, OutOfMemoryError
from hymba_align.hardware import ROOM, Hardware
from hymba_align.memory import ADAPTER_BYTES, Adapters, Engine, Estimate, Setting, Shape, estimate, gib
from hymba_align.recipe import TrainingStage

LENGTHS = (8192, 4096, 2048, 1024, 512)  # text tokens of a packed row, the published one first
SHORT = 2048  # tokens; where all parameters fit with shorter rows only, adapters are taken instead
DPO_LENGTHS = (2048, 1024, 512, 256)  # the section's default first; a pair takes twice as many tokens
MOST_ROWS = 8  # of a micro-batch; more fill no GPU better than 8 packed rows of 8,192 tokens
TOO_LARGE = "too large"
TITLES: dict[str, str] = {
    "full": "all parameters",
    "zero1": "all, ZeRO-1",
    "zero2": "all, ZeRO-2",
    "zero3": "all, ZeRO-3",
    "zero3_offload": "all, ZeRO-3 + offload",
    "lora": "LoRA",
    "qlora": "QLoRA (4 bits)",
}


@dataclass(frozen=True)
class Way:
    """One way of training, with the longest rows that fit, or the shortest where none does."""

    name: str
    setting: Setting
    """Of SFT, one row of `max_length` tokens a micro-batch"""
    estimate: Estimate
    max_length: int
    dpo_length: int
    """dpo.max_length: the longest pairs that fit, at most as long as SFT's rows; the shortest where none does"""
    fits: bool
    verdict: str
    """In words: whether it fits, or why not"""

    @property
    def title(self) -> str:
        """What people read for the way."""
        return TITLES[self.name]


def ways(hardware: Hardware, shape: Shape, context: int) -> list[Way]:
    """All ways, those that change most of the model and move least between devices first.

    Args:
        context: the most text tokens that the base takes.
    """
    found = []
    for name in TITLES:
        setting = _setting(name, hardware)
        lengths = [length for length in LENGTHS if length <= context] or [context]
        of_length = [_way(name, replace(setting, row_tokens=length), hardware, shape) for length in lengths]
        found.append(next((way for way in of_length if way.fits), of_length[-1]))
    return found


def best(found: Sequence[Way], hardware: Hardware, wanted: str | None = None) -> Way:
    """The way named `wanted`, or else the best that fits: all parameters, with the longest rows and then the first of them;
    adapters where only short rows would fit; offload where nothing else does.

    Raises:
        OutOfMemoryError: nothing fits, or the wanted one does not.
        LaunchError: the wanted one is for other machines.
    """
    if wanted is not None:
        way = next(way for way in found if way.name == wanted)
        if not way.fits:
            if way.verdict != TOO_LARGE:
                raise LaunchError(
                    f"{way.title}, which --way asks for, is of no use here ({way.verdict}); take another way (without --way "
                    "the best that fits is chosen)"
                )
            raise OutOfMemoryError(
                f"{way.title} takes {gib(way.estimate.total)} GiB of a device with rows of {way.max_length:,} tokens, and "
                f"{_has(hardware)}; take another way (without --way the best that fits is chosen)"
            )
        return way
    whole = [way for way in found if way.fits and way.setting.adapters is None and way.name != "zero3_offload"]
    longest = max((way.max_length for way in whole), default=0)
    fitting = [way for way in found if way.fits]
    if whole and longest >= min(SHORT, max(way.max_length for way in fitting)):
        return next(way for way in whole if way.max_length == longest)
    if fitting:
        return min(fitting, key=lambda way: (way.name == "zero3_offload", way.setting.adapters is None))
    least = min(found, key=lambda way: way.estimate.total)
    raise OutOfMemoryError(
        f"nothing fits: {_has(hardware)}, and the least that this base takes is {gib(least.estimate.total)} GiB "
        f"({least.title}, rows of {least.max_length} tokens); take a machine with more memory, or a smaller base with --model"
    )


def rows_of_a_batch(way: Way, hardware: Hardware, shape: Shape, global_batch: int, stage: TrainingStage) -> int:
    """The most rows (of DPO, pairs) of a micro-batch, a power of two, that fit and divide the global batch."""
    rows = 1
    while rows * 2 <= MOST_ROWS and rows * 2 * way.setting.processes <= global_batch:
        if not fits(estimate(shape, stage_setting(way, stage, rows * 2, global_batch)), hardware):
            break
        rows *= 2
    return rows


def stage_setting(way: Way, stage: TrainingStage, rows: int, global_batch: int) -> Setting:
    """What of a stage decides about memory. A pair is both answers, each with its prompt."""
    accumulation = max(1, global_batch // (rows * way.setting.processes))
    pairs = stage == "dpo"
    tokens = 2 * way.dpo_length if pairs else way.max_length
    return replace(way.setting, batch=rows, row_tokens=tokens, accumulation=accumulation, pairs=pairs)


def _setting(name: str, hardware: Hardware) -> Setting:
    computing = 2 if hardware.bf16 else 4
    adapters = None
    if name in ("lora", "qlora"):
        adapters = Adapters(frozen_bytes=computing, quantized=name == "qlora")
    named: dict[str, Engine] = {
        "zero1": "zero1",
        "zero2": "zero2",
        "zero3": "zero3",
        "zero3_offload": "zero3_offload",
    }
    plain: Engine = "ddp" if hardware.devices > 1 else "single"
    return Setting(
        batch=1,
        row_tokens=LENGTHS[0],
        accumulation=2,
        weight_bytes=ADAPTER_BYTES if adapters is None else computing,
        compute_bytes=computing,
        checkpointing=True,
        engine=named.get(name, plain),
        processes=hardware.devices,
        on_cpu=hardware.on_cpu,
        adapters=adapters,
    )


def _way(name: str, setting: Setting, hardware: Hardware, shape: Shape) -> Way:
    needed = estimate(shape, setting)
    verdict = "fits" if fits(needed, hardware) else TOO_LARGE
    if setting.engine.startswith("zero") and hardware.devices == 1 and setting.engine != "zero3_offload":
        verdict = "one device: divides nothing"
    if name == "zero3_offload":
        # Weights in what they are computed with; float32 weights, gradients and two moments, over all processes.
        on_host = shape.parameters * (setting.compute_bytes + 16)
        if hardware.on_cpu:
            verdict = "the CPU is the host"
        elif verdict == "fits" and on_host > ROOM * hardware.memory_bytes:
            verdict = f"host memory: {gib(on_host)} GiB"
        elif verdict == "fits":
            verdict = "fits, slow"
    lengths = [length for length in DPO_LENGTHS if length <= setting.row_tokens] or [setting.row_tokens]
    pairs = (length for length in lengths if fits(estimate(shape, _of_pairs(setting, length)), hardware))
    longest = next(pairs, lengths[-1])
    return Way(name, setting, needed, setting.row_tokens, longest, verdict.startswith("fits"), verdict)


def _of_pairs(setting: Setting, length: int) -> Setting:
    return replace(setting, row_tokens=2 * length, pairs=True)


def fits(needed: Estimate, hardware: Hardware) -> bool:
    """Whether a device has that much, and some to spare."""
    return needed.total <= ROOM * hardware.device_bytes


def _has(hardware: Hardware) -> str:
    where = "this machine" if hardware.on_cpu else f"a GPU of this machine ({hardware.gpus[0].name})"
    if hardware.assumed is not None:
        where = f"each GPU that --gpus {hardware.assumed} assumes"
    return f"{where} has {gib(hardware.device_bytes)} GiB"
