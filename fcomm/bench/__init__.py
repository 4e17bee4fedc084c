"""The benchmark: nccl-tests' sizes, flags and table, and competitors measured in the same processes.

plan.py      what to measure: a frozen value, filled by the command line
programs.py  a record -> its call on known values, and what the result must be
rivals.py    the same call by torch.distributed, by its functional collectives, by MPI; a copy; an addition
measure.py   on each rank: interleaved rounds of all contestants
compiled.py  the cost of one call inside a compiled graph
launch.py    the ranks: processes of this machine, of mpirun, or of the launcher that started us
report.py    table, comparison, JSON, CSV          plot.py  the picture
standard.py  make bench: the table of targets      cli.py   python -m fcomm bench

A time is the largest over the ranks. A round measures every contestant once, in an order that rotates; what is
reported is the median over the rounds, and a ratio is the median of the rounds' ratios. Every result is compared with
the record's spec, before and after the rounds.
"""
