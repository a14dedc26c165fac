# SPDX-License-Identifier: MIT
"""Operators in NumPy, and a multilayer perceptron with backpropagation by hand.

Layer i computes zⁱ = aⁱ·Wⁱ + bⁱ, where a⁰ = x. Hidden layers continue with aⁱ⁺¹ = f(zⁱ), where f is
the sigmoid σ or tanh. The loss L is the cross-entropy of softmax(z), or the binary cross-entropy of
σ(z) summed over the classes. For both, ∂L/∂z = p − t at the output, with the probabilities p and
the one-hot label t. Backpropagation takes δ = ∂L/∂zⁱ from the last layer to the first:

    ∂L/∂Wⁱ = aⁱᵀ·δ    ∂L/∂bⁱ = Σ δ over samples    ∂L/∂zⁱ⁻¹ = δ·Wⁱᵀ ⊙ f'(zⁱ⁻¹)

The derivatives are known from the activations a = f(z): σ' = a·(1 − a), and tanh' = 1 − a².

This module imports NumPy alone; `NumpyMLP.copy_to` takes a model of PyTorch.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Hidden = Literal["sigmoid", "tanh"]
Init = Literal["xavier", "zero"]
Loss = Literal["cross-entropy", "bce"]


def maximum(a: Array, b: Array) -> Array:
    """Return the elementwise maximum."""
    return np.maximum(a, b)


def matmul_t(x: Array) -> Array:
    """Return ``x·xᵀ``, ``(n, k) → (n, n)``.

    NumPy sees the transpose and calls BLAS's syrk, which does half of the work.
    """
    return x @ x.T


def matmul(a: Array, b: Array) -> Array:
    """Return ``a·bᵀ``, ``a (m, k)``, ``b (n, k)`` → ``(m, n)``."""
    return a @ b.T


def linear_sigmoid(x: Array, weight: Array, bias: Array) -> Array:
    """Return ``sigmoid(x·weightᵀ + bias)``.

    ``x (m, in)``, ``weight (out, in)``, ``bias (out)`` → ``(m, out)``.
    """
    return sigmoid(x @ weight.T + bias)


def sigmoid(z: Array) -> Array:
    """Return ``1/(1 + e⁻ᶻ)``, computed as ``(1 + tanh(z/2))/2``, which does not overflow."""
    result = np.tanh(z / 2)
    result += 1
    result /= 2
    return result


def sigmoid_prime(a: Array) -> Array:
    """Return the sigmoid's derivative ``σ'(z) = a·(1 − a)``, from ``a = σ(z)``."""
    derivative: Array = a * (1 - a)
    return derivative


def tanh_prime(a: Array) -> Array:
    """Return the hyperbolic tangent's derivative ``tanh'(z) = 1 − a²``, from ``a = tanh(z)``."""
    return 1 - a * a


class Activation(NamedTuple):
    """An activation and its derivative.

    Attributes:
        function: the activation, of z.
        prime: the derivative at z, from the activation's value a.
    """

    function: Callable[[Array], Array]
    prime: Callable[[Array], Array]


ACTIVATIONS: dict[Hidden, Activation] = {
    "sigmoid": Activation(sigmoid, sigmoid_prime),
    "tanh": Activation(np.tanh, tanh_prime),
}


class NumpyMLP:
    """A multilayer perceptron.

    All parameters are in one vector, so that one message carries them or their gradient.

    Attributes:
        parameters: the vector.
        weights: views of the vector, ``(size_i, size_i+1)`` for layer i.
        biases: views of the vector, ``(size_i+1)`` for layer i.

    Args:
        sizes: features of the input and of each layer's output, such as [784, 30, 10].
        hidden: activation of the hidden layers, "sigmoid" or "tanh".
        loss: "cross-entropy" takes the softmax of the outputs; "bce", binary cross-entropy per
            class, takes their sigmoids.
        init: "xavier" draws the weights from a normal distribution of variance 2/(size_i +
            size_i+1) (Glorot and Bengio, 2010). With "zero" all units of a layer have the same
            gradient, and stay alike until roundings make them differ. Biases are 0.
        seed: of the weights.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        hidden: Hidden = "sigmoid",
        loss: Loss = "cross-entropy",
        init: Init = "xavier",
        seed: int = 0,
        dtype: type[np.floating[Any]] = np.float32,
    ):
        self.sizes = tuple(sizes)
        self.hidden = hidden
        self.loss = loss
        self.parameters = np.zeros(sum((m + 1) * n for m, n in pairwise(sizes)), dtype)
        self.weights, self.biases = self.weights_and_biases(self.parameters)
        if init == "zero":
            return
        generator = np.random.default_rng(seed)
        for weight in self.weights:
            weight[:] = generator.normal(scale=(2 / sum(weight.shape)) ** 0.5, size=weight.shape)

    def weights_and_biases(self, vector: Array) -> tuple[list[Array], list[Array]]:
        """Return views of ``vector``, laid out as `parameters`: the weights and the biases."""
        weights, biases, at = [], [], 0
        for m, n in pairwise(self.sizes):
            weights.append(vector[at : at + m * n].reshape(m, n))
            biases.append(vector[at + m * n : at + (m + 1) * n])
            at += (m + 1) * n
        return weights, biases

    def forward(self, x: Array) -> tuple[list[Array], Array]:
        """Return the inputs of all layers, and the outputs ``(b, classes)``.

        ``x`` is ``(b, size_0)``.
        """
        inputs = self.hidden_layers(x)
        return inputs, self.output_layer(inputs[-1])

    def hidden_layers(self, x: Array) -> list[Array]:
        """Return the inputs of all layers: ``x (b, size_0)``, and hidden layers' activations."""
        inputs = [x]
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            inputs.append(ACTIVATIONS[self.hidden].function(inputs[-1] @ weight + bias))
        return inputs

    def output_layer(self, a: Array) -> Array:
        """Return the outputs ``z (b, classes)`` for the last layer's input ``a``."""
        z: Array = a @ self.weights[-1] + self.biases[-1]
        return z

    def loss_sum(self, z: Array, labels: Array) -> tuple[float, Array]:
        """Return the loss of the outputs ``z``, summed over samples, and its gradient by ``z``."""
        targets = np.zeros_like(z)
        targets[np.arange(len(labels)), labels] = 1
        if self.loss == "cross-entropy":
            # Without the largest z no power overflows.
            shifted = z - z.max(axis=1, keepdims=True)
            powers = np.exp(shifted)
            totals = powers.sum(axis=1, keepdims=True)
            return float(
                np.log(totals).sum() - (shifted * targets).sum()
            ), powers / totals - targets
        # −t·log σ(z) − (1 − t)·log(1 − σ(z)) = log(1 + eᶻ) − t·z
        return float((np.logaddexp(0, z) - targets * z).sum()), sigmoid(z) - targets

    def backward(self, inputs: Sequence[Array], delta: Array) -> Array:
        """Return the gradient summed over samples, a vector laid out as `parameters`.

        Args:
            inputs: of all layers, from `forward`.
            delta: the loss's gradient by the outputs, from `loss_sum`.
        """
        gradient = np.empty_like(self.parameters)
        d_weights, d_biases = self.weights_and_biases(gradient)
        for i in reversed(range(len(self.weights))):
            np.matmul(inputs[i].T, delta, out=d_weights[i])
            np.sum(delta, axis=0, out=d_biases[i])
            if i > 0:
                delta = delta @ self.weights[i].T * ACTIVATIONS[self.hidden].prime(inputs[i])
        return gradient

    def gradients(self, x: Array, labels: Array) -> tuple[float, Array]:
        """Return the loss and the gradient for ``x (b, size_0)``, both summed over samples."""
        inputs, z = self.forward(x)
        loss, delta = self.loss_sum(z, labels)
        return loss, self.backward(inputs, delta)

    def evaluate(self, x: Array, labels: Array) -> tuple[float, int]:
        """Return the loss summed over samples, and the number of samples with the right class."""
        z = self.forward(x)[1]
        return self.loss_sum(z, labels)[0], int((z.argmax(axis=1) == labels).sum())

    def copy_to(self, model: "torch.nn.Module") -> None:
        """Copy the weights and biases to ``model``, PyTorch's linear layers of the same sizes."""
        import torch

        layers = zip(self.weights, self.biases, strict=True)
        with torch.no_grad():
            for p, value in zip(
                model.parameters(), (t for layer in layers for t in layer), strict=True
            ):
                p.copy_(torch.from_numpy(value.T))


