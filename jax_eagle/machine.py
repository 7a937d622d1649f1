"""What a result was measured on."""

import datetime
import os
import platform
from pathlib import Path

import jax


def describe_machine() -> dict[str, str | int]:
    """Device, processor, versions and date, for the JSON files."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "device": jax.devices()[0].device_kind,
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
