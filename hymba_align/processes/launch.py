"""Processes: which one this is, how a stage gets several, and what a single one may use of the machine."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from hymba_align.errors import LaunchError, Preempted, ProcessesError
from hymba_align.processes.agent import CONTINUES, STARTED_BY_US, die_with, how_it_ended
from hymba_align.processes.engines import engine_name, is_named, requested_engine, use_engine
from hymba_align.processes.signals import forwarded_to
from hymba_align.processes.slurm import SlurmStep, slurm_step
from hymba_align.recipe import Recipe
from hymba_align.run.folder import run_root
from hymba_align.secrets import secrets_variable
from hymba_align.terminal import print_words

STOP_CHILDREN_S = 60.0


def inside_launcher() -> bool:
    """Whether torchrun, accelerate or DeepSpeed started this process (clusters set WORLD_SIZE on their own)."""
    return "LOCAL_RANK" in os.environ


def started_by_us() -> bool:
    """Whether this process is one of those that train for a command of ours, which has planned and checked."""
    return inside_launcher() and STARTED_BY_US in os.environ


def rank() -> int:
    """This process's number among those of its launcher or its Slurm step; 0 without one."""
    if inside_launcher():
        return int(os.environ.get("RANK", "0"))
    step = slurm_step()
    return step.rank if step is not None else 0


def needs_launch(recipe: Recipe) -> bool:
    """Whether training stages run in processes that this one has to start."""
    return not inside_launcher() and requested_engine(recipe.launch) != "single"


def use_what_is_there(recipe: Recipe) -> Recipe:
    """The recipe with the number of processes that torchrun, accelerate or Slurm have started, where one has.

    Tasks of a Slurm step become processes that train together; one task per machine stays a command that starts the
    processes of its machine. The recipe's engine is made the one that these processes set up.

    Raises:
        RecipeError: the processes that are there cannot be what the recipe asks for.
    """
    step = slurm_step() if not inside_launcher() else None
    if step is not None and not _starts_for_its_machine(step, recipe):
        os.environ.update(step.environment())
    if not inside_launcher():
        return recipe
    if started_by_us():
        die_with(int(os.environ[STARTED_BY_US]))
    else:
        recipe = _with_processes(recipe, int(os.environ.get("WORLD_SIZE", "1")))
    use_engine(recipe.launch)
    return recipe


def _starts_for_its_machine(step: SlurmStep, recipe: Recipe) -> bool:
    """Whether a step has one task per machine for more processes than that."""
    wanted = recipe.launch.num_processes
    return step.tasks == step.nodes and wanted > step.tasks and wanted % step.tasks == 0


def _with_processes(recipe: Recipe, there: int) -> Recipe:
    launch = recipe.launch
    if not is_named(launch):
        for name in ("DEEPSPEED", "FSDP", "MEGATRON_LM"):
            if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
                raise LaunchError(
                    f"accelerate started this process for {name}, and the recipe names no engine; add --launcher NAME, "
                    "so that the run's recipe says what trained it"
                )
        launch = launch.model_copy(update={"launcher": "ddp"})
    elif there > 1 and requested_engine(launch) == "single":
        raise LaunchError(
            f"{engine_name(launch)}, and this is one of {there} processes; start it alone, or choose another launcher"
        )
    if there != launch.num_processes and rank() == 0:
        print_words(
            f"launch.num_processes is {launch.num_processes} in the recipe; {there} were started, and {there} train"
        )
    return recipe.model_copy(update={"launch": launch.model_copy(update={"num_processes": there})})


def check_devices(recipe: Recipe) -> None:
    """Raises RecipeError where this machine has GPUs, and fewer than the processes that it would start."""
    import torch

    machines = _machines()
    here = recipe.launch.num_processes // machines
    gpus = torch.cuda.device_count()
    if gpus and here > gpus and not all(_on_cpu(recipe, stage) for stage in recipe.training_stages):
        raise LaunchError(
            f"launch.num_processes is {recipe.launch.num_processes}, which is {here} on this machine with its {gpus} GPUs; "
            f"set it to {gpus * machines} and gradient_accumulation_steps for the same global batch, or take more machines"
        )


def _on_cpu(recipe: Recipe, stage: str) -> bool:
    return bool(getattr(recipe, stage).trainer.get("use_cpu", False))


def _machines() -> int:
    step = slurm_step() if not inside_launcher() else None
    return step.nodes if step is not None else 1


