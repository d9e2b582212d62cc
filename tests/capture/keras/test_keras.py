"""Keras models as torch modules, and Keras' losses and optimizers reproduced."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")
import torch  # noqa: E402
from keras import layers, optimizers  # noqa: E402

import plait  # noqa: E402
from plait.capture.keras.module import KerasModule  # noqa: E402
from plait.capture.trace import call_model, loss_of  # noqa: E402
from plait.errors import TargetError  # noqa: E402

STEPS = 5


def train(job: plait.Job) -> tuple[list[float], KerasModule]:
    """Losses of a plain torch loop, and the trained module."""
    module = copy.deepcopy(job.model)
    optimizer = job.optimizer([(n, p) for n, p in module.named_parameters() if p.requires_grad])
    scheduler = job.scheduler(optimizer) if job.scheduler else None
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(call_model(module, job.batch[0]), job.batch[1], job.loss)
        loss.backward()
        if job.clip_norm:
            torch.nn.utils.clip_grad_norm_(module.parameters(), job.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses, module


def fit(model: Any, batch: tuple[Any, Any]) -> list[float]:
    """Losses of Keras' own training."""
    return [float(model.train_on_batch(*batch)) for _ in range(STEPS)]


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    return generator.standard_normal((8, 6)).astype("float32"), generator.integers(3, size=8)


def dense(optimizer: Any = "sgd", loss: Any = "sparse_categorical_crossentropy") -> Any:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(3, "softmax")])
    model.compile(optimizer=optimizer, loss=loss)
    return model


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "SGD": lambda: optimizers.SGD(0.1, weight_decay=0.1),
    "momentum": lambda: optimizers.SGD(0.1, momentum=0.9),
    "Nesterov": lambda: optimizers.SGD(0.1, momentum=0.9, nesterov=True, clipvalue=0.05),
    "Adam": lambda: optimizers.Adam(0.01, epsilon=1e-3),
    "AMSGrad": lambda: optimizers.Adam(0.01, amsgrad=True, clipnorm=0.1),
    "AdamW": lambda: optimizers.AdamW(0.01, weight_decay=0.2),
    "RMSprop": lambda: optimizers.RMSprop(0.01),
    "centered": lambda: optimizers.RMSprop(0.01, centered=True, momentum=0.5),
    "Adagrad": lambda: optimizers.Adagrad(0.1),
    "Adamax": lambda: optimizers.Adamax(0.05),
    "Nadam": lambda: optimizers.Nadam(0.01),
    "Lion": lambda: optimizers.Lion(0.01),
    "Adadelta": lambda: optimizers.Adadelta(1.0),
    "global clip": lambda: optimizers.Adam(0.01, global_clipnorm=0.1),
    "schedule": lambda: optimizers.SGD(
        optimizers.schedules.ExponentialDecay(0.2, 2, 0.5, staircase=True), momentum=0.9
    ),
}


# Keras 3.15's own Nadam step, beside numpy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_step_as_kerass_own(name: str, batch: tuple[Any, Any]):
    """Losses and parameters of a plain torch loop are those of train_on_batch."""
    model = dense(OPTIMIZERS[name]())
    losses, module = train(plait.from_keras(model, batch=batch))
    expected = fit(model, batch)

    assert losses == pytest.approx(expected, abs=1e-6)
    for variable in model.trainable_variables:
        got = module.get_parameter(module.names[variable.path])
        assert torch.allclose(got, variable.value, rtol=0, atol=2e-6), variable.path


