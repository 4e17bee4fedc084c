"""The demo: a small language model, trained by one process, and by several with tensor and sequence parallelism.

model.py      the model, twice: in plain torch, and with fcomm's functions. Read this one first.
train.py      the train step, compiled as one graph; the same loop for both models
text.py       batches of bytes from the source of Python's standard library
report.py     progress, tables, the picture
runs.py       one process; ranks as processes; ranks simulated
__main__.py   python -m fcomm.demo, or torchrun --nproc-per-node 2 -m fcomm.demo
"""
