"""Run by the interpreter of the environment `tensorflow`: models, and what they give, into a folder."""

import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

folder = Path(sys.argv[1])
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).standard_normal((4, 12, 12, 3)).astype("float32")
model = keras.Sequential(
    [
        keras.Input((12, 12, 3)),
        layers.Conv2D(4, 3, padding="same"),
        layers.BatchNormalization(),
        layers.ReLU(),
        layers.MaxPool2D(),
        layers.Conv2D(8, 3, activation="relu"),
        layers.GlobalAveragePooling2D(),
        layers.Dropout(0.2),
        layers.Dense(5, activation="softmax"),
    ]
)
for weight in model.weights:
    if weight.dtype.startswith("float"):
        weight.assign(weight + 0.05 * np.abs(np.random.default_rng(1).standard_normal(weight.shape)))
model.export(folder / "saved", verbose=False)
model.save(folder / "model.keras")
model.save(folder / "old.h5")
(folder / "model.tflite").write_bytes(tf.lite.TFLiteConverter.from_keras_model(model).convert())
whole = tf.function(lambda image: model(image, training=False))
frozen = convert_variables_to_constants_v2(whole.get_concrete_function(tf.TensorSpec([None, 12, 12, 3], tf.float32)))
tf.io.write_graph(frozen.graph.as_graph_def(), str(folder), "frozen.pb", as_text=False)


class Plain(tf.Module):
    """TensorFlow 2 without Keras."""

    def __init__(self):
        super().__init__()
        self.w = tf.Variable(np.random.default_rng(2).standard_normal((6, 4)).astype("float32"))
        self.b = tf.Variable(np.zeros(4, "float32"))

    @tf.function(input_signature=[tf.TensorSpec([None, 6], tf.float32, name="x")])
    def __call__(self, x):
        return {"y": tf.nn.tanh(x @ self.w + self.b)}


plain = Plain()
tf.saved_model.save(plain, folder / "plain", signatures=plain.__call__)
np.savez(folder / "expected.npz", x=x, y=model(x, training=False), a=x[0, 0, :4, 0:1] + np.zeros((4, 6), "float32"))
np.savez(folder / "plain.npz", y=plain(x[0, 0, :4, 0:1] + np.zeros((4, 6), "float32"))["y"])
