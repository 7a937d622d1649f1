"""Eight host devices: their number is fixed when JAX starts, so they take their own process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.conftest import QUICK_XLA_FLAGS


def on_eight_devices(file: str, *arguments: str) -> Any:
    """What a test file prints as JSON when it is run as a program with eight devices."""
    root = Path(__file__).parents[1]
    # Programs run once or twice here: to optimise them takes longer than to run them.
    flags = f"{QUICK_XLA_FLAGS} --xla_force_host_platform_device_count=8"
    many = {
        "XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(root),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, file, *arguments], env=os.environ | many, cwd=root,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
