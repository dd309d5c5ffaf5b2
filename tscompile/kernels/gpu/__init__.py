"""Kernels of device targets, in Triton, compiled ahead of time on machines without a GPU.

target   what a kernel may use of the machine
spec     one kernel: template, configuration, parameters, grid
select   description, target and bucket of tokens -> the ways to compute it, the best first
attend   likewise of attention, and what latent attention needs around it
routed   likewise of routed experts
emit     kernel -> Python source from templates/triton
offers   which of these ways is taken: the best that fits, or what a lockfile says
lockfile which configurations a device has found quickest
build    sources -> cubins or code objects, in worker processes, cached by content
worker   the process that holds Triton
cubin    what a cubin says of itself: parameters, registers
hsaco    the same of an AMD GPU's code object
"""
