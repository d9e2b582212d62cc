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
from plait.capture.batch import split, weight_of  # noqa: E402
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


def iter_rate() -> Callable[[], float]:
    """A rate that a function gives."""
    return lambda: 0.01


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
    "Ftrl": lambda: optimizers.Ftrl(0.1, l1_regularization_strength=0.01, l2_regularization_strength=0.01, beta=0.1),
    "Lamb": lambda: optimizers.Lamb(0.1),
    "accumulation": lambda: optimizers.Adam(0.1, gradient_accumulation_steps=2, clipnorm=0.1),
    "averages": lambda: optimizers.Adam(0.1, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=2),
    "scaled loss": lambda: optimizers.LossScaleOptimizer(optimizers.Adam(0.01, clipvalue=0.05)),
    "rate by a function": lambda: optimizers.Adam(iter_rate()),
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


def padded() -> np.ndarray:
    """Tokens, zeros behind; the lengths differ between the halves of the batch."""
    ids = np.random.default_rng(0).integers(1, 9, size=(8, 6))
    ids[:, 4:], ids[:2, 2:] = 0, 0
    return ids


class Implicit(keras.Model):
    """Its layers learn the mode from Keras' call context, not from an argument."""

    def __init__(self):
        super().__init__()
        self.norm, self.layer = layers.BatchNormalization(), layers.Dense(3)

    def call(self, x, training=False):
        return self.layer(self.norm(x))


class OwnLoss(keras.Model):
    """A loss of its own on top of the compiled one, which reads the inputs."""

    def __init__(self):
        super().__init__()
        self.layer = layers.Dense(3, kernel_regularizer="l2")

    def call(self, x):
        return self.layer(x)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        base = super().compute_loss(x, y, y_pred, sample_weight, training)
        return base + keras.ops.mean(keras.ops.abs(y_pred - keras.ops.convert_to_tensor(x)[:, :3]))


class Counter(layers.Layer):
    """Keeps a whole number and a fraction from call to call, and computes with both."""

    def build(self, shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, dtype="int32")
        self.mean = self.add_weight(shape=(6,), initializer="ones", trainable=False)
        self.scale = self.add_weight(shape=(6,), initializer="ones")

    def call(self, x):
        self.count.assign(self.count + 1)
        scaled = x * self.scale + self.mean * keras.ops.cast(self.count, "float32")
        self.mean.assign(0.9 * self.mean + 0.1 * keras.ops.mean(x, 0))
        return scaled


class OnlyAdded(keras.Model):
    """Nothing but add_loss."""

    def __init__(self):
        super().__init__()
        self.layer = layers.Dense(6)

    def call(self, x):
        self.add_loss(keras.ops.mean(keras.ops.square(self.layer(x) - x)))
        return self.layer(x)


def masked(*, loss: Any = "mse", heads: int = 1) -> Any:
    keras.utils.set_random_seed(0)
    ids = keras.Input((6,), dtype="int32")
    h = layers.LSTM(5, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(ids))
    outputs = [layers.Dense(3, name=f"head{i}")(h) for i in range(heads)]
    return compiled(keras.Model(ids, outputs if heads > 1 else outputs[0]), loss=loss, optimizer="sgd")


def constrained() -> Any:
    keras.utils.set_random_seed(0)
    norm = keras.constraints.MaxNorm(0.5)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(4, kernel_constraint=norm), layers.Dense(3)])
    return compiled(model, optimizer=optimizers.SGD(0.5))


