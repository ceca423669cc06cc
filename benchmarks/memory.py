"""How much memory this process held at most, since a moment of its choosing."""

from pathlib import Path


def begin_memory() -> float:
    """Return what the process holds now, in MiB, and let its peak begin anew here."""
    # proc(5): 5 resets the peak resident set size to the current one.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak_mib()


def peak_mib() -> float:
    """Return the largest resident memory since then, in MiB."""
    status = Path("/proc/self/status").read_text("ascii").splitlines()
    line = next(line for line in status if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024
