"""Kernels of device targets, in Triton, compiled ahead of time on machines without a GPU.

target   what a kernel may use of the machine
spec     one kernel: template, configuration, parameters, grid
select   description, target and bucket of tokens -> the kernels that compute it, in order
emit     kernel -> Python source from templates/triton
build    sources -> cubins, in worker processes, cached by content
worker   the process that holds Triton
cubin    what a cubin says of itself: parameters, registers
"""
