"""Pages of 2 MB for the arrays of a host that computes."""

import os
import sys
import threading
from pathlib import Path

SETTING = "glibc.malloc.hugetlb=1"  # glibc asks the kernel for huge pages, where those need asking
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ACCELERATORS = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")  # files in /dev of GPUs and TPUs


def use_huge_pages() -> None:
    """Restart this command with huge pages for its memory, if that makes a difference and was not done.

    XLA:CPU allocates the arrays of a step and frees them after it, and the kernel clears every page again in the next
    step: in pages of 4 KB that takes up to a third of the time of a small model's step. glibc reads its setting only
    when a process starts. Call it before anything is done and before jax is loaded. Nothing happens where the kernel
    gives huge pages unasked or not at all, with an accelerator, if GLIBC_TUNABLES has the setting already, or if the
    process is not the command's own, as in a notebook.
    """
    settings = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb" in settings or not _is_own_process():
        return
    if not _computes() or not _huge_pages_need_asking():
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (settings, SETTING)))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _is_own_process() -> bool:
    """Whether the process was started for this command: with its flags last, and without other threads."""
    flags = sys.argv[1:]
    return sys.orig_argv[len(sys.orig_argv) - len(flags) :] == flags and threading.active_count() == 1


def _huge_pages_need_asking() -> bool:
    try:
        return "[madvise]" in HUGE_PAGES.read_text()
    except OSError:
        return False  # another kernel


def _computes() -> bool:
    """Whether this host computes itself, as far as that can be known without jax."""
    if os.environ.get("JAX_PLATFORMS", "cpu") not in ("", "cpu"):
        return False
    return not any(next(Path("/dev").glob(pattern), None) for pattern in ACCELERATORS)
