"""What verify reports of two models that differ."""

import torch

from checkpoint_conversion import verify


def faults(**changed) -> list[str]:
    expected = [{part: torch.ones(3) for part in verify.OUTPUTS}, {part: torch.ones(3) for part in verify.OUTPUTS[3:]}]
    actual = [{part: changed.get(part.replace(" ", "_"), value) for part, value in parts.items()} for parts in expected]
    return verify.compare_outputs(["one image", "no image"], expected, actual, 1e-4)


def test_the_first_part_is_named_and_nan_and_other_shapes_are_different():
    assert faults() == faults(logits=torch.ones(3) + 5e-5) == []
    (fault,) = faults(logits=torch.ones(3) * 2, last_hidden_state=torch.ones(3) * 1.5)
    assert fault.startswith("last hidden state differ by 5.0e-01 of their largest value (sample 'one image')")
    assert faults(loss=torch.full((3,), torch.nan)) and faults(projected_tokens=torch.ones(4))