def test_names_frozen_weights_statistics_and_modes():
    """Frozen weights are parameters without a gradient, moving statistics buffers, seeds neither; eval is eval."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4, 4, 3)),
            layers.Conv2D(5, 1, name="frozen", trainable=False),
            layers.BatchNormalization(name="norm"),
            layers.Dropout(0.5, seed=1),
            layers.Flatten(),
            layers.Dense(2, name="out"),
        ],
        name="net",
    )
    model.compile(loss="mse")
    x = np.random.default_rng(0).standard_normal((6, 4, 4, 3)).astype("float32")
    module = plait.from_keras(model, batch=(x, np.zeros((6, 2)))).model

    assert {n: p.requires_grad for n, p in module.named_parameters()} == {
        "net.frozen.kernel": False,
        "net.frozen.bias": False,
        "net.norm.gamma": True,
        "net.norm.beta": True,
        "net.out.kernel": True,
        "net.out.bias": True,
    }
    assert {n for n, _ in module.named_buffers()} == {"net.norm.moving_mean", "net.norm.moving_variance"}
    given = torch.from_numpy(x)
    with torch.no_grad():
        assert torch.allclose(module.eval()(given), model(given, training=False), atol=1e-6)
        assert torch.equal(module.net.norm.moving_mean, torch.zeros(5))
        first, second = (module.train()(given) for _ in range(2))
    assert not torch.allclose(first, second)  # dropout
    model(given, training=True), model(given, training=True)
    assert torch.allclose(module.net.norm.moving_mean, model.layers[1].moving_mean.value, atol=1e-7)
    assert torch.allclose(module.net.norm.moving_variance, model.layers[1].moving_variance.value, atol=1e-6)


def test_values_go_back(batch: tuple[Any, Any]):
    """After training, the Keras model predicts what the module does."""
    model = dense()
    _, module = train(plait.from_keras(model, batch=batch))
    given = torch.from_numpy(batch[0])

    assert module.to_keras() is model
    assert torch.allclose(model(given, training=False), module.eval()(given), atol=1e-6)


def test_a_keras_model_in_a_job(batch: tuple[Any, Any]):
    """plait.Job takes it as it is; a loss or optimizer of torch's stays; plait.trace captures it."""
    model = dense(optimizers.Adam(0.01))
    job = plait.Job(model, batch=batch)
    own = plait.Job(model, batch=batch, optimizer=lambda named: torch.optim.SGD(named, 0.1))

    assert isinstance(job.model, KerasModule)
    assert type(job.optimizer(list(job.model.named_parameters()))).__name__ == "KerasOptimizer"
    assert isinstance(own.optimizer(list(own.model.named_parameters())), torch.optim.SGD)
    program = plait.trace(job)
    assert program.dynamic
    assert {p.name for p in program.graph.parameters} == set(job.model.names.values())


class OwnStep(keras.Model):
    def __init__(self):
        super().__init__()
        self.layer = layers.Dense(3)

    def call(self, x):
        return self.layer(x)

    def train_step(self, data):
        return {}


def compiled(model: Any, **options: Any) -> Any:
    model.compile(**{"optimizer": "sgd", "loss": "mse", **options})
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "own train_step": (lambda: compiled(OwnStep()), "overrides train_step"),
    "sum": (
        lambda: dense(loss=keras.losses.SparseCategoricalCrossentropy(reduction="sum")),
        "reduction 'sum' is no mean",
    ),
    "ema": (lambda: dense(optimizers.SGD(use_ema=True)), "SGD: use_ema is not reproduced"),
    "accumulation": (lambda: dense(optimizers.SGD(gradient_accumulation_steps=2)), "gradient_accumulation_steps"),
    "Ftrl": (lambda: dense(optimizers.Ftrl()), "optimizer Ftrl is not reproduced"),
    "not compiled": (lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3)]), "not compiled with a loss"),
    "another shape": (
        lambda: compiled(keras.Sequential([keras.Input((7,)), layers.Dense(3)])),
        "does not take this batch",
    ),
    "torch": (lambda: torch.nn.Linear(6, 3), "takes a Keras model, not a Linear"),
    "mask": (
        lambda: compiled(
            keras.Sequential([keras.Input((6,)), layers.Embedding(9, 4, mask_zero=True), layers.Dense(1)]),
        ),
        "weighted by a mask",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reproduced_is_refused(name: str, batch: tuple[Any, Any]):
    """Each by name, before anything runs."""
    make, words = REFUSED[name]
    inputs = np.ones((8, 6), "int64") if name == "mask" else batch[0]
    with pytest.raises(TargetError, match=words):
        plait.from_keras(make(), batch=(inputs, batch[1]))


def test_another_backend_is_refused(monkeypatch: pytest.MonkeyPatch, batch: tuple[Any, Any]):
    """The variable to set is named."""
    model = dense()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(TargetError, match="keras runs on jax here") as caught:
        plait.from_keras(model, batch=batch)

    assert "KERAS_BACKEND=torch" in caught.value.hint


def test_a_module_in_double_precision_computes_in_it():
    """Keras' layers would cast what they are given back to float32; a comparison in float64 would then be none."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3)])
    module = KerasModule(model)
    x = torch.randn(5, 4)
    single = module(x)
    double = module.double()(x.double())

    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert 0 < (double - single).abs().max() < 1e-5
    assert keras.config.dtype_policy().compute_dtype == "float32"
