/*
 * A stand-in for Huawei's CANN runtime: one Ascend device whose memory is host memory.
 *
 * torch_npu's libraries need about 85 C symbols from libascendcl, libhccl, libacl_op_compiler,
 * libge_runner, libgraph and libacl_tdt_channel (nm -D --undefined-only libtorch_npu.so), and look
 * up some more with dlsym. The prototypes are those of the headers inside the torch_npu wheel
 * (torch_npu/include/acl). This file is compiled once as libascendcl.so; with -DMINDIESD_EMPTY it
 * gives the other libraries, which only have to exist under their sonames.
 *
 * Rules of this file:
 *  - memory, streams, events and the current device are real (in host memory);
 *  - work is done at once, so events and streams are always complete;
 *  - nothing here computes: an operator that reaches the runtime is one the emulator does not know,
 *    and the runtime answers with an error, never with success;
 *  - there is no clock: elapsed times are NaN.
 */
#ifdef MINDIESD_EMPTY
int mindiesd_emulator_empty_library(void) { return 0; }
#else

#define _GNU_SOURCE
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int aclError;
typedef void *handle;

#define OK 0
#define ERROR_INVALID_PARAM 100000       /* ACL_ERROR_INVALID_PARAM */
#define ERROR_FEATURE_UNSUPPORTED 200006 /* ACL_ERROR_FEATURE_UNSUPPORTED */
#define ERROR_BAD_ALLOC 200000           /* ACL_ERROR_BAD_ALLOC */
#define ALIGNMENT 512                    /* aclrtMalloc's, as its documentation states it */
#define RESERVED (1 << 20)               /* blocks from this size on can be address space */

static __thread char recent_error[512];

static aclError unsupported(const char *what) {
    snprintf(recent_error, sizeof recent_error, "not emulated: %s", what);
    return ERROR_FEATURE_UNSUPPORTED;
}

const char *aclGetRecentErrMsg(void) { return recent_error; }

/* ---- the device ------------------------------------------------------------------------------ */

static __thread int32_t current_device = 0;
static char the_context;

aclError aclInit(const char *config) { (void)config; return OK; }
aclError aclFinalize(void) { return OK; }
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 1; return OK; }

const char *aclrtGetSocName(void) {
    const char *name = getenv("MINDIESD_EMULATOR_SOC");
    return name && *name ? name : "Ascend910B1";
}

aclError aclrtSetDevice(int32_t device) {
    if (device != 0) return ERROR_INVALID_PARAM;
    current_device = device;
    return OK;
}
aclError aclrtGetDevice(int32_t *device) { *device = current_device; return OK; }
aclError aclrtResetDevice(int32_t device) { return device == 0 ? OK : ERROR_INVALID_PARAM; }
aclError aclrtSynchronizeDevice(void) { return OK; }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t timeout) { (void)timeout; return OK; }
aclError aclrtGetCurrentContext(handle *context) { *context = &the_context; return OK; }
aclError aclrtSetCurrentContext(handle context) { (void)context; return OK; }
aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    (void)device;
    if (flags) *flags = 0;
    *active = 1;
    return OK;
}
aclError aclrtGetLogicDevIdByUserDevId(int32_t user, int32_t *logic) { *logic = user; return OK; }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device == peer;
    return OK;
}
aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) {
    (void)flags;
    return peer == 0 ? OK : ERROR_INVALID_PARAM;
}
aclError aclrtDeviceGetBareTgid(int32_t *pid) { *pid = (int32_t)getpid(); return OK; }
/* Cores, caches and memory of the device are the host's. ACL_DEVICE_INFO_* are 0 (AI cores), 1 (vector
 * cores) and 2 (L2 size); ACL_DEV_ATTR_* 1, 101, 102 and 201 count cores, 301 is the memory, 302 the L2
 * size. */
