# SPDX-License-Identifier: MIT
"""The three operators by NumPy's own calls, and a network on them with backpropagation by hand.

With a⁰ = x, layer i computes zⁱ = aⁱ·Wⁱ + bⁱ, the hidden ones aⁱ⁺¹ = σ(zⁱ). The loss L is the
cross-entropy of softmax(z), or the binary cross-entropy of σ(z) summed over the classes; of either
∂L/∂z = p − t at the output, p the probabilities and t the one-hot label. From there, back through the
layers, δ = ∂L/∂zⁱ gives

    ∂L/∂Wⁱ = aⁱᵀ·δ    ∂L/∂bⁱ = Σ δ over samples    ∂L/∂zⁱ⁻¹ = δ·Wⁱᵀ ⊙ aⁱ ⊙ (1 − aⁱ)

as σ' = σ·(1 − σ).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Init = Literal["xavier", "zeros"]
Loss = Literal["cross-entropy", "bce"]


def maximum(a: Array, b: Array) -> Array:
    """The elementwise maximum."""
    return np.maximum(a, b)


def matmul_t(x: Array) -> Array:
    """``x·xᵀ``, ``(n, k) → (n, n)``; NumPy notices, and has BLAS compute one half (syrk)."""
    return x @ x.T


def linear_sigmoid(x: Array, weight: Array, bias: Array) -> Array:
    """``sigmoid(x·weightᵀ + bias)``: ``x (m, in)``, ``weight (out, in)``, ``bias (out)`` → ``(m, out)``."""
    return sigmoid(x @ weight.T + bias)


def sigmoid(z: Array) -> Array:
    """``1/(1 + e⁻ᶻ)``, as ``(1 + tanh(z/2))/2``, which does not overflow."""
    result = np.tanh(z / 2)
    result += 1
    result /= 2
    return result


class MLP:
    """A multilayer perceptron with sigmoid hidden layers.

    All parameters lie in one vector, so that one message carries them, or their gradient.

    Attributes:
        parameters: the vector.
        weights: views of it, ``(size_i, size_i+1)`` for layer i.
        biases: views of it, ``(size_i+1)``.

    Args:
        sizes: such as [784, 30, 10].
        loss: "cross-entropy" of the softmax of the outputs, or "bce" of their sigmoids, per class.
        init: of the weights, Xavier's normal distribution of variance 2/(size_i + size_i+1) (Glorot and
            Bengio, 2010), or zeros, from which all neurons of a layer stay alike. Biases are 0.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        loss: Loss = "cross-entropy",
        init: Init = "xavier",
        seed: int = 0,
        dtype: type[np.floating[Any]] = np.float32,
    ):
        if loss not in ("cross-entropy", "bce"):
            raise ValueError(f"loss is {loss!r}, expected 'cross-entropy' or 'bce'")
        if init not in ("xavier", "zeros"):
            raise ValueError(f"init is {init!r}, expected 'xavier' or 'zeros'")
        self.sizes = tuple(sizes)
        self.loss = loss
        self.parameters = np.zeros(sum((m + 1) * n for m, n in pairwise(sizes)), dtype)
        self.weights, self.biases = self.views(self.parameters)
        if init == "xavier":
            generator = np.random.default_rng(seed)
            for weight in self.weights:
                weight[:] = generator.normal(scale=(2 / sum(weight.shape)) ** 0.5, size=weight.shape)

    def views(self, vector: Array) -> tuple[list[Array], list[Array]]:
        """``vector``, laid out as `parameters`, as weights and biases that share its memory."""
        weights, biases, at = [], [], 0
        for m, n in pairwise(self.sizes):
            weights.append(vector[at : at + m * n].reshape(m, n))
            biases.append(vector[at + m * n : at + (m + 1) * n])
            at += (m + 1) * n
        return weights, biases

    def forward(self, x: Array) -> tuple[list[Array], Array]:
        """The inputs of all layers, and the last one's ``(b, classes)`` outputs, for ``x (b, size_0)``."""
        inputs = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            inputs.append(sigmoid(inputs[-1] @ weight + bias))
        return inputs, inputs[-1] @ self.weights[-1] + self.biases[-1]

    def loss_sum(self, z: Array, labels: Array) -> tuple[float, Array]:
        """The loss of outputs ``z``, summed over samples, and its gradient by ``z``."""
        targets = np.zeros_like(z)
        targets[np.arange(len(labels)), labels] = 1
        if self.loss == "cross-entropy":
            # log Σ eᶻ, less the largest z, so that no power overflows
            shifted = z - z.max(axis=1, keepdims=True)
            powers = np.exp(shifted)
            totals = powers.sum(axis=1, keepdims=True)
            return float(np.log(totals).sum() - (shifted * targets).sum()), powers / totals - targets
        # −t·log σ(z) − (1 − t)·log(1 − σ(z)) = log(1 + eᶻ) − t·z
        return float((np.logaddexp(0, z) - targets * z).sum()), sigmoid(z) - targets

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        """The loss and the gradient, a vector laid out as `parameters`, summed over ``x (b, size_0)``."""
        inputs, z = self.forward(x)
        loss, delta = self.loss_sum(z, labels)
        gradient = np.empty_like(self.parameters)
        d_weights, d_biases = self.views(gradient)
        for i in reversed(range(len(self.weights))):
            np.matmul(inputs[i].T, delta, out=d_weights[i])
            np.sum(delta, axis=0, out=d_biases[i])
            if i > 0:
                delta = delta @ self.weights[i].T * inputs[i] * (1 - inputs[i])
        return loss, gradient

    def evaluate(self, x: Array, labels: Array) -> tuple[float, int]:
        """The loss summed over samples, and how many of them are classified right."""
        z = self.forward(x)[1]
        return self.loss_sum(z, labels)[0], int((z.argmax(axis=1) == labels).sum())


class SGD:
    """Gradient descent with momentum and an L2 penalty ``λ/2·‖W‖²`` on the weights, as torch.optim.SGD.

    ``v ← momentum·v + g + λ·W``, ``p ← p − lr·v``.
    """

    def __init__(self, model: MLP, lr: float, momentum: float = 0.0, weight_decay: float = 0.0):
        self.model = model
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.velocity = np.zeros_like(model.parameters)

    def step(self, gradient: Array) -> None:
        """Take a step against ``gradient``, which is laid out as the model's parameters."""
        self.velocity *= self.momentum
        self.velocity += gradient
        if self.weight_decay:
            for velocity, weight in zip(self.model.views(self.velocity)[0], self.model.weights, strict=True):
                velocity += self.weight_decay * weight
        self.model.parameters -= self.lr * self.velocity


def batches(samples: int, batch_size: int, generator: np.random.Generator) -> Iterator[Array]:
    """The indices of each batch of an epoch, in random order; the last one is the remainder."""
    order = generator.permutation(samples)
    for start in range(0, samples, batch_size):
        yield order[start : start + batch_size]
