"""Training of symmetry models: configuration, task balancing, the trainer and its checkpoints.

Not for models (`xrdfast.models`) or for metrics (`xrdfast.evaluation`).
"""