static int64_t second_level_cache(void) {
    long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return size > 0 ? size : 0;
}
aclError aclGetDeviceCapability(uint32_t device, int info, int64_t *value) {
    (void)device;
    if (info < 0 || info > 2) return unsupported("aclGetDeviceCapability");
    *value = info == 2 ? second_level_cache() : (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
    return OK;
}
aclError aclrtGetDeviceInfo(uint32_t device, int attribute, int64_t *value) {
    (void)device;
    switch (attribute) {
    case 1: case 101: case 102: case 201:
        *value = (int64_t)sysconf(_SC_NPROCESSORS_ONLN);
        return OK;
    case 301:
        *value = (int64_t)sysconf(_SC_PHYS_PAGES) * (int64_t)sysconf(_SC_PAGESIZE);
        return OK;
    case 302:
        *value = second_level_cache();
        return OK;
    default:
        return unsupported("aclrtGetDeviceInfo");
    }
}
aclError aclGetCannAttributeList(const int **list, size_t *count) {
    *list = NULL;
    *count = 0;
    return OK;
}
/* Attribute 1 is ACL_CANN_ATTR_INF_NAN: this device computes IEEE infinities and NaNs, as A2 does. */
aclError aclGetCannAttribute(int attribute, int32_t *value) { *value = attribute == 1; return OK; }

/* ---- memory ---------------------------------------------------------------------------------- */

static size_t in_use;

/* Whether large blocks are address space first, and memory only where they are written (outline.py). */
static int reserve_only;
void mindiesdReserveOnly(int on) { reserve_only = on; }

/* What sits in front of a block, so that free memory can be told. */
struct front {
    size_t whole;
    int mapped;
};

static aclError take(void **pointer, size_t size) {
    unsigned char *block = NULL;
    struct front front = {((size + ALIGNMENT - 1) / ALIGNMENT + 1) * ALIGNMENT, 0};
    int failed = size > SIZE_MAX - 2 * ALIGNMENT;
    if (!failed && reserve_only && front.whole >= RESERVED) {
        block = mmap(NULL, front.whole, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        front.mapped = 1;
        failed = block == MAP_FAILED;
    } else if (!failed) {
        failed = posix_memalign((void **)&block, ALIGNMENT, front.whole);
    }
    if (failed) {
        snprintf(recent_error, sizeof recent_error, "out of host memory: %zu bytes", size);
        return ERROR_BAD_ALLOC;
    }
    memcpy(block, &front, sizeof front);
    /* Address space is not memory: torch_npu would keep it, and none would ever be free again. */
    if (!front.mapped) __atomic_add_fetch(&in_use, front.whole, __ATOMIC_RELAXED);
    *pointer = block + ALIGNMENT;
    return OK;
}

static aclError give_back(void *pointer) {
    if (pointer) {
        unsigned char *block = (unsigned char *)pointer - ALIGNMENT;
        struct front front;
        memcpy(&front, block, sizeof front);
        if (front.mapped) {
            munmap(block, front.whole);
        } else {
            __atomic_sub_fetch(&in_use, front.whole, __ATOMIC_RELAXED);
            free(block);
        }
    }
    return OK;
}

aclError aclrtMalloc(void **p, size_t size, int policy) { (void)policy; return take(p, size); }
aclError aclrtMallocAlign32(void **p, size_t size, int policy) { (void)policy; return take(p, size); }
aclError aclrtFree(void *p) { return give_back(p); }
aclError aclrtMallocHost(void **p, size_t size) { return take(p, size); }
aclError aclrtMallocHostWithCfg(void **p, uint64_t size, void *config) {
    (void)config;
    return take(p, size);
}
aclError aclrtFreeHost(void *p) { return give_back(p); }

aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t count, int kind) {
    (void)kind;
    if (count > room) return ERROR_INVALID_PARAM;
    if (count) memmove(to, from, count);
    return OK;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t count, int kind, handle s) {
    (void)s;
    return aclrtMemcpy(to, room, from, count, kind);
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t count) {
    if (count > room) return ERROR_INVALID_PARAM;
    if (count) memset(to, value, count);
    return OK;
}
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t count, handle s) {
    (void)s;
    return aclrtMemset(to, room, value, count);
}

/* The device's memory is the host's: its size is the host's, and what was taken is not free. */
aclError aclrtGetMemInfo(int attribute, size_t *free_bytes, size_t *total) {
    size_t taken = __atomic_load_n(&in_use, __ATOMIC_RELAXED);
    (void)attribute;
    *total = (size_t)sysconf(_SC_PHYS_PAGES) * (size_t)sysconf(_SC_PAGESIZE);
    *free_bytes = taken < *total ? *total - taken : 0;
    return OK;
}

