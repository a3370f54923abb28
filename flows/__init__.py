"""Prefect flows over the stages that dvc.yaml declares."""
