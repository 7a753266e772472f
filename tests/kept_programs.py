"""Where the suite keeps what it compiled. Nothing but the standard library: jax comes later."""

import hashlib
import platform
from pathlib import Path


def of_this_processor(folder: Path) -> Path:
    """`folder` if its programs are this kind of processor's, else one inside it that is. jax keeps
    programs of other XLA_FLAGS apart (--xla_cpu_max_isa), but not those of other processors, whose
    instructions this one may lack."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kind = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    mark = hashlib.sha256(f"{platform.machine()} {kind}".encode()).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / "processor"
    if not marker.exists():
        marker.write_text(mark)
    return folder if marker.read_text() == mark else folder / mark
