"""Tests for collectives, including your own: every rule against torch's own derivative of the meaning.

transforms.py  the programs: what each transform does with a collective, and what the result must be
check.py       Case, check_case, check_collective: one collective through all transforms, simulated or in real
               processes; run_ranks
strategies.py  hypothesis strategies of groups, permutations, sizes and tensors (needs hypothesis)
"""

from fcomm.testing.check import Case, check_case, check_collective, reason_to_leave_out, run_ranks
from fcomm.testing.transforms import TRANSFORMS, Transform

__all__ = [
    "TRANSFORMS",
    "Case",
    "Transform",
    "check_case",
    "check_collective",
    "reason_to_leave_out",
    "run_ranks",
]
