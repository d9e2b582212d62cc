"""Keras models of every kind, each a function that gives a compiled model and a batch; as a TARGET, a Job."""

from __future__ import annotations

import os

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import numpy as np
from keras import layers

import plait

RNG = np.random.default_rng(0)


def images(samples: int = 8) -> np.ndarray:
    """Channels last."""
    return RNG.standard_normal((samples, 8, 8, 3)).astype("float32")


def sequential():
    """A CNN with batch norm (no bias before it), pooling, an L2 penalty; sparse cross-entropy on logits; Adam."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.Conv2D(4, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPool2D(),
            layers.Conv2D(6, 3, kernel_regularizer="l2", use_bias=False),
            layers.BatchNormalization(momentum=0.9, epsilon=1e-5),
            layers.Activation("gelu"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5),
        ],
        name="cnn",
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss)
    return model, (images(), RNG.integers(5, size=8))


def functional():
    """Two inputs joined, two outputs with weighted losses, a frozen layer; AdamW with a schedule and global clipping."""
    keras.utils.set_random_seed(1)
    a, b = keras.Input((6,), name="a"), keras.Input((4,), name="b")
    h = layers.Concatenate()([layers.Dense(8, activation="relu")(a), layers.Dense(8, trainable=False)(b)])
    h = layers.LayerNormalization()(h)
    outputs = [layers.Dense(3, activation="softmax", name="kind")(h), layers.Dense(1, name="size")(h)]
    model = keras.Model([a, b], outputs, name="two")
    schedule = keras.optimizers.schedules.CosineDecay(1e-2, 20, warmup_target=2e-2, warmup_steps=3)
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.05, global_clipnorm=0.5)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer=optimizer, loss=["categorical_crossentropy", "mse"], loss_weights=[1.0, 0.3])
    inputs = (RNG.standard_normal((8, 6)).astype("float32"), RNG.standard_normal((8, 4)).astype("float32"))
    targets = (np.eye(3, dtype="float32")[RNG.integers(3, size=8)], RNG.standard_normal((8, 1)).astype("float32"))
    return model, (inputs, targets)


@keras.saving.register_keras_serializable()
class Block(layers.Layer):
    """A transformer's block."""

    def __init__(self, width: int, heads: int, **kwargs):
        super().__init__(**kwargs)
        self.attention = layers.MultiHeadAttention(heads, width // heads)
        self.first, self.second = layers.LayerNormalization(), layers.LayerNormalization()
        self.up, self.down = layers.Dense(4 * width, activation="gelu"), layers.Dense(width)
        self.drop = layers.Dropout(0.1)

    def call(self, x, training=None):
        h = self.first(x)
        x = x + self.drop(self.attention(h, h, use_causal_mask=True), training=training)
        return x + self.down(self.up(self.second(x)))


class Transformer(keras.Model):
    """A subclass of keras.Model, with the mode as an argument."""

    def __init__(
        self, vocabulary: int = 40, length: int = 12, width: int = 32, heads: int = 4, depth: int = 2, **kwargs
    ):
        super().__init__(**kwargs)
        self.table = layers.Embedding(vocabulary, width)
        self.places = layers.Embedding(length, width)
        self.blocks = [Block(width, heads) for _ in range(depth)]
        self.head = layers.Dense(vocabulary)
        self.length = length

    def call(self, ids, training=None):
        x = self.table(ids) + self.places(keras.ops.arange(self.length))
        for block in self.blocks:
            x = block(x, training=training)
        return self.head(x)


def subclass():
    """Next tokens; RMSprop with momentum."""
    keras.utils.set_random_seed(2)
    model = Transformer(name="transformer")
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.RMSprop(1e-3, momentum=0.5), loss=loss)
    ids = RNG.integers(40, size=(8, 12))
    return model, (ids, np.roll(ids, -1, 1))


def recurrent():
    """An LSTM over a series; SGD with Nesterov momentum."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((7, 5)), layers.LSTM(8), layers.Dense(1, activation="sigmoid")], name="lstm")
    model.compile(optimizer=keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), loss="binary_crossentropy")
    targets = RNG.integers(2, size=(8, 1)).astype("float32")
    return model, (RNG.standard_normal((8, 7, 5)).astype("float32"), targets)


KINDS = {"sequential": sequential, "functional": functional, "subclass": subclass, "recurrent": recurrent}


def job(kind: str = "sequential") -> plait.Job:
    """The Job of one of them."""
    from plait.capture.keras.job import from_keras

    model, batch = KINDS[kind]()
    return from_keras(model, batch=batch)
