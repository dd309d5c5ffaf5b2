"""tscompile: an ahead-of-time compiler for large language models. A model file and a checkpoint in, one
`plan.tsp` out."""

__version__ = "0.1.0"
