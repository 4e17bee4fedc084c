"""Parallel layers: pure functions over tensors, groups and backends, composed of the collectives.

    tensor.py     column_linear, row_linear, vocab_parallel_embedding, vocab_parallel_cross_entropy, attention, mlp
    sequence.py   ulysses_attention, ring_attention, usp_attention, zigzag_order, partition
    data.py       replicate, mean_gradients, shard_parameters, gather_parameters
    attend.py     attention on one rank

Each module's text says which tensor lives where, and what is communicated. Parameters are arguments: put them in an
nn.Module, in a dict for torch.func.functional_call, or in a vmapped ensemble.
"""

from fcomm.layers.attend import Attend, dot_product_attention, fused_attention
from fcomm.layers.data import gather_parameters, mean_gradients, replicate, shard_parameters
from fcomm.layers.sequence import partition, ring_attention, ulysses_attention, usp_attention, zigzag_order
from fcomm.layers.tensor import (
    attention,
    column_linear,
    enter,
    leave,
    mlp,
    rms_norm,
    row_linear,
    transformer_block,
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
)

__all__ = [
    "Attend",
    "attention",
    "column_linear",
    "dot_product_attention",
    "enter",
    "fused_attention",
    "gather_parameters",
    "leave",
    "mean_gradients",
    "mlp",
    "partition",
    "replicate",
    "ring_attention",
    "rms_norm",
    "row_linear",
    "shard_parameters",
    "transformer_block",
    "ulysses_attention",
    "usp_attention",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "zigzag_order",
]
