"""What a device without room comes to for a person: one line. No jax."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

_BYTES = re.compile(r"(?:allocate|allocating) ([0-9]+)(?: bytes)?", re.IGNORECASE)
_GIB = 2**30


def out_of_memory_line(error: BaseException) -> str | None:
    """What was wanted, who holds the device, and what takes less; None: another failure."""
    text = str(error)
    if not any(sign in text for sign in ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY")):
        return None
    asked = _BYTES.search(text)
    wanted = f"{int(asked[1]) / _GIB:.2f} GiB more were asked for" if asked else text.split("\n")[0]
    held = gpu_holders()
    if held:
        others = ", ".join(
            f"{name} (pid {pid}) holds {mib / 1024:.1f} GiB" for pid, name, mib in held
        )
        return (
            f"the device is out of memory: {wanted}, and {others}. Stop it, or choose another GPU "
            "with CUDA_VISIBLE_DEVICES"
        )
    return (
        f"the device is out of memory: {wanted}. Less is taken with a larger grpo.micro_batches, "
        "model.remat=full, a smaller grpo.prompts_per_step, eval.batch_prompts or "
        "rollout.max_completion_tokens; --dry-run tells how much"
    )


def gpu_holders() -> list[tuple[int, str, float]]:
    """(pid, program, MiB) of the other processes on the GPUs, as far as nvidia-smi sees them."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    query = ["--query-compute-apps=pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([tool, *query], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.splitlines() if done.returncode == 0 else ():
        # A program's path may hold commas itself.
        pid, _, rest = line.partition(",")
        name, _, used = rest.rpartition(",")
        if pid.strip().isdigit() and used.strip().isdigit() and int(pid) != os.getpid():
            program = os.path.basename(name.strip()) or "a process"
            found.append((int(pid), program, float(used)))
    return sorted(found, key=lambda holder: -holder[2])
