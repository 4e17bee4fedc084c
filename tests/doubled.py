"""A collective defined outside the package whose lowering is wrong: twice its meaning. The benchmark must say so."""

import fcomm

fcomm.define(
    "doubled",
    spec=lambda xs: [x.clone() for x in xs],
    shape=lambda s, group: s,
    vjp=None,
    jvp=None,
    busbw=lambda n: 1.0,
    compose=lambda x, group, backend: 2 * x,
)
