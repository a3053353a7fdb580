"""The names under which the generated sample is known to other programs."""

from diptych_mclrec.sample import Demo, bayes_scores, make_demo

__all__ = ["Demo", "bayes_scores", "make_demo"]
