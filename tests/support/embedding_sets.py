"""Embeddings as two encoders give them, and ReAlign as its paper writes it, on whole matrices, with mistakes to order.

Shapes: N rows, D width.
"""

import torch


def cone(num_rows: int, width: int, seed: int, *, exponent: float, spread: float) -> torch.Tensor:
    """Rows of any length around a direction of the seed's, their variances falling by a power law along axes of its own."""
    generator = torch.Generator().manual_seed(seed)
    mean_D = torch.nn.functional.normalize(torch.randn(width, generator=generator, dtype=torch.float64), dim=0)
    axes_DD = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    scales_D = torch.arange(1, width + 1, dtype=torch.float64) ** (-exponent / 2)
    noise_ND = torch.randn(num_rows, width, generator=generator, dtype=torch.float64) * (scales_D / scales_D.norm())
    lengths_N1 = 0.1 + 10 * torch.rand(num_rows, 1, generator=generator, dtype=torch.float64)
    return (mean_D + spread * noise_ND @ axes_DD) * lengths_N1


def images(num_rows=300, width=24):
    return cone(num_rows, width, seed=1, exponent=1.8, spread=0.8)


def texts(num_rows=420, width=24):
    return cone(num_rows, width, seed=2, exponent=1.3, spread=1.4)


def unit(x_ND):
    return x_ND / x_ND.norm(dim=1, keepdim=True)


MISTAKES = ("variance over N - 1", "no root", "no projection before the centroid", "mean of each batch")


def written_out(image_ND, text_ND, *, epsilon=0.0, mistake=None, batch=None) -> dict:
    """Every stage of arXiv 2602.07026, section 4, by name: two means, T's, s, e~, e', mu', e'', e^."""
    x, y = unit(image_ND.double()), unit(text_ND.double())
    mean_x, mean_y = x.mean(0), y.mean(0)
    divisors = [len(e) - (mistake == "variance over N - 1") for e in (x, y)]
    t_x, t_y = ((e - mean).square().sum().item() / n for e, mean, n in zip((x, y), (mean_x, mean_y), divisors))
    s = t_x / (t_y + epsilon)
    s = s if mistake == "no root" else s**0.5
    scaled = mean_x + s * (y - mean_y)
    projected = scaled if mistake == "no projection before the centroid" else unit(scaled)
    drifted = projected.mean(0)
    if mistake == "mean of each batch":
        drifted = torch.cat([part.mean(0).expand_as(part) for part in projected.split(batch)])
    shifted = projected - drifted + mean_x
    return dict(
        mean_x=mean_x,
        mean_y=mean_y,
        t_x=t_x,
        t_y=t_y,
        s=s,
        scaled=scaled,
        projected=projected,
        drifted=drifted,
        shifted=shifted,
        result=unit(shifted),
    )


NUMBERS = ("image_mean_D", "text_mean_D", "projected_mean_D", "scale", "image_trace", "text_trace")
