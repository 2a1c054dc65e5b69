"""A sandbox that runs Python code of ours besides calls, under the same confinement, to try what that forbids."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hymba_align.eval.bfcl import sandbox as sandbox_module
from hymba_align.eval.bfcl.sandbox import Limits, Sandbox

WORKS = '    works = {"execute": _execute, "grade": _grade}\n'
SNIPPET = """
def _snippet(request):
    space = {}
    exec(request["code"], space)
    return {"answer": space.get("answer")}


def main() -> None:"""


class SnippetSandbox(Sandbox):
    """The sandbox with an executor that has one more request."""

    def __init__(self, python: Path, *, limits: Limits | None = None) -> None:
        super().__init__(python, limits=limits)
        self.copy = tempfile.TemporaryDirectory()
        text = sandbox_module.EXECUTOR.read_text()
        assert text.count(WORKS) == text.count("def main() -> None:") == 1
        text = text.replace(WORKS, WORKS.replace("}", ', "snippet": _snippet}')).replace(
            "\ndef main() -> None:", SNIPPET
        )
        (Path(self.copy.name) / "executor.py").write_text(text)

    @property
    def executor(self) -> Path:
        return Path(self.copy.name) / "executor.py"

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self.copy.cleanup()

    def run_snippet(self, code: str) -> dict[str, Any]:
        """What Python code leaves as `answer`, or why it `failed`."""
        return self._ask("snippet", code=code)
