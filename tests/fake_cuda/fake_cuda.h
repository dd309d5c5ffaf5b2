/* A driver of ours with libcuda's symbols, for tests on machines without a GPU. The host's memory is the device's; kernels do
 * nothing, or are functions of the host. Every call is written down, as a line of JSON, and so is every violation: an address
 * outside what was allocated, memory freed under a graph that reads it, a call without a context, a launch that does not fit its
 * cubin. Work that is asynchronous is done as late as may be.
 *
 * Settings, "name=value;name=value", come from the variable FAKE_CUDA when it is loaded, or from fake_cuda_reset(); state.h lists
 * them. */
#ifndef FAKE_CUDA_H
#define FAKE_CUDA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Runs a kernel on the host: `params` are its parameters, which are pointers. */
typedef void (*fake_cuda_runner)(const char *symbol, const uint32_t *grid, void *const *params, size_t num_params);

/* Forgets all that was, but for what is still there of a device that was not lost, and takes new settings. */
void fake_cuda_reset(const char *settings);
/* Lines written so far, each with a line feed; valid until the next call of this function. */
const char *fake_cuda_log(void);
int64_t fake_cuda_num_violations(void);
void fake_cuda_set_runner(fake_cuda_runner runner);

#ifdef __cplusplus
}
namespace fake_cuda {
using Runner = fake_cuda_runner;
}
#endif
#endif
