"""How anything is trained here, whatever the network: one loop, and tasks that say what is particular.

In reading order: options.py (what can be set), task.py (what a task provides), loop.py (the loop), step.py (one step of
the optimiser, on CUDA one recorded graph), optim.py (learning rate, groups, average), loader.py (batches made ahead),
checkpoint.py (what a run leaves and goes on from), processes.py (several processes), logs.py, clock.py.
"""
