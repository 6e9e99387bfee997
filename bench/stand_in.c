/* A CUDA driver that accepts everything and does nothing, for Triton's launcher: see stand_in.py. */

#include <stdint.h>

enum { SUCCESS = 0 };
enum { SHARED_SIZE_BYTES = 1, LOCAL_SIZE_BYTES = 3 };  /* of CUfunction_attribute */

#define SHARED_MEMORY 232448  /* bytes that a block may take on Hopper */
#define MAX_THREADS 1024

#define ACCEPTS(name) \
    int name(void *a, void *b, void *c, void *d, void *e, void *f) { return SUCCESS; }

static int context;

int cuCtxGetCurrent(void **current) { *current = &context; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = SHARED_MEMORY; return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "error"; return SUCCESS; }

int cuFuncGetAttribute(int *value, int attribute, void *function) {
    int is_size = attribute == SHARED_SIZE_BYTES || attribute == LOCAL_SIZE_BYTES;
    *value = is_size ? 0 : MAX_THREADS;
    return SUCCESS;
}

/* Every pointer is one of the device's. */
int cuPointerGetAttribute(uint64_t *value, int attribute, uint64_t pointer) {
    *value = pointer;
    return SUCCESS;
}

ACCEPTS(cuCtxSetCurrent)
ACCEPTS(cuCtxGetLimit)
ACCEPTS(cuCtxSetLimit)
ACCEPTS(cuDeviceGet)
ACCEPTS(cuDevicePrimaryCtxRetain)
ACCEPTS(cuFuncSetAttribute)
ACCEPTS(cuFuncSetCacheConfig)
ACCEPTS(cuModuleGetFunction)
ACCEPTS(cuModuleLoadData)
ACCEPTS(cuOccupancyMaxActiveClusters)
ACCEPTS(cuTensorMapEncodeTiled)
ACCEPTS(cuLaunchKernelEx)
ACCEPTS(cuLaunchKernel)
