"""How fast, measured on this machine in this run: what is compared takes turns, and the ratio is what counts.

A machine that others use slows down and speeds up; two runs cannot be compared, two contenders that take turns can.
Next to every speed stands the machine's own: the best square matrix product found in the same run (`machine.py`).
"""
