"""A kernel for several notebooks, one after the other: only the first of them waits until the libraries are loaded.

Each notebook finds what a new kernel would have: no names, its folder, its environment, and seeds that nobody has used. What
a notebook changes in the libraries themselves stays for the next.

    python -c "from sftlab.course.shared_kernel import SharedKernel; help(SharedKernel)"
"""

import gc
import os
import random
import sys
from pathlib import Path

PER_NOTEBOOK = "SFTLAB_RUN_DIR"  # of the environment; libraries read the rest of it once, when they are imported
SECONDS = 60  # that clearing up may take


class SharedKernel:
    """Hand out a kernel that has nothing of an earlier notebook; `close` ends it."""

    def __init__(self):
        self.manager, self.environment = None, {}

    def prepare(self, folder: Path):
        """A manager, as `nbclient` takes it, for a notebook that runs in this folder with this process's environment.

        It has the kernel of the last notebook, or none yet, if that one has ended or began with another environment.
        """
        from jupyter_client import AsyncKernelManager

        class Manager(AsyncKernelManager):
            def client(self, **more):
                self.last_client = super().client(**more)
                return self.last_client

        environment = {name: value for name, value in os.environ.items() if name != PER_NOTEBOOK}
        if self.manager and (environment != self.environment or not self._renew(folder)):
            self.close()
        if not self.manager:
            self.manager, self.environment = Manager(kernel_name="python3"), environment
        return self.manager

    def release(self) -> None:
        """Close the connection of the notebook that has ended; `nbclient` leaves it open where the kernel isn't its own."""
        if client := getattr(self.manager, "last_client", None):
            client.stop_channels()

    def close(self) -> None:
        """End the kernel, if there is one; the next notebook gets a new one."""
        from jupyter_core.utils import run_sync

        self.release()
        if self.manager and self.manager.has_kernel:
            run_sync(self.manager.shutdown_kernel)()
        self.manager = None

    def _renew(self, folder: Path) -> bool:
        """Have the kernel forget its last notebook; False where it doesn't answer."""
        from jupyter_client import BlockingKernelClient

        code = f"from sftlab.course import shared_kernel; shared_kernel.renew({str(folder)!r}, {dict(os.environ)!r})"
        client = BlockingKernelClient(**self.manager.get_connection_info(session=True))
        client.start_channels(stdin=False)
        try:
            client.wait_for_ready(SECONDS)
            return client.execute(code, silent=True, reply=True, timeout=SECONDS)["content"]["status"] == "ok"
        except (RuntimeError, TimeoutError):  # the kernel has died; it's at work on something that doesn't end
            return False
        finally:
            client.stop_channels()


def renew(folder: str, environment: dict[str, str]) -> None:
    """In the kernel: forget the last notebook, and begin as a new kernel would in this folder and environment."""
    from IPython import get_ipython

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    get_ipython().reset(new_session=True)
    gc.collect()  # a model and its trainer hold each other
    random.seed()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    if "torch" in sys.modules:
        sys.modules["torch"].seed()
        sys.modules["torch"].cuda.empty_cache()
