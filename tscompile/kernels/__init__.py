"""Kernels: description (what) -> configuration (how) -> source (text) -> shared object, each a type of its
own.

desc     a frozen dataclass a group kind: all constants, nothing of the machine
groups   a group of the graph -> its description
select   description and target -> tile configuration
emit     description, configuration and target -> C++ from templates/cpu
build    sources -> one shared object a target, cached by content
host     which targets this machine runs
"""
