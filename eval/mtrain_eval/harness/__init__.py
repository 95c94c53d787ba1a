"""mtrain inside lm-evaluation-harness: a model that any of its tasks can use, and our suites as tasks that any of its models can use.

`import mtrain_eval.harness.lm` registers the model ``mtrain``; `mtrain lm-eval ...` is the command line of lm-eval with it registered.
https://github.com/EleutherAI/lm-evaluation-harness
"""
