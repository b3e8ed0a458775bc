"""Measuring alignment: pairs to measure on, features of backbones, and the scores of their layers."""
