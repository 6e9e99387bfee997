/* A CUDA driver that accepts everything and does nothing, for Triton's launcher and ours: see
   `bench/stand_in/__init__.py`. It records the launches that it is given while `stand_in_records` is set. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0 };
enum { SHARED_SIZE_BYTES = 1, LOCAL_SIZE_BYTES = 3 };  /* of CUfunction_attribute */

#define SHARED_MEMORY 232448  /* bytes that a block may take on Hopper */
#define MAX_THREADS 1024
#define MOST_PARAMETERS 128
#define MOST_BYTES 4096
#define MOST_LAUNCHES 256

#define ACCEPTS(name) \
    int name(void *a, void *b, void *c, void *d, void *e, void *f) { return SUCCESS; }

static int context;
int stand_in_records;  /* whether launches are recorded */
int stand_in_error;    /* what every launch returns */
int stand_in_launched; /* how many launches were recorded, or would have been */

/* A kernel, with the offset and the size of each of its parameters. */
struct kernel {
    char name[128];
    int parameters;
    uint16_t offsets[MOST_PARAMETERS], sizes[MOST_PARAMETERS];
};

struct launch {
    char name[128];
    int32_t is_extended;  /* whether it was cuLaunchKernelEx */
    uint32_t grid[3], block[3], shared, attributes;
    uint64_t stream, thread_has_context;
    int32_t parameters;
    uint16_t sizes[MOST_PARAMETERS];
    uint8_t bytes[MOST_BYTES];  /* of the parameters, one after the other */
} stand_in_launches[MOST_LAUNCHES];

static __thread void *current;

int cuCtxGetCurrent(void **found) { *found = current; return SUCCESS; }
int cuCtxSetCurrent(void *chosen) { current = chosen; return SUCCESS; }
int cuDevicePrimaryCtxRetain(void **found, int device) { *found = &context; return SUCCESS; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
int cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = SHARED_MEMORY; return SUCCESS; }
int cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stand-in"; return SUCCESS; }

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

static uint64_t number(const uint8_t *at, int bytes) {
    uint64_t value = 0;
    memcpy(&value, at, bytes);
    return value;
}

/* The parameters of a kernel as its ELF file states them, in attributes of the section
   `.nv.info.<name>`. */
static void read_parameters(struct kernel *kernel, const uint8_t *file) {
    enum { WITH_SIZE = 4, PARAMETER = 0x17 };
    const uint8_t *sections = file + number(file + 0x28, 8);
    uint64_t entry = number(file + 0x3a, 2), count = number(file + 0x3c, 2);
    const uint8_t *names = file + number(sections + number(file + 0x3e, 2) * entry + 24, 8);
    char wanted[160] = ".nv.info.";
    strcat(wanted, kernel->name);
    for (uint64_t i = 0; i < count; ++i) {
        const uint8_t *section = sections + i * entry;
        if (strcmp((const char *)names + number(section, 4), wanted)) continue;
        const uint8_t *at = file + number(section + 24, 8), *end = at + number(section + 32, 8);
        while (at < end) {
            if (at[0] == WITH_SIZE && at[1] == PARAMETER) {
                uint64_t ordinal = number(at + 8, 2);
                if (ordinal >= MOST_PARAMETERS) abort();
                kernel->offsets[ordinal] = number(at + 10, 2);
                kernel->sizes[ordinal] = number(at + 12, 4) >> 18;
                if (kernel->parameters <= (int)ordinal) kernel->parameters = ordinal + 1;
            }
            at += at[0] == WITH_SIZE ? 4 + number(at + 2, 2) : 4;
        }
    }
}

/* A module is its file: Triton takes the function out of it before it drops the file. */
int cuModuleLoadData(const void **module, const void *file) { *module = file; return SUCCESS; }

int cuModuleGetFunction(struct kernel **function, const uint8_t *file, const char *name) {
    *function = calloc(1, sizeof(struct kernel));
    strncpy((*function)->name, name, sizeof (*function)->name - 1);
    if (!memcmp(file, "\177ELF", 4)) read_parameters(*function, file);
    return SUCCESS;
}

static int launched(
    int is_extended, const struct kernel *kernel, const uint32_t *sizes, void *stream,
    uint32_t attributes, void **parameters) {
    if (!stand_in_records) return stand_in_error;
    int place = __atomic_fetch_add(&stand_in_launched, 1, __ATOMIC_RELAXED);
    if (place >= MOST_LAUNCHES) return stand_in_error;
    struct launch *here = stand_in_launches + place;
    memset(here, 0, sizeof *here);
    memcpy(here->name, kernel->name, sizeof here->name);
    here->is_extended = is_extended;
    memcpy(here->grid, sizes, sizeof here->grid);
    memcpy(here->block, sizes + 3, sizeof here->block);
    here->shared = sizes[6];
    here->stream = (uint64_t)stream;
    here->thread_has_context = current != NULL;
    here->attributes = attributes;
    here->parameters = kernel->parameters;
    uint8_t *to = here->bytes;
    for (int i = 0; i < kernel->parameters; to += kernel->sizes[i++]) {
        here->sizes[i] = kernel->sizes[i];
        if (to + kernel->sizes[i] > here->bytes + MOST_BYTES) abort();
        memcpy(to, parameters[i], kernel->sizes[i]);
    }
    return stand_in_error;
}

int cuLaunchKernel(
    const struct kernel *kernel, uint32_t x, uint32_t y, uint32_t z, uint32_t a, uint32_t b, uint32_t c,
    uint32_t shared, void *stream, void **parameters, void **extra) {
    uint32_t sizes[] = {x, y, z, a, b, c, shared};
    return launched(0, kernel, sizes, stream, 0, parameters);
}

struct configuration {  /* CUlaunchConfig */
    uint32_t sizes[7];
    void *stream, *attributes;
    uint32_t count;
};

int cuLaunchKernelEx(
    const struct configuration *how, const struct kernel *kernel, void **parameters, void **extra) {
    return launched(1, kernel, how->sizes, how->stream, how->count, parameters);
}

ACCEPTS(cuCtxGetLimit)
ACCEPTS(cuCtxSetLimit)
ACCEPTS(cuFuncSetAttribute)
ACCEPTS(cuFuncSetCacheConfig)
ACCEPTS(cuModuleUnload)
ACCEPTS(cuOccupancyMaxActiveClusters)
ACCEPTS(cuTensorMapEncodeIm2col)
ACCEPTS(cuTensorMapEncodeTiled)
