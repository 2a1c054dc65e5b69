"""Trains jobs of engine_worker.py with a model that spoils marked rows: `guard_worker.py JOBS`, under torchrun.

A job also says `how` rows are spoiled. What stopped it goes to error-RANK.txt in its folder.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    """Runs the jobs, in all processes alike."""
    import engine_worker
    import spoiling
    import torch

    from hymba_align.data.template import load_tokenizer
    from hymba_align.errors import HymbaAlignError
    from hymba_align.train import dpo, sft

    for job in json.loads(Path(sys.argv[1]).read_text()):
        module = sft if job["stage"] == "sft" else dpo
        run_stage = module.run_stage

        def released(trainer: Any, stage_dir: Path, run_stage: Any = run_stage) -> Any:
            try:
                return run_stage(trainer, stage_dir)
            except HymbaAlignError:
                ran = engine_worker.running_engine(trainer)
                Path(stage_dir, "observed.json").write_text(json.dumps(ran))
                engine_worker.release(trainer)
                raise

        undo = spoiling.spoil(load_tokenizer(job["start"]), job["how"])
        module.run_stage = released
        try:
            engine_worker.run_job(job)
        except HymbaAlignError as error:
            Path(job["folder"], f"error-{os.environ['RANK']}.txt").write_text(str(error))
        finally:
            undo()
            module.run_stage = run_stage
        gc.collect()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
