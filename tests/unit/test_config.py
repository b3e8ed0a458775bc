"""RSAConfig takes what it can mean and names what it cannot."""

import argparse
import dataclasses

import pytest

from rsa_megatron import RSAConfig, RSAPlugin
from rsa_megatron.alignment.distances import DISTANCES
from rsa_megatron.alignment.loss import NORMALIZATIONS


def test_the_defaults_are_the_papers():
    assert RSAConfig() == RSAConfig(
        weight=0.01,
        distance="euclidean",
        image_pooling="base",
        base_tile="first",
        stop_gradient="none",
        normalize="none",
    )


@pytest.mark.parametrize(
    "setting, message",
    [
        (dict(weight=-0.1), "--rsa-weight must be 0 or more, not -0.1"),
        (dict(weight=float("nan")), "--rsa-weight must be 0 or more"),
        (dict(distance="chebyshev"), "--rsa-distance must be one of euclidean, .*, not 'chebyshev'"),
        (dict(image_pooling="max"), "--rsa-image-pooling must be one of base, full"),
        (dict(base_tile="middle"), "--rsa-base-tile must be one of first, last"),
        (dict(stop_gradient="both"), "--rsa-stop-gradient must be one of none, text, vision"),
        (dict(normalize="std"), "--rsa-normalize must be one of none, mean-distance"),
    ],
)
def test_what_it_cannot_mean_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        RSAConfig(**setting)


def test_the_choices_are_those_of_the_mathematics():
    choices = {field.name: field.metadata.get("choices") for field in dataclasses.fields(RSAConfig)}
    assert choices["distance"] == tuple(DISTANCES) and choices["normalize"] == NORMALIZATIONS


def test_flags_override_the_config_of_the_plugin_that_added_them():
    plugin = RSAPlugin(RSAConfig(weight=0.5, distance="cosine"))
    parser = plugin.add_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--rsa-weight", "2", "--rsa-stop-gradient", "text"])
    assert plugin.config == RSAConfig(weight=2.0, distance="cosine", stop_gradient="text")
    assert (args.rsa_weight, args.rsa_distance) == (2.0, "cosine")
    for field in dataclasses.fields(RSAConfig):
        assert f"--rsa-{field.name.replace('_', '-')}" in parser.format_help()
