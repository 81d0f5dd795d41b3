"""Teaching grounding to a frozen model: a batch becomes a loss, a step, a checkpoint and at last an adapter.

In reading order: presets.py (what can be set), batches.py (examples → batch), objective.py (batch → loss), trainable.py
(what may change), grounding_task.py (the task that the loop runs), engine/ (the loop itself, for any network),
diagnosis.py (is grounding being learnt?), report.py (a run as one picture).
"""
