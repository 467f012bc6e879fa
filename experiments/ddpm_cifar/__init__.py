"""DDPM (Ho et al. 2020) on CIFAR-10."""

from experiments.ddpm_cifar.task import DDPM

__all__ = ["DDPM"]
