"""`python -m mambakit.evaluation`: the lm-evaluation-harness's own command line, with our models in it."""

from mambakit.evaluation import harness

if __name__ == "__main__":
    harness.run()