class SGD:
    """Gradient descent with momentum and an L2 penalty, as `torch.optim.SGD`.

    ``v ← momentum·v + g + λ·W``, ``p ← p − lr·v``. The penalty is ``λ/2·‖W‖²`` of the weights, or
    with ``decay_biases`` ``λ/2·‖p‖²`` of all parameters.
    """

    def __init__(
        self,
        model: NumpyMLP,
        lr: float,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        decay_biases: bool = False,
    ):
        self.model = model
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.decay_biases = decay_biases
        self.velocity = np.zeros_like(model.parameters)

    def step(self, gradient: Array) -> None:
        """Update the parameters by ``gradient``, a vector laid out as they are."""
        self.velocity *= self.momentum
        self.velocity += gradient
        if self.weight_decay and self.decay_biases:
            self.velocity += self.weight_decay * self.model.parameters
        elif self.weight_decay:
            for velocity, weight in zip(
                self.model.weights_and_biases(self.velocity)[0], self.model.weights, strict=True
            ):
                velocity += self.weight_decay * weight
        self.model.parameters -= self.lr * self.velocity


def batches(samples: int, batch_size: int, generator: np.random.Generator) -> Iterator[Array]:
    """Yield the indices of each batch of an epoch, in random order. The last batch is the
    remainder."""
    order = generator.permutation(samples)
    for start in range(0, samples, batch_size):
        yield order[start : start + batch_size]
