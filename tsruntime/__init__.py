"""Serves a compiled model. The runtime is one executable: this package finds it, and generates with it.

>>> from tsruntime import LLM
>>> with LLM("plan.tsp") as llm:
...     for answer in llm.generate(["def fib(n):", "import "], max_tokens=16):
...         print(answer["text"])
"""

from tsruntime._find import find_executable
from tsruntime._llm import LLM, RequestError, RuntimeFailure

__all__ = ["LLM", "RequestError", "RuntimeFailure", "find_executable"]