def launch_command(recipe: Recipe, stage: str) -> list[str]:
    """What starts a training stage with `launch.num_processes` processes by hand, on this machine or on each of several."""
    machines = _machines()
    here = ["--nproc_per_node", str(recipe.launch.num_processes // machines)]
    if machines > 1:
        here = ["--nnodes", str(machines), *here]
    return ["torchrun", *here, "-m", "hymba_align", stage, str(run_root(recipe) / "recipe.yaml")]


def launch(recipe: Recipe, stage: str) -> None:
    """Runs a stage in processes of its own; SIGTERM reaches them, and they are waited for.

    Raises:
        Preempted: SIGTERM ended it, and its checkpoint is written.
        HymbaAlignError: they failed; the exit code is theirs.
    """
    step, machines = slurm_step(), _machines()
    options: dict[str, object] = {"processes": recipe.launch.num_processes // machines}
    if step is not None:
        options |= {"machines": machines, "machine": step.node, "address": f"{step.address}:{step.port}"}
    words = [stage, str(run_root(recipe) / "recipe.yaml")]
    _launch(stage, words, options, CONTINUES, environment=secrets_for(recipe))


def launch_here(what: str, words: Sequence[str], processes: int, *, continues: str) -> None:
    """Runs a command of hymba-align in so many processes on this machine, as `launch` does.

    Args:
        what: the command does, for messages.
        words: of the command.
        continues: words about the same command, given again.
    """
    _launch(what, ["--", *words], {"processes": processes, "continues": continues}, continues)


def _launch(
    what: str,
    words: Sequence[str],
    options: Mapping[str, object],
    continues: str,
    environment: Mapping[str, str] | None = None,
) -> None:
    with tempfile.TemporaryDirectory(prefix="hymba-align-") as folder:
        report = Path(folder) / "report"
        code = _wait_for([*_agent_command(options, report), *words], environment or {})
        told = report.read_text(encoding="utf-8") if report.is_file() else None
    if code == 0:
        return
    told = told if told is not None else f"its launcher {how_it_ended(code, continues)}"
    if code == Preempted.exit_code:
        raise Preempted(f"{what}: {told}; the same command continues it")
    error = ProcessesError(f"{what} failed: {told}")
    error.exit_code = code if code > 0 else 128 - code
    raise error


def _agent_command(options: Mapping[str, object], report: Path) -> list[str]:
    """What starts the processes of this machine, and writes to `report` how they ended; a command follows."""
    given = {"parent": os.getpid(), "report": report, **options}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "hymba_align.processes.agent", *flags]


def _wait_for(command: Sequence[str], more: Mapping[str, str]) -> int:
    """The exit code of a launcher, which gets the SIGTERM of this process, and more variables."""
    with subprocess.Popen(command, env={**os.environ, **more}) as process, forwarded_to(process):
        try:
            return process.wait()
        except KeyboardInterrupt:
            # The terminal interrupted the launcher too; killing it at once would leave it no time for its processes.
            try:
                process.wait(timeout=STOP_CHILDREN_S)
            except subprocess.TimeoutExpired:
                process.kill()
            raise


def secrets_for(recipe: Recipe) -> dict[str, str]:
    """What the environment of a run's processes has besides: the secrets that the recipe in the run folder leaves out."""
    return secrets_variable(recipe.model_dump(mode="json", exclude_unset=True))


def use_one_gpu() -> None:
    """Hides all GPUs but the first: transformers would wrap the model in DataParallel, which is not what one process means.

    To be called before anything initialises CUDA, which reads the variable once.
    """
    import torch

    if torch.cuda.device_count() > 1 and not torch.cuda.is_initialized():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[0]


def free_gpu_memory() -> None:
    """Gives back what finished work of this process holds, for the processes about to start."""
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def scoring_processes(recipe: Recipe) -> int:
    """How many processes score a stage: `eval.num_processes`, or else those that train, as far as each finds a GPU here.

    Without GPUs it is one: processes on the CPU share its cores, and one batch already uses them all.
    """
    import torch

    assert recipe.eval is not None, "the recipe has no section eval"
    if recipe.eval.num_processes is not None:
        return recipe.eval.num_processes
    return max(1, min(torch.cuda.device_count(), recipe.launch.num_processes))


def check_gpus(count: int) -> None:
    """Raises RecipeError where this machine has GPUs, and fewer than processes that are to score on it."""
    import torch

    gpus = torch.cuda.device_count()
    if gpus and count > gpus:
        raise LaunchError(f"eval.num_processes is {count}, and this machine has {gpus} GPUs; set it to {gpus}")
