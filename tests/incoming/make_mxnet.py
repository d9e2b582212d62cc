"""Run by the interpreter of the environment `mxnet`: a Gluon model, and what it gives, into a folder."""

import sys
from pathlib import Path

import mxnet as mx
import numpy as np
from mxnet.gluon import nn

folder = Path(sys.argv[1])
mx.random.seed(0)
net = nn.HybridSequential()
net.add(
    nn.Conv2D(4, 3, padding=1),
    nn.BatchNorm(),
    nn.Activation("relu"),
    nn.MaxPool2D(),
    nn.Conv2D(6, 3),
    nn.LeakyReLU(0.1),
    nn.GlobalAvgPool2D(),
    nn.Flatten(),
    nn.Dropout(0.3),
    nn.Dense(5),
)
net.initialize(mx.init.Normal(0.3))
net.hybridize()
x = np.random.default_rng(0).standard_normal((4, 3, 10, 10)).astype("float32")
y = net(mx.nd.array(x))
net.export(str(folder / "net"))
np.savez(folder / "expected.npz", x=x, y=y.asnumpy())
