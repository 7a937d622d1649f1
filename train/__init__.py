"""Distillation of EAGLE and EAGLE-3 drafts from their frozen target.

Run from the root of the checkout: `python -m train.train`. Start reading at `trainer.py`.
"""