/* Virtual memory (expandable segments): a reservation is a plain block, mapping it changes nothing. */
aclError aclrtReserveMemAddress(void **p, size_t size, size_t alignment, void *wish, uint64_t flags) {
    (void)alignment; (void)wish; (void)flags;
    return take(p, size);
}
aclError aclrtReleaseMemAddress(void *p) { return give_back(p); }
aclError aclrtMallocPhysical(handle *h, size_t size, const void *property, uint64_t flags) {
    (void)property; (void)flags; (void)size;
    *h = malloc(1);
    return *h ? OK : ERROR_BAD_ALLOC;
}
aclError aclrtFreePhysical(handle h) { free(h); return OK; }
aclError aclrtMapMem(void *p, size_t size, size_t offset, handle h, uint64_t flags) {
    (void)p; (void)size; (void)offset; (void)h; (void)flags;
    return OK;
}
aclError aclrtUnmapMem(void *p) { (void)p; return OK; }
aclError aclrtMemExportToShareableHandle(void) { return unsupported("memory shared between processes"); }
aclError aclrtMemImportFromShareableHandle(void) { return unsupported("memory shared between processes"); }
aclError aclrtMemSetPidToShareableHandle(void) { return unsupported("memory shared between processes"); }

/* ---- streams and events: handles that are always complete ------------------------------------ */

static int32_t next_stream = 1;

static aclError new_stream(handle *stream) {
    int32_t *id = malloc(sizeof *id);
    if (!id) return ERROR_BAD_ALLOC;
    *id = __atomic_fetch_add(&next_stream, 1, __ATOMIC_RELAXED);
    *stream = id;
    return OK;
}
aclError aclrtCreateStream(handle *stream) { return new_stream(stream); }
aclError aclrtCreateStreamWithConfig(handle *stream, uint32_t priority, uint32_t flag) {
    (void)priority; (void)flag;
    return new_stream(stream);
}
aclError aclrtDestroyStream(handle stream) { free(stream); return OK; }
aclError aclrtDestroyStreamForce(handle stream) { free(stream); return OK; }
aclError aclrtStreamGetId(handle stream, int32_t *id) {
    *id = stream ? *(int32_t *)stream : 0;
    return OK;
}
aclError aclrtStreamQuery(handle stream, int *status) { (void)stream; *status = 0; return OK; }
aclError aclrtSynchronizeStream(handle stream) { (void)stream; return OK; }
aclError aclrtSynchronizeStreamWithTimeout(handle stream, int32_t timeout) {
    (void)stream; (void)timeout;
    return OK;
}
aclError aclrtStreamWaitEvent(handle stream, handle event) { (void)stream; (void)event; return OK; }
aclError aclrtLaunchCallback(void (*call)(void *), void *data, int blocking, handle stream) {
    (void)blocking; (void)stream;
    call(data);
    return OK;
}
aclError aclrtLaunchHostFunc(handle stream, void (*call)(void *), void *data) {
    (void)stream;
    call(data);
    return OK;
}

static aclError new_event(handle *event) {
    *event = malloc(1);
    return *event ? OK : ERROR_BAD_ALLOC;
}
aclError aclrtCreateEventExWithFlag(handle *event, uint32_t flag) { (void)flag; return new_event(event); }
aclError aclrtCreateEventWithFlag(handle *event, uint32_t flag) { (void)flag; return new_event(event); }
aclError aclrtDestroyEvent(handle event) { free(event); return OK; }
aclError aclrtRecordEvent(handle event, handle stream) { (void)event; (void)stream; return OK; }
aclError aclrtResetEvent(handle event, handle stream) { (void)event; (void)stream; return OK; }
aclError aclrtSynchronizeEvent(handle event) { (void)event; return OK; }
/* ACL_EVENT_RECORDED_STATUS_COMPLETE is 1, ACL_EVENT_WAIT_STATUS_COMPLETE is 0. */
aclError aclrtQueryEventStatus(handle event, int *status) { (void)event; *status = 1; return OK; }
aclError aclrtQueryEventWaitStatus(handle event, int *status) { (void)event; *status = 0; return OK; }
aclError aclrtEventElapsedTime(float *milliseconds, handle start, handle end) {
    (void)start; (void)end;
    *milliseconds = NAN;
    return OK;
}

