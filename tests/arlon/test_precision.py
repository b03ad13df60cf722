"""Which devices compute in bfloat16 in hardware."""

import pytest
import torch

from arlon.precision import fast_dtype, has_fast_bfloat16


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({}, False), ({"avx512_f": True}, False), ({"avx512_bf16": True}, True), ({"amx_bf16": True}, True)],
)
def test_a_processor_is_fast_only_with_instructions_for_it(
    monkeypatch: pytest.MonkeyPatch, flags: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    assert has_fast_bfloat16("cpu") is expected
    assert fast_dtype("cpu") is (torch.bfloat16 if expected else torch.float32)


def test_other_devices_are_taken_as_slow() -> None:
    assert not has_fast_bfloat16("mps")
