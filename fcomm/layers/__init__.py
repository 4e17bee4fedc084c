"""Parallel layers: pure functions over tensors, groups and backends, composed of the collectives.

    tensor.py     column_linear, row_linear, vocab_parallel_embedding, vocab_parallel_cross_entropy, attention, mlp,
                  transformer_block; enter and leave, which these are made of; rms_norm
    sequence.py   ulysses_attention, ring_attention, usp_attention, zigzag_order, partition
    expert.py     route, moe_capacity, moe_ragged, moe_uneven, expert_counts, masked_experts
    data.py       replicate, mean_gradients, shard_parameters, gather_parameters
    pipeline.py   gpipe, one_f_one_b, from_last
    attend.py     dot_product_attention, fused_attention: on one rank
    gpt.py        a worked model: a small GPT under dp x sp x tp; gpt_loss, init_params, cut, own_tokens
    diffusion.py  a worked model: diffusion_block, a transformer block whose patches are cut over the ranks

Each module's docstring says which tensor lives where, and what is communicated. Parameters are arguments: put them in
an nn.Module, in a dict for torch.func.functional_call, or in a vmapped ensemble.
"""

from fcomm.layers.attend import Attend, dot_product_attention, fused_attention
from fcomm.layers.data import gather_parameters, mean_gradients, replicate, shard_parameters
from fcomm.layers.diffusion import STREAM, diffusion_block, joint_attention, patch_positions
from fcomm.layers.expert import Experts, expert_counts, masked_experts, moe_capacity, moe_ragged, moe_uneven, route
from fcomm.layers.gpt import GPT, cut, gpt_loss, init_params, own_tokens
from fcomm.layers.pipeline import from_last, gpipe, one_f_one_b
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
    "GPT",
    "STREAM",
    "Attend",
    "Experts",
    "attention",
    "column_linear",
    "cut",
    "diffusion_block",
    "dot_product_attention",
    "enter",
    "expert_counts",
    "from_last",
    "fused_attention",
    "gather_parameters",
    "gpipe",
    "gpt_loss",
    "init_params",
    "joint_attention",
    "leave",
    "masked_experts",
    "mean_gradients",
    "mlp",
    "moe_capacity",
    "moe_ragged",
    "moe_uneven",
    "one_f_one_b",
    "own_tokens",
    "partition",
    "patch_positions",
    "replicate",
    "ring_attention",
    "rms_norm",
    "route",
    "row_linear",
    "shard_parameters",
    "transformer_block",
    "ulysses_attention",
    "usp_attention",
    "vocab_parallel_cross_entropy",
    "vocab_parallel_embedding",
    "zigzag_order",
]
