"""Helpers of finetune.py, finetune8bh200.py and evaluate.py. Importing the package loads neither torch nor models."""
