"""Teaching grounding to a frozen model: a batch becomes a loss, a step, a checkpoint and at last an adapter.

In reading order: presets.py (what can be set), data.py (scenes → batch), objective.py (batch → loss), trainable.py
(what may change), trainer.py (the loop), state.py (what a run leaves), diagnosis.py (is grounding being learnt?),
report.py (a run as one picture).
"""
