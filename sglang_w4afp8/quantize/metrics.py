"""What rounding lost: signal and error energy, collected group by group, reported in dB."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

# Reported for an error of exactly zero, so that JSON and tables stay free of infinities.
LOSSLESS_DB = 999.0


@dataclass
class ErrorStats:
    """Energies over some set of weights; additive.

    Attributes:
        signal: Σ w², float64 arithmetic.
        error: Σ (w − ŵ)².
        dot: Σ w·ŵ.
        recovered: Σ ŵ².
        count: number of weights.
        zero_groups: groups whose weights are all zero (their scale is 1 and their codes 0).
    """

    signal: float = 0.0
    error: float = 0.0
    dot: float = 0.0
    recovered: float = 0.0
    count: int = 0
    zero_groups: int = 0

    def add(self, other: ErrorStats) -> None:
        """Accumulate another set."""
        self.signal += other.signal
        self.error += other.error
        self.dot += other.dot
        self.recovered += other.recovered
        self.count += other.count
        self.zero_groups += other.zero_groups

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio in dB; :data:`LOSSLESS_DB` when nothing was lost."""
        if self.error <= 0.0:
            return LOSSLESS_DB
        if self.signal <= 0.0:
            return -LOSSLESS_DB
        return 10.0 * math.log10(self.signal / self.error)

    @property
    def cosine(self) -> float:
        """Cosine between original and restored weights; 1.0 when both are zero."""
        norm = math.sqrt(self.signal * self.recovered)
        return self.dot / norm if norm > 0.0 else 1.0

    @classmethod
    def compare(cls, original: torch.Tensor, restored: torch.Tensor) -> ErrorStats:
        """Energies of two tensors of equal shape, computed in float64."""
        reference = original.to(torch.float64).flatten()
        value = restored.to(torch.float64).flatten()
        return cls(
            signal=float(reference.dot(reference)),
            error=float((reference - value).square().sum()),
            dot=float(reference.dot(value)),
            recovered=float(value.dot(value)),
            count=reference.numel(),
        )
