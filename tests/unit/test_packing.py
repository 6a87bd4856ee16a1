"""INT4 packing: every byte, every code, both directions, against plain Python."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_w4afp8.errors import CheckpointError
from sglang_w4afp8.packing import has_minus_eight, pack_int4, unpack_int4


def test_the_convention_by_hand() -> None:
    # Element 0 in the low nibble, element 1 in the high one, two's complement.
    assert pack_int4(torch.tensor([1, 2])).tolist() == [0x21]
    assert pack_int4(torch.tensor([-1, 7])).view(torch.uint8).tolist() == [0x7F]
    assert pack_int4(torch.tensor([7, -8])).view(torch.uint8).tolist() == [0x87]


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=64).filter(lambda c: len(c) % 2 == 0))
def test_against_plain_python(codes: list[int]) -> None:
    packed = pack_int4(torch.tensor(codes))
    expected = [(codes[i] & 15) | (codes[i + 1] & 15) << 4 for i in range(0, len(codes), 2)]
    assert packed.view(torch.uint8).tolist() == expected
    assert unpack_int4(packed).tolist() == codes


def test_every_byte_survives() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    assert torch.equal(pack_int4(unpack_int4(every)).view(torch.uint8), every)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float32, torch.float64, torch.bfloat16])
def test_unpack_dtypes(dtype: torch.dtype) -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes), dtype), codes.to(dtype))


def test_refusals() -> None:
    with pytest.raises(CheckpointError, match="3 INT4 codes"):
        pack_int4(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(CheckpointError, match="8"):
        pack_int4(torch.tensor([8, 0]))
    with pytest.raises(CheckpointError, match="-9"):
        pack_int4(torch.tensor([0, -9]))


@pytest.mark.parametrize("position", [0, 1, 62, 63])
def test_minus_eight_is_found_in_either_nibble(position: int) -> None:
    codes = torch.randint(-7, 8, (64,), dtype=torch.int8)
    assert not has_minus_eight(pack_int4(codes))
    codes[position] = -8
    assert has_minus_eight(pack_int4(codes))


def test_minus_eight_is_found_in_the_last_byte_of_a_large_tensor() -> None:
    packed = torch.zeros(3, 200_001, dtype=torch.int8)
    assert not has_minus_eight(packed)
    packed[2, -1] = 0x08
    assert has_minus_eight(packed)
    assert not has_minus_eight(packed[:, :-1])
