"""The same functions under the names and argument conventions of other libraries; thin, with no rules of their own.

    lax        jax.lax's parallel operators: the axis name becomes group, backend; pytrees
    funcol     torch.distributed._functional_collectives, old names and new
    megatron   Megatron-core's tensor_parallel.mappings
    fastvideo  FastVideo's device communicators and its StatelessProcessGroup
    pynccl     FastVideo's and vLLM's PyNcclCommunicator

Each module says where its functions take the two handles.
"""

from fcomm.compat import fastvideo, funcol, lax, megatron, pynccl

__all__ = ["fastvideo", "funcol", "lax", "megatron", "pynccl"]
