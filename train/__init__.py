"""Online distillation of EAGLE drafts. Run from the checkout's root: `python -m train.train`."""
