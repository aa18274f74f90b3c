"""What NVIDIA's driver says of the GPUs now: use, memory, power, temperature, through NVML (the package nvidia-ml-py).

NVML's use is the share of the last moments (1/6 to 1 s, by the kind of GPU) in which some kernel ran, however small: a GPU
at 100 % can still compute at a tenth of its rate. How well it is used, FLOPs tell (`flops`).

    python -c "from sftlab import gpus; print(gpus.find_gpus()); print(gpus.read_gpus())"
"""

import contextlib
import functools


@functools.cache
def find_gpus() -> tuple[list, str]:
    """(NVML's handles of this machine's GPUs, why there are none); asked once in a process, which stays NVML's user.

    All GPUs of the machine, whatever CUDA_VISIBLE_DEVICES says.
    """
    try:
        import pynvml
    except ImportError:
        return [], "the package nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError as error:
        return [], f"NVML: {error}"
    return handles, "" if handles else "NVML: no GPU"


def read_driver() -> str | None:
    """The version of NVIDIA's driver, or None where there is none."""
    if not find_gpus()[0]:
        return None
    import pynvml

    found = ask(pynvml.nvmlSystemGetDriverVersion)
    return found.decode() if isinstance(found, bytes) else found


def describe_gpus() -> list[dict]:
    """Of each GPU: index, name, memory_total_bytes (None where NVML doesn't say)."""
    found = []
    for index, handle in enumerate(find_gpus()[0]):
        import pynvml

        name = ask(pynvml.nvmlDeviceGetName, handle)
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        name = name.decode() if isinstance(name, bytes) else name  # bytes in versions before 11.5
        found.append({"index": index, "name": name, "memory_total_bytes": memory and memory.total})
    return found


def read_gpus() -> list[dict]:
    """Of each GPU now: index, use_percent, memory_bytes, power_watts, celsius; None for what it doesn't tell.

    A GPU that is split (MIG) tells no use, some laptop GPUs no power.
    """
    found = []
    for index, handle in enumerate(find_gpus()[0]):
        import pynvml

        use = ask(pynvml.nvmlDeviceGetUtilizationRates, handle)
        memory = ask(pynvml.nvmlDeviceGetMemoryInfo, handle)
        milliwatts = ask(pynvml.nvmlDeviceGetPowerUsage, handle)
        celsius = ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU)
        found.append({"index": index, "use_percent": use and use.gpu, "memory_bytes": memory and memory.used,
                      "power_watts": None if milliwatts is None else milliwatts / 1000, "celsius": celsius})  # fmt: skip
    return found


def ask(question, *arguments):
    """NVML's answer, or None where this GPU or driver doesn't know or the GPU is lost."""
    import pynvml

    with contextlib.suppress(pynvml.NVMLError):
        return question(*arguments)
    return None
