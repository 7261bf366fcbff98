"""The parameter shapes the benchmarks step through, computed from the models' hyper-parameters."""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2(vocabulary: int = 50257, context: int = 1024, width: int = 768, layers: int = 12) -> list[Shape]:
    """GPT-2, the 124M model (124,439,808 parameters): tied output embedding, weights as (in, out)."""

    def linear(inputs: int, outputs: int) -> list[Shape]:
        return [(inputs, outputs), (outputs,)]

    norm: list[Shape] = [(width,), (width,)]
    attention = linear(width, 3 * width) + linear(width, width)
    mlp = linear(width, 4 * width) + linear(4 * width, width)
    return [(vocabulary, width), (context, width), *(norm + attention + norm + mlp) * layers, *norm]


def resnet50(classes: int = 1000) -> list[Shape]:
    """ResNet-50 (25,557,032 parameters): bottleneck blocks of 3, 4, 6 and 3, each convolution with a batch norm."""

    def convolution(inputs: int, outputs: int, kernel: int) -> list[Shape]:
        return [(outputs, inputs, kernel, kernel), (outputs,), (outputs,)]

    shapes = convolution(3, 64, 7)
    channels = 64
    for blocks, width in ((3, 64), (4, 128), (6, 256), (3, 512)):
        for block in range(blocks):
            shapes += convolution(channels, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(channels, 4 * width, 1)
            channels = 4 * width
    return [*shapes, (classes, channels), (classes,)]


def gpt2_large() -> list[Shape]:
    """A GPT-2 of 1.3 billion parameters: 24 layers of width 2048."""
    return gpt2(width=2048, layers=24)


def two_matrices() -> list[Shape]:
    return [(4096, 4096)] * 2


def hidden_matrices(width: int = 256, layers: int = 4) -> list[Shape]:
    """The matrices of a small transformer's layers, which are what Muon is for."""
    attention = [(width, 3 * width), (width, width)]
    return [*attention, (width, 4 * width), (4 * width, width)] * layers


def small_matrices() -> list[Shape]:
    return [(64, 64)] * 200


def small_mixed() -> list[Shape]:
    """1000 tensors, alternately a matrix of 64 x 64 and a vector of 64."""
    return [(64, 64), (64,)] * 500


def small_vectors() -> list[Shape]:
    return [(64,)] * 1000
