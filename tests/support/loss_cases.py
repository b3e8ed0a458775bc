"""Pairs of rows, and the loss of them with its gradients."""

import torch


def pairs(num_pairs=23, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    v_ND = torch.randn(num_pairs, 5, generator=generator, dtype=dtype)
    t_NE = torch.randn(num_pairs, 8, generator=generator, dtype=dtype) * 2 + 1
    return v_ND.requires_grad_(), t_NE.requires_grad_()


def value_and_gradients(function, v_ND, t_NE, **settings):
    value = function(v_ND, t_NE, **settings)
    return value.detach(), *torch.autograd.grad(value, (v_ND, t_NE))


def relative(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()
