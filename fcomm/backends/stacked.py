"""sim: the machine of a simulated axis. It has no lowerings: registration applies a collective's spec to the stack."""

from fcomm.group import Backend, register_backend

sim = register_backend(Backend("sim"))
