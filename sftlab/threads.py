"""How long torch's threads wait awake for each other, decided before torch is loaded.

GCC's OpenMP library, torch's on Linux, lets a thread that has nothing to do spin, in case there is work soon. Beside other
programs the spinning takes the cores from them, and from the very thread that is waited for. A training on two cores beside
two busy programs took some thirty times as long; with what is chosen here it takes two to four times as long, and no
measurable time is lost where nothing else runs (benchmarks/README.md). A Mac's OpenMP library (LLVM's) gives way by itself.

    python -c "import os, sftlab; print(os.environ['GOMP_SPINCOUNT'])"
"""

import os
from pathlib import Path

NAME = "GOMP_SPINCOUNT"  # the library reads it once, when it is loaded
QUIET, BUSY = "5000", "1000"  # times that a thread looks for work before it sleeps


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT by what runs on this machine now, unless somebody else has set it, or OpenMP's own wait policy."""
    if "OMP_WAIT_POLICY" in os.environ or os.environ.get(NAME, QUIET) not in (QUIET, BUSY):
        return
    os.environ[NAME] = BUSY if 2 * count_running() >= (os.cpu_count() or 1) else QUIET


def count_running() -> int:
    """Programs beside this one that compute now or wait for a core; 0 where the system doesn't tell (elsewhere than on Linux)."""
    try:
        return int(Path("/proc/loadavg").read_text(encoding="ascii").split()[3].split("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        return 0