def ignoring() -> Any:
    model = keras.Sequential([keras.Input((4, 6)), layers.Dense(3)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=0)
    return compiled(model, loss=loss)


def half() -> Any:
    keras.utils.set_random_seed(0)
    policy = keras.DTypePolicy("mixed_bfloat16")
    images = keras.Input((4, 4, 3))
    h = layers.BatchNormalization(dtype=policy)(layers.Conv2D(4, 3, dtype=policy)(images))
    return compiled(keras.Model(images, layers.Dense(3, dtype="float32")(layers.Flatten()(h))))


def undecayed() -> Any:
    adam = optimizers.AdamW(0.01, weight_decay=0.5)
    model = dense(adam)
    adam.exclude_from_weight_decay(var_list=[model.layers[0].kernel])
    return model


def normal(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


CLASSES = np.random.default_rng(2).integers(3, size=(8, 6))
# Name -> (model, its batch, further arguments of train_on_batch that are from_keras' own too, whether samples weigh unequally)
SEMANTICS: dict[str, tuple[Callable[[], Any], Callable[[], Any], dict[str, Any], bool]] = {
    "mask": (masked, lambda: (padded(), normal(8, 6, 3)), {}, True),
    "mask and sample weights": (masked, lambda: (padded(), normal(8, 6, 3), np.abs(normal(8, 6))), {}, True),
    "one mask of two outputs": (
        lambda: masked(loss=["mse", "mae"], heads=2),
        lambda: (padded(), (normal(8, 6, 3), normal(8, 6, 3))),
        {},
        True,
    ),
    "ignored class": (ignoring, lambda: (normal(8, 4, 6), np.tril(CLASSES[:, :4])), {}, True),
    "sample weights": (lambda: compiled(OwnLoss()), lambda: (normal(8, 6), normal(8, 3), np.abs(normal(8))), {}, False),
    "class weights": (dense, lambda: (normal(8, 6), CLASSES[:, 0]), {"class_weight": {0: 0.5, 2: 3.0}}, False),
    "mode by context": (lambda: compiled(Implicit()), lambda: (3 * normal(8, 6) + 1, normal(8, 3)), {}, False),
    "own compute_loss": (lambda: compiled(OwnLoss()), lambda: (normal(8, 6), normal(8, 3)), {}, False),
    "state": (
        lambda: compiled(keras.Sequential([keras.Input((6,)), Counter(), layers.Dense(3)])),
        lambda: (normal(8, 6), normal(8, 3)),
        {},
        False,
    ),
    "add_loss alone": (lambda: compiled(OnlyAdded(), loss=None), lambda: (normal(8, 6), normal(8, 6)), {}, False),
    "constraint": (constrained, lambda: (normal(8, 6), normal(8, 3)), {}, False),
    "bfloat16": (half, lambda: (normal(8, 4, 4, 3), normal(8, 3)), {}, False),
    "decay by variable": (undecayed, lambda: (normal(8, 6), CLASSES[:, 0]), {}, False),
}


@pytest.mark.parametrize("name", SEMANTICS)
def test_semantics_are_those_of_keras(name: str):
    """Losses, parameters and kept states of a plain torch loop are those of train_on_batch."""
    make, give, options, is_weighed = SEMANTICS[name]
    model, data = make(), give()
    job = plait.from_keras(model, batch=data, **options)
    losses, module = train(job)
    weights = {"sample_weight": data[2]} if len(data) > 2 else {}
    given = [list(part) if isinstance(part, tuple) else part for part in data[:2]]
    expected = [model.train_on_batch(*given, **weights, **options) for _ in range(STEPS)]

    assert losses == pytest.approx([float(x[0] if isinstance(x, list) else x) for x in expected], abs=1e-6)
    for variable in model.variables:
        if variable.path in module.names:
            assert torch.allclose(module._tensor(module.names[variable.path]), variable.value, rtol=0, atol=1e-6)
    assert (job.loss_weight is not None) == is_weighed


@pytest.mark.parametrize("name", ["mask", "mask and sample weights", "one mask of two outputs", "ignored class"])
def test_masked_losses_of_parts_add_up(name: str):
    """The weighted mean of the halves' losses is the whole batch's, where a mean over samples is not."""
    make, give, _, _ = SEMANTICS[name]
    job = plait.from_keras(make(), batch=give())
    with torch.no_grad():

        def of(start: int, stop: int) -> tuple[float, float]:
            part = split(job, job.batch, (start, stop))
            return float(loss_of(call_model(job.model, part[0]), part[1], job.loss)), weight_of(job, part) or 0.0

        (whole, _), parts = of(0, 8), [of(0, 2), of(2, 8)]

    weighted = sum(loss * weight for loss, weight in parts) / sum(weight for _, weight in parts)
    assert weighted == pytest.approx(whole, 2e-6)
    assert (parts[0][0] * 2 + parts[1][0] * 6) / 8 != pytest.approx(whole, 2e-5)


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


class ReadsWeights(OwnStep):
    train_step = keras.Model.train_step

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        return keras.ops.mean(keras.ops.square(self.layer.kernel)) + keras.ops.mean(y_pred)


def used() -> Any:
    model = dense()
    model.train_on_batch(normal(8, 6), CLASSES[:, 0])
    return model


def half_precision() -> Any:
    layer = layers.Dense(3, dtype=keras.DTypePolicy("mixed_float16"))
    return compiled(
        keras.Sequential([keras.Input((6,)), layer]), optimizer=optimizers.LossScaleOptimizer(optimizers.SGD())
    )


def stateful() -> Any:
    series = keras.Input(batch_shape=(8, 6, 2))
    return compiled(keras.Model(series, layers.LSTM(3, stateful=True)(series)))


def two_masks() -> Any:
    ids = keras.Input((6,), dtype="int32")
    h = layers.LSTM(5, return_sequences=True)(layers.Embedding(9, 4, mask_zero=True)(ids))
    return compiled(keras.Model(ids, [layers.Dense(3)(h), layers.Dense(1)(layers.LSTM(3)(h))]))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "own train_step": (lambda: compiled(OwnStep()), "overrides train_step"),
    "sum": (
        lambda: dense(loss=keras.losses.SparseCategoricalCrossentropy(reduction="sum")),
        "reduction 'sum' is no mean",
    ),
    "ema": (lambda: dense(optimizers.SGD(use_ema=True)), "use_ema puts its averages in place when fit ends"),
    "accumulation": (
        lambda: dense(optimizers.SGD(gradient_accumulation_steps=2, global_clipnorm=1.0)),
        "gradient_accumulation_steps with global_clipnorm",
    ),
    "Muon": (lambda: dense(optimizers.Muon()), "optimizer Muon is not reproduced"),
    "own optimizer": (lambda: dense(type("Adam", (optimizers.Adam,), {})()), "optimizer Adam is not reproduced"),
    "used optimizer": (used, "optimizer SGD has taken 1 steps"),
    "float16": (half_precision, "computes in float16 under a scaled loss"),
    "state of samples": (stateful, "stateful=True keeps a state of each sample"),
    "spectral norm": (
        lambda: compiled(keras.Sequential([keras.Input((6,)), layers.SpectralNormalization(layers.Dense(3))])),
        "assigns to the trainable weight",
    ),
    "loss that reads weights": (lambda: compiled(ReadsWeights()), "its compute_loss reads the weight"),
    "not compiled": (lambda: keras.Sequential([keras.Input((6,)), layers.Dense(3)]), "not compiled with a loss"),
    "another shape": (
        lambda: compiled(keras.Sequential([keras.Input((7,)), layers.Dense(3)])),
        "does not take this batch",
    ),
    "torch": (lambda: torch.nn.Linear(6, 3), "takes a Keras model, not a Linear"),
    "two masks": (two_masks, "means over different values"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_reproduced_is_refused(name: str, batch: tuple[Any, Any]):
    """Each by name, before anything runs."""
    make, words = REFUSED[name]
    inputs, targets = batch
    if name == "two masks":
        inputs, targets = padded(), (normal(8, 6, 3), normal(8, 1))
    if name == "state of samples":
        inputs = normal(8, 6, 2)
    with pytest.raises(TargetError, match=words):
        plait.from_keras(make(), batch=(inputs, targets))


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
