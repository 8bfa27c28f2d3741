"""What a machine can do with the model, counted before anyone rents it: `python -m step3p5.plan --help`.

Counted from the shapes of `config.json` and a `ParallelPlan` alone; nothing is loaded and no GPU is asked.
"""
