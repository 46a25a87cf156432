"""Memory is taken in a process of its own: the operating system counts only the highest that a process ever had."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import metafast


@functools.cache
def in_a_fresh_process(script: str, *arguments: str) -> dict[str, float]:
    """What ``script`` prints as JSON in its last line, with the metafast that this process has imported."""
    paths = [str(Path(metafast.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, script, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
