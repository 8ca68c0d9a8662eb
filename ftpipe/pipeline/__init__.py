"""The pipeline: a typed DAG of stages, their keys, the store of artifacts, the plan and the runner."""
