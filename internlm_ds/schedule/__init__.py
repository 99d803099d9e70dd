"""Pipeline schedules as data: 1F1B, interleaved 1F1B, ZB-H1 and evaluation, and a simulator that proves and times them.

No tensors and no ranks here: `engine` carries the instructions out, `plan` draws them.
"""
