"""mtrain inside lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness).

A model that any of its tasks can use (`lm`; importing it registers the name ``mtrain``), our suites as tasks that any of its models
can use (`documents`, `yaml_files`), and its command line with both in it (`mtrain lm-eval`).
"""
