"""What verify reports of two models that differ."""

import torch

from checkpoint_conversion import verify


def report(capsys, **changed) -> tuple[int, str]:
    expected = [{part: torch.ones(3) for part in verify.OUTPUTS}, {part: torch.ones(3) for part in verify.OUTPUTS[3:]}]
    actual = [{part: changed.get(part.replace(" ", "_"), value) for part, value in parts.items()} for parts in expected]
    code = verify.report(["one image", "no image"], expected, actual, 1e-4)
    return code, capsys.readouterr().err


def test_a_report_names_the_first_part_and_takes_nan_and_other_shapes_for_different(capsys):
    assert report(capsys) == (0, "")
    assert report(capsys, logits=torch.ones(3) + 5e-5) == (0, "")
    code, error = report(capsys, logits=torch.ones(3) * 2, last_hidden_state=torch.ones(3) * 1.5)
    assert code == 1 and error.startswith(
        "error: last hidden state differ by 5.0e-01 of their largest value (sample 'one image')"
    )
    assert report(capsys, loss=torch.full((3,), torch.nan))[0] == 1
    assert report(capsys, projected_tokens=torch.ones(4))[0] == 1
