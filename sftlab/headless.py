"""Whether someone looks on: widgets are for a person at a notebook; papermill, nbval and a terminal get text and pictures.

python -c "from sftlab import headless; print(headless.has_reader())"
"""


def has_reader() -> bool:
    """Whether someone sits before this notebook. A front-end says with each cell whether it could ask its user something
    (`allow_stdin` of Jupyter's messages); papermill, nbval and other programs that run notebooks say no."""
    from ipykernel.zmqshell import ZMQInteractiveShell
    from IPython import get_ipython

    shell = get_ipython()
    if not isinstance(shell, ZMQInteractiveShell):
        return False
    return bool(shell.kernel.get_parent("shell").get("content", {}).get("allow_stdin"))