/* System parameters (determinism): values that are kept, and zero until they are set. */
static int64_t system_parameter[16];
aclError aclrtSetSysParamOpt(int option, int64_t value) {
    if (option < 0 || option >= 16) return ERROR_INVALID_PARAM;
    system_parameter[option] = value;
    return OK;
}
aclError aclrtGetSysParamOpt(int option, int64_t *value) {
    if (option < 0 || option >= 16) return ERROR_INVALID_PARAM;
    *value = system_parameter[option];
    return OK;
}
aclError aclrtCtxSetSysParamOpt(int option, int64_t value) { return aclrtSetSysParamOpt(option, value); }
aclError aclrtCtxGetSysParamOpt(int option, int64_t *value) { return aclrtGetSysParamOpt(option, value); }

/* ---- what only has to be there --------------------------------------------------------------- */

#define ACCEPT(name) int name(void) { return OK; }
ACCEPT(aclAppLog)
ACCEPT(aclmdlFinalizeDump)
ACCEPT(aclmdlInitDump)
ACCEPT(aclmdlSetDump)
ACCEPT(aclrtProcessReport)
ACCEPT(aclrtSubscribeReport)
ACCEPT(aclrtUnSubscribeReport)
ACCEPT(aclrtSetOpExecuteTimeOut)
ACCEPT(aclrtSetOpExecuteTimeOutV2)
ACCEPT(aclrtSetOpWaitTimeout)
ACCEPT(aclrtSetDeviceSatMode)
ACCEPT(aclrtSetStreamFailureMode)
ACCEPT(aclrtSetStreamOverflowSwitch)
ACCEPT(aclrtPeekAtLastError)
ACCEPT(aclrtGetLastError)
ACCEPT(aclSetCompileopt)
ACCEPT(MsprofRegisterCallback)
ACCEPT(MsprofReportAdditionalInfo)
ACCEPT(MsprofReportApi)
ACCEPT(MsprofReportCompactInfo)
uint64_t MsprofGetHashId(const char *text, size_t size) { (void)text; (void)size; return 0; }
uint64_t MsprofSysCycleTime(void) { return 0; }

/* ---- operators the emulator does not know: an error, whichever way they come ------------------ */

handle aclCreateTensorDesc(void) { return calloc(1, 16); }
handle aclCreateDataBuffer(void) { return calloc(1, 16); }
handle aclopCreateAttr(void) { return calloc(1, 16); }
void aclDestroyTensorDesc(handle h) { free(h); }
aclError aclDestroyDataBuffer(handle h) { free(h); return OK; }
void aclopDestroyAttr(handle h) { free(h); }
ACCEPT(aclSetTensorDescName)
ACCEPT(aclSetTensorFormat)
ACCEPT(aclSetTensorPlaceMent)
ACCEPT(aclSetTensorShape)
ACCEPT(aclopSetAttrBool)
ACCEPT(aclopSetAttrDataType)
ACCEPT(aclopSetAttrFloat)
ACCEPT(aclopSetAttrInt)
ACCEPT(aclopSetAttrListBool)
ACCEPT(aclopSetAttrListFloat)
ACCEPT(aclopSetAttrListInt)
ACCEPT(aclopSetAttrListListInt)
ACCEPT(aclopSetAttrString)

aclError aclopCompileAndExecute(const char *operator_type) { return unsupported(operator_type); }
aclError aclopCompileAndExecuteV2(const char *operator_type) { return unsupported(operator_type); }
#define REFUSE(name) aclError name(void) { return unsupported(#name); }
REFUSE(aclGetTensorDescDimV2)
REFUSE(aclGetTensorDescFormat)
REFUSE(aclGetTensorDescNumDims)
REFUSE(aclGetTensorDescType)
REFUSE(aclrtBinaryGetFunction)
REFUSE(aclrtBinaryLoadFromData)
REFUSE(aclrtGetFunctionAddr)
REFUSE(rtDevBinaryRegister)
REFUSE(rtFunctionRegister)
REFUSE(rtGetC2cCtrlAddr)
REFUSE(rtKernelLaunch)
#endif
