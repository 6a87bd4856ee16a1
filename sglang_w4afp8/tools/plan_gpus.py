"""The cards that ``plan`` knows: compute capability, memory, and the rates of their data sheets.

Memory is what ``nvidia-smi`` calls total, in MiB, because SGLang sizes its pools from that number
(``get_nvgpu_memory_capacity``); ECC cards show less than the label says. Rates are the peaks of
NVIDIA's data sheets, without sparsity, for the SXM form where there are several; a kernel reaches
part of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sglang_w4afp8.errors import ConfigError
from sglang_w4afp8.layer import Device


@dataclass(frozen=True)
class Gpu:
    """One card.

    Attributes:
        name: as given to ``--gpu``.
        title: for people.
        capability: CUDA compute capability.
        memory_mib: total memory as nvidia-smi shows it.
        read_gb_s: memory bandwidth, 10⁹ bytes a second.
        fp8_tflops: dense FP8 rate; BF16's where the card has no FP8.
        nvlink_gb_s: NVLink per direction, 0 without.
    """

    name: str
    title: str
    capability: tuple[int, int]
    memory_mib: int
    read_gb_s: float
    fp8_tflops: float
    nvlink_gb_s: float

    @property
    def device(self) -> Device:
        """What a backend asks about the hardware."""
        return Device("cuda", self.capability, self.title)

    @property
    def memory_gib(self) -> float:
        """Total memory in GiB."""
        return self.memory_mib / 1024


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", "A100 80GB", (8, 0), 81920, 2039, 312, 300),
        Gpu("l20", "L20", (8, 9), 46068, 864, 239, 0),
        Gpu("l40s", "L40S", (8, 9), 46068, 864, 733, 0),
        Gpu("h20", "H20", (9, 0), 97871, 4000, 296, 450),
        Gpu("h100", "H100 80GB", (9, 0), 81559, 3350, 1979, 450),
        Gpu("h200", "H200", (9, 0), 143771, 4800, 1979, 450),
        Gpu("b200", "B200", (10, 0), 183359, 8000, 4500, 900),
    )
}


def find_gpu(name: str, memory_gib: float | None = None) -> Gpu:
    """The card called ``name``, perhaps with another amount of memory.

    Raises:
        ConfigError: there is none.
    """
    gpu = GPUS.get(name.lower())
    if gpu is None:
        raise ConfigError(
            f"--gpu {name}",
            f"the known cards are {', '.join(GPUS)}",
            ["--gpu with the closest one and --gpu-memory-gib with yours"],
        )
    return gpu if memory_gib is None else replace(gpu, memory_mib=round(memory_gib * 1024))
