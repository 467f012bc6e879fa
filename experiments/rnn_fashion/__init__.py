"""A vanilla tanh RNN on Fashion-MNIST."""

from experiments.rnn_fashion.task import RNNFashion

__all__ = ["RNNFashion"]
